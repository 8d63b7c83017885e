"""What ranks items for users, whatever it is; and the simplest that does.

B users, K items per user, P places of a fetched list (P >= K), N items, M of them that may be recommended, E events
of all users. A lower-case letter counts a part of what the upper-case one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tiger_ray.core.arrays import ranges

Lists = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""item_index, (B, P), best first and the lower one first where scores are equal, -1 after the last; and score,
(B, P), -inf where there is no item."""

PLACES_AT_ONCE = 2**16
"""Entries of fetched lists that are in memory together."""


class Ranker(Protocol):
    """Whatever recommends items."""

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_hash_B: npt.NDArray[np.uint64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The k best eligible items of each user.

        Args:
            item_index: items of all histories one after the other, each oldest first, (E,) int32.
            lengths_B: items per history, (B,) int64; they sum to E.
            user_hash_B: hash of the user id, (B,) uint64, for a ranker that tells users apart.
            k: items per user.
            exclude_history: leave out the items of the whole history.

        Returns:
            item_index, (B, k) int64, best first, -1 after the last; and score, (B, k) float32, -inf where
            there is no item.
        """


def without_newest(
    search: Callable[[npt.NDArray[np.int64], int], Lists],
    item_index: npt.NDArray[np.int32],
    lengths_B: npt.NDArray[np.int64],
    excluded_B: npt.NDArray[np.int64],
    k: int,
) -> Lists:
    """The k best items of each user, without some of the newest items of the history.

    Args:
        search: finds lists, (b, P), for some users, given by row, (b,), and P.
        item_index: items of all histories one after the other, each oldest first, (E,) int32.
        lengths_B: items per history, (B,) int64.
        excluded_B: how many of the newest must not come, (B,) int64.
        k: items per user.
    """
    end_B = np.cumsum(lengths_B)
    found_BK = np.full((len(lengths_B), k), -1, np.int64)
    score_BK = np.full((len(lengths_B), k), -np.inf, np.float32)
    by_excluded_B = np.argsort(-excluded_B, kind="stable")
    first = 0
    while first < len(by_excluded_B):
        count = k + int(excluded_B[by_excluded_B[first]])
        user_b = by_excluded_B[first : first + max(1, PLACES_AT_ONCE // count)]
        first += len(user_b)
        found_bP, score_bP = search(user_b, count)
        length_b = excluded_B[user_b]
        row_b = np.arange(len(user_b)) << 32
        excluded = item_index[ranges(end_B[user_b] - length_b, length_b)] + np.repeat(row_b, length_b)
        gone_bP = np.isin(found_bP + row_b[:, None], excluded)
        order_bK = np.argsort(gone_bP, axis=1, kind="stable")[:, :k]
        found_BK[user_b] = np.take_along_axis(np.where(gone_bP, -1, found_bP), order_bK, 1)
        score_BK[user_b] = np.take_along_axis(np.where(gone_bP, -np.inf, score_bP), order_bK, 1)
    return found_BK, score_BK
