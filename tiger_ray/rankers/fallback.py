"""A ranker for users with history, and popularity for users without: the only place where the two meet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tiger_ray.rankers.base import FALLBACK, Found, Histories, Ranker


class FallbackRanker:
    """Ranks with one ranker; a user without history gets the items of another one, marked `FALLBACK`."""

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
