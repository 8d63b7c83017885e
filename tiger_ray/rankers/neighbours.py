"""Nearest neighbours of a user's last item, by the cosine of content embeddings; nothing is trained.

B users, N items, D embedding width, E events of all users.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.rankers.base import NO_ITEM, Found, Histories, Lists, Rules, for_known, without_newest
from tiger_ray.rankers.index import Exact


class Neighbours:
    """Ranks items by the cosine of their embedding and that of the newest item of the history that has one.

    The newest item itself is not recommended, nor is an item without an embedding. A user whose history has no item
    with an embedding gets no item.

    >>> embedding_ND = np.array([[1, 0], [1, 1], [0, 1], [1, 0.1]], np.float32)
    >>> ranker = Neighbours(embedding_ND, Rules(np.ones(4, bool)))
    >>> ranker.recommend(Histories.of([[2, 0]]), 2).item_BK.tolist()
    [[3, 1]]
    """

    def __init__(
        self,
        embedding_ND: npt.NDArray[np.float32],
        rules: Rules,
        device: torch.device | str = "cpu",
    ) -> None:
        """Index the eligible items.

        Args:
            embedding_ND: content embeddings, (N, D); NaN or 0 where there is none.
            rules: what may come out.
            device: where to compare.
        """
        length_N = np.linalg.norm(embedding_ND, axis=1)
        self._known_N = np.isfinite(length_N) & (length_N > 0)
        divisor_N = np.where(self._known_N, length_N, 1).astype(np.float32)
        self._unit_ND = embedding_ND / divisor_N[:, None]
        self._index = Exact(torch.from_numpy(self._unit_ND), rules.eligible_N & self._known_N, device)
        self._exclude_history = rules.exclude_history

    def recommend(self, histories: Histories, k: int) -> Found:
        """As `Ranker.recommend`; scores are cosines."""
        return for_known(histories, k, lambda known: self._recommend(known, k))

    def _recommend(self, histories: Histories, k: int) -> Found:
        item_index_E, lengths_B = histories.item_index_E, histories.lengths_B
        end_B = np.cumsum(lengths_B)
        place_E = np.where(self._known_N[item_index_E], np.arange(len(item_index_E)), -1)
        newest_B = np.maximum.accumulate(place_E)[end_B - 1]
        known_B = newest_B >= end_B - lengths_B
        excluded_B = lengths_B if self._exclude_history else np.where(known_B, end_B - newest_B, 0)

        def search(user_b: npt.NDArray[np.int64], count: int) -> Lists:
            user_bD = self._unit_ND[item_index_E[newest_B[user_b]]]
            found_bP, score_bP = self._index.search(user_bD, count)
            known_b1 = known_B[user_b, None]
            return np.where(known_b1, found_bP, NO_ITEM), np.where(known_b1, score_bP, np.float32(-np.inf))

        return without_newest(search, histories, excluded_B, k)
