"""Popularity as a ranker: every user gets the same list, without the items that the rules leave out for the user.

B users, N items, M items that may be recommended, P places of a list.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiger_ray.rankers.base import NO_ITEM, Found, Histories, Lists, Rules, without_newest


class Popularity:
    """Ranks items by their number of events; an item without events is not recommended.

    A user without history gets the same list.

    >>> ranker = Popularity(np.array([1, 8, 1]), Rules(np.ones(3, bool)))
    >>> ranker.recommend(Histories.of([[1]]), 3).item_BK.tolist()
    [[1, 0, 2]]
    """

    def __init__(self, events_N: npt.NDArray[np.int64], rules: Rules, num_events: int | None = None) -> None:
        """Order the items.

        Args:
            events_N: events of each item, (N,) int64.
            rules: what may come out.
            num_events: events that scores are shares of; None: the sum of `events_N`.
        """
        total = int(events_N.sum()) if num_events is None else num_events
        order_M = np.argsort(-events_N, kind="stable")
        self._item_index_M = order_M[(rules.eligible_N & (events_N > 0))[order_M]]
        self._score_M = np.log(events_N[self._item_index_M] / max(total, 1)).astype(np.float32)
        self._exclude_history = rules.exclude_history

    def recommend(self, histories: Histories, k: int) -> Found:
        """As `Ranker.recommend`; scores are the natural log of the share of all events."""
        excluded_B = histories.lengths_B * self._exclude_history
        return without_newest(self._search, histories, excluded_B, k)

    def _search(self, user_b: npt.NDArray[np.int64], count: int) -> Lists:
        missing = max(0, count - len(self._item_index_M))
        found_P = np.pad(self._item_index_M[:count], (0, missing), constant_values=NO_ITEM)
        score_P = np.pad(self._score_M[:count], (0, missing), constant_values=-np.inf)
        return np.tile(found_P, (len(user_b), 1)), np.tile(score_P, (len(user_b), 1))
