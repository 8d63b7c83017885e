"""Popularity as a ranker: the same list for everyone, but for what a user may not see."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiger_ray.rankers.base import Lists, without_newest


class Popularity:
    """Ranks items by their number of events; an item without any is not recommended."""

    def __init__(self, events_N: npt.NDArray[np.int64], eligible_N: npt.NDArray[np.bool_]) -> None:
        """Take the events that training may see of each item, (N,), and what may be recommended, (N,) bool."""
        order_M = np.argsort(-events_N, kind="stable")
        self._item_index_M = order_M[(eligible_N & (events_N > 0))[order_M]]
        self._score_M = np.log(events_N[self._item_index_M] / max(int(events_N.sum()), 1)).astype(np.float32)

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_hash_B: npt.NDArray[np.uint64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> Lists:
        """As `Ranker.recommend`; scores are the natural log of the share of all events."""
        excluded_B = lengths_B if exclude_history else np.zeros_like(lengths_B)
        return without_newest(self._search, item_index, lengths_B, excluded_B, k)

    def _search(self, user_b: npt.NDArray[np.int64], count: int) -> Lists:
        missing = max(0, count - len(self._item_index_M))
        found_P = np.pad(self._item_index_M[:count], (0, missing), constant_values=-1)
        score_P = np.pad(self._score_M[:count], (0, missing), constant_values=-np.inf)
        return np.tile(found_P, (len(user_b), 1)), np.tile(score_P, (len(user_b), 1))
