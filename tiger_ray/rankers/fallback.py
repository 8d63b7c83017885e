"""One ranker for users with history, and another for users without. Night and endpoint both rank with this class.

B users.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tiger_ray.rankers.base import FALLBACK, Found, Histories, Ranker


class FallbackRanker:
    """Ranks with one ranker; a user without history gets the items of another ranker, marked `FALLBACK`.

    >>> from tiger_ray.rankers.base import Rules
    >>> from tiger_ray.rankers.neighbours import Neighbours
    >>> from tiger_ray.rankers.popularity import Popularity
    >>> rules = Rules(np.ones(3, bool))
    >>> near = Neighbours(np.eye(3, dtype=np.float32), rules)
    >>> ranker = FallbackRanker(near, Popularity(np.array([1, 3, 2]), rules))
    >>> found = ranker.recommend(Histories.of([[1], []]), 2)
    >>> found.item_BK.tolist(), found.source_BK.tolist()
    ([[0, 2], [1, 2]], [[0, 0], [1, 1]])
    """

    def __init__(self, ranker: Ranker, popular: Ranker) -> None:
        """Take the ranker for users with history, and the one for users without."""
        self._ranker, self._popular = ranker, popular

    def recommend(self, histories: Histories, k: int) -> Found:
        """As `Ranker.recommend`; scores are those of the ranker that was asked for the user."""
        found = self._ranker.recommend(histories, k)
        empty_B = histories.lengths_B == 0
        if not empty_B.any():
            return found
        popular = self._popular.recommend(histories.take(empty_B), k)
        return found.put(
            empty_B, replace(popular, source_BK=np.full(popular.item_BK.shape, FALLBACK, np.int8))
        )
