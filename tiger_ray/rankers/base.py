"""The values that rankers share, and the interface of every ranker.

B users, K items per user, P places of a fetched list (P >= K), E events of all users, N items. A lower-case letter
counts a part of what the upper-case letter counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tiger_ray.artifacts import schemas
from tiger_ray.core.arrays import ranges

NO_ITEM = -1
"""item_index of a slot without an item."""


GENERATED, FALLBACK = range(len(schemas.SOURCES))
"""Source of a slot: the number of its word in `schemas.SOURCES`."""


Lists = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""item_index, (B, P), best first and the lower one first where scores are equal, -1 after the last; and score,
(B, P), -inf where there is no item. An index returns lists; a ranker makes `Found` of them."""


Users = slice | list[int] | npt.NDArray[np.int64] | npt.NDArray[np.bool_]
"""Some users of a batch: a slice, their places, (b,), or a mask, (B,)."""


PLACES_AT_ONCE = 2**16
"""Entries of fetched lists that are in memory together."""


@dataclass(frozen=True)
class Histories:
    """Histories of some users, one user after the other, each oldest event first.

    >>> histories = Histories.of([[7, 3, 7], [], [5]])
    >>> histories.take([2, 0]).newest(2).lists()
    [[5], [3, 7]]
    """

    item_index_E: npt.NDArray[np.int32]
    lengths_B: npt.NDArray[np.int64]
    """Events per user; they sum to E, and 0 is a user without history."""
    user_hash_B: npt.NDArray[np.uint64] | None = None
    """Hash of each user id; None where no ranker tells users apart."""

    @classmethod
    def of(
        cls, lists: Iterable[Iterable[int]], user_hash_B: npt.NDArray[np.uint64] | None = None
    ) -> Histories:
        """Histories from one list of item_index per user."""
        parts = [np.fromiter(items, np.int32) for items in lists]
        lengths_B = np.array([len(part) for part in parts], np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *parts]), lengths_B, user_hash_B)

    def __len__(self) -> int:
        """Users."""
        return len(self.lengths_B)

    def take(self, users: Users) -> Histories:
        """These users, in this order."""
        length_b = self.lengths_B[users]
        first_b = np.cumsum(self.lengths_B)[users] - length_b
        hash_b = None if self.user_hash_B is None else self.user_hash_B[users]
        return Histories(self.item_index_E[ranges(first_b, length_b)], length_b, hash_b)

    def newest(self, count: int) -> Histories:
        """The `count` newest events of each user."""
        length_B = np.minimum(self.lengths_B, count)
        first_B = np.cumsum(self.lengths_B) - length_B
        return Histories(self.item_index_E[ranges(first_B, length_B)], length_B, self.user_hash_B)

    def lists(self) -> list[list[int]]:
        """One list of item_index per user."""
        ends = np.cumsum(self.lengths_B).tolist()
        return [self.item_index_E[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Rules:
    """What may come out of a ranker, and for whom. A ranker is built with its rules.

    >>> Rules(np.array([True, False, True])).exclude_history
    False
    """

    eligible_N: npt.NDArray[np.bool_]
    """Whether the item may be recommended at all."""
    exclude_history: bool = False
    """Leave out the items of the user's whole history."""


@dataclass(frozen=True)
class Found:
    """Items found for some users, K slots each.

    >>> found = Found.of(np.array([[4, 2, -1]]), np.array([[-0.5, -0.2, -np.inf]], np.float32))
    >>> found.best_first().first(2).item_BK.tolist()
    [[2, 4]]
    """

    item_BK: npt.NDArray[np.int64]
    """item_index, in the order of the ranker; `NO_ITEM` after the last."""
    score_BK: npt.NDArray[np.float32]
    """-inf where there is no item."""
    source_BK: npt.NDArray[np.int8]
    """`GENERATED` or `FALLBACK`: the ranker that was asked for the slot, also where the slot has no item."""

    @classmethod
    def of(
        cls, item_BK: npt.NDArray[np.int64], score_BK: npt.NDArray[np.float32], source: int = GENERATED
    ) -> Found:
        """Found items that all have one source.

        Args:
            item_BK: (B, K) int64, in the order of the ranker; `NO_ITEM` after the last item.
            score_BK: (B, K) float32; -inf where there is no item.
            source: `GENERATED` or `FALLBACK`.
        """
        return cls(item_BK, score_BK, np.full(item_BK.shape, source, np.int8))

    @classmethod
    def nothing(cls, num_users: int, k: int) -> Found:
        """Slots without items."""
        shape = (num_users, k)
        return cls.of(np.full(shape, NO_ITEM, np.int64), np.full(shape, -np.inf, np.float32))

    def __len__(self) -> int:
        """Users."""
        return len(self.item_BK)

    def take(self, users: Users) -> Found:
        """These users, in this order."""
        return Found(self.item_BK[users], self.score_BK[users], self.source_BK[users])

    def put(self, users: Users, found: Found) -> Found:
        """A copy in which these users have the slots of `found`, one user of `found` after the other."""
        item_BK, score_BK, source_BK = self.item_BK.copy(), self.score_BK.copy(), self.source_BK.copy()
        item_BK[users], score_BK[users] = found.item_BK, found.score_BK
        source_BK[users] = found.source_BK
        return Found(item_BK, score_BK, source_BK)

    def first(self, k: int) -> Found:
        """The first k slots of each user."""
        return Found(self.item_BK[:, :k], self.score_BK[:, :k], self.source_BK[:, :k])

    def best_first(self) -> Found:
        """The slots of each user by score; a draw comes in another order. Equal scores keep their order."""
        place_BK = np.argsort(-self.score_BK, axis=1, kind="stable")
        return Found(
            np.take_along_axis(self.item_BK, place_BK, 1),
            np.take_along_axis(self.score_BK, place_BK, 1),
            np.take_along_axis(self.source_BK, place_BK, 1),
        )


class Ranker(Protocol):
    """A source of recommendations: TIGER, a baseline, or a combination of rankers.

    The rules are given when a ranker is built, so that a ranker can build them into its index or trie.
    """

    def recommend(self, histories: Histories, k: int) -> Found:
        """The k best items of each user that the ranker's rules allow.

        Args:
            histories: of B users.
            k: slots per user, K.

        Returns:
            Slots, (B, K). The best item comes first, or the first drawn item. Of items with equal scores the
            lower item_index comes first; TIGER takes the lower Semantic ID. The items of a user do not depend on
            the other users.
        """


def for_known(histories: Histories, k: int, recommend: Callable[[Histories], Found]) -> Found:
    """Rank for the users who have a history, and leave the slots of the other users empty.

    Args:
        histories: of all users.
        k: items per user.
        recommend: called with the users who have a history, or not at all if there are none.
    """
    known_B = histories.lengths_B > 0
    if not known_B.any():
        return Found.nothing(len(histories), k)
    if known_B.all():
        return recommend(histories)
    return Found.nothing(len(histories), k).put(known_B, recommend(histories.take(known_B)))


def without_newest(
    search: Callable[[npt.NDArray[np.int64], int], Lists],
    histories: Histories,
    excluded_B: npt.NDArray[np.int64],
    k: int,
) -> Found:
    """The k best items of each user, except some of the newest items of the history.

    Args:
        search: from places of users, (b,), and a length P to lists, (b, P).
        histories: of all users.
        excluded_B: number of newest items that must not come out, (B,) int64.
        k: items per user.
    """
    item_index_E, end_B = histories.item_index_E, np.cumsum(histories.lengths_B)
    found_BK = np.full((len(histories), k), NO_ITEM, np.int64)
    score_BK = np.full((len(histories), k), -np.inf, np.float32)
    by_excluded_B = np.argsort(-excluded_B, kind="stable")
    first = 0
    while first < len(by_excluded_B):
        count = k + int(excluded_B[by_excluded_B[first]])
        user_b = by_excluded_B[first : first + max(1, PLACES_AT_ONCE // count)]
        first += len(user_b)
        found_bP, score_bP = search(user_b, count)
        length_b = excluded_B[user_b]
        row_b = np.arange(len(user_b)) << 32
        excluded = item_index_E[ranges(end_B[user_b] - length_b, length_b)] + np.repeat(row_b, length_b)
        gone_bP = np.isin(found_bP + row_b[:, None], excluded)
        order_bK = np.argsort(gone_bP, axis=1, kind="stable")[:, :k]
        found_BK[user_b] = np.take_along_axis(np.where(gone_bP, NO_ITEM, found_bP), order_bK, 1)
        score_BK[user_b] = np.take_along_axis(np.where(gone_bP, -np.inf, score_bP), order_bK, 1)
    return Found.of(found_BK, score_BK)
