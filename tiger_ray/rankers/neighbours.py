"""What is like the last item: nearest neighbours by the cosine of content embeddings, no training at all.

B users, K items per user, N items, D embedding width, E events of all users.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.rankers.base import Lists, without_newest
from tiger_ray.rankers.index import Exact


class Neighbours:
    """Ranks items by the cosine of their embedding and that of the newest item of the history which has one.

    That item itself is not recommended, and neither are items without an embedding; a user all of whose items
    have none gets nothing.
    """

    def __init__(
        self,
        embedding_ND: npt.NDArray[np.float32],
        eligible_N: npt.NDArray[np.bool_],
        device: torch.device | str = "cpu",
    ) -> None:
        """Take content embeddings, (N, D), NaN or 0 where there is none, and what may be recommended, (N,) bool."""
        length_N = np.linalg.norm(embedding_ND, axis=1)
        self._known_N = np.isfinite(length_N) & (length_N > 0)
        divisor_N = np.where(self._known_N, length_N, 1).astype(np.float32)
        self._unit_ND = embedding_ND / divisor_N[:, None]
        self._index = Exact(torch.from_numpy(self._unit_ND), eligible_N & self._known_N, device)

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_hash_B: npt.NDArray[np.uint64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> Lists:
        """As `rankers.Ranker.recommend`; scores are cosines."""
        end_B = np.cumsum(lengths_B)
        place_E = np.where(self._known_N[item_index], np.arange(len(item_index)), -1)
        newest_B = np.maximum.accumulate(place_E)[end_B - 1]
        known_B = newest_B >= end_B - lengths_B
        excluded_B = lengths_B if exclude_history else np.where(known_B, end_B - newest_B, 0)

        def search(user_b: npt.NDArray[np.int64], count: int) -> Lists:
            user_bD = self._unit_ND[item_index[newest_B[user_b]]]
            found_bP, score_bP = self._index.search(user_bD, count)
            known_b1 = known_B[user_b, None]
            return np.where(known_b1, found_bP, -1), np.where(known_b1, score_bP, np.float32(-np.inf))

        return without_newest(search, item_index, lengths_B, excluded_B, k)
