"""SASRec as a ranker: the state of a history's last event against all item embeddings.

B histories, K items each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.model.sasrec import SasrecModel
from tiger_ray.rankers.base import Lists, without_newest
from tiger_ray.rankers.index import Exact, Index


class Sasrec:
    """Ranks by inner products with the weights that a model has now."""

    def __init__(
        self,
        model: SasrecModel,
        device: torch.device,
        *,
        eligible_N: npt.NDArray[np.bool_],
        index: Index | None = None,
    ) -> None:
        """Get ready to rank.

        Args:
            model: in evaluation mode.
            device: where it is.
            eligible_N: may the item be recommended, (N,) bool.
            index: of the model's item vectors; None: compare with every item.
        """
        self._model = model
        self._index = index or Exact(model.item.weight, eligible_N, device)

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_hash_B: npt.NDArray[np.uint64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> Lists:
        """As `rankers.Ranker.recommend`; scores are inner products."""
        user_BD = self._model.user_vectors(item_index, lengths_B)
        excluded_B = lengths_B if exclude_history else np.zeros_like(lengths_B)
        return without_newest(
            lambda user_b, count: self._index.search(user_BD[user_b], count),
            item_index,
            lengths_B,
            excluded_B,
            k,
        )
