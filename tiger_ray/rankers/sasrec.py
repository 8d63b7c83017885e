"""SASRec as a ranker: the state of a history's last event against all item embeddings.

B users, D width of the model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.model.sasrec import SasrecModel
from tiger_ray.rankers.base import Found, Histories, Lists, Rules, for_known, without_newest
from tiger_ray.rankers.index import Exact, Index


class Sasrec:
    """Ranks by inner products with the weights that the model has now. A user without history gets no item.

    >>> from tiger_ray.settings.sasrec import SasrecSettings
    >>> model = SasrecModel(SasrecSettings(), num_items=5).eval()
    >>> ranker = Sasrec(model, "cpu", rules=Rules(np.ones(5, bool), exclude_history=True))
    >>> sorted(ranker.recommend(Histories.of([[0, 3]]), 3).item_BK[0].tolist())
    [1, 2, 4]
    """

    def __init__(
        self,
        model: SasrecModel,
        device: torch.device | str,
        *,
        rules: Rules,
        index: Index | None = None,
    ) -> None:
        """Get ready to rank.

        Args:
            model: in evaluation mode.
            device: where the model is.
            rules: what may come out.
            index: of the model's item vectors, eligible items only; None: compare with every eligible item.
        """
        self._model, self._exclude_history = model, rules.exclude_history
        self._index = index or Exact(model.item.weight, rules.eligible_N, device)

    def recommend(self, histories: Histories, k: int) -> Found:
        """As `Ranker.recommend`; scores are inner products."""
        return for_known(histories, k, lambda known: self._recommend(known, k))

    def _recommend(self, histories: Histories, k: int) -> Found:
        user_BD = self._model.user_vectors(histories.item_index_E, histories.lengths_B)

        def search(user_b: npt.NDArray[np.int64], count: int) -> Lists:
            return self._index.search(user_BD[user_b], count)

        return without_newest(search, histories, histories.lengths_B * self._exclude_history, k)
