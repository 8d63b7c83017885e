"""Ranked lists -> accuracy with intervals, accuracy by group, and the items shown: full ranking, item level.

Each user has one held-out event. A hit is the target item with its disambiguator; an item that only shares the
target's codewords is a miss. All accuracy, also of resampled users, follows from counts of users by the rank of
their target. Workers count, and counts of disjoint users add up, so memory does not grow with users.

B users, P places of a ranked list, C cells of a count by rank: rank 1 to rank P, then the users whose target is
not in the list (C = P + 1), G groups, N items, E events of all users, M metrics, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger[Any]]
"""Signed integers of any width."""


NOT_RANKED = 2**62
"""Rank of a target that is not in the list; larger than every K."""


COLD = 10
"""The popularity group of items without a training event; items with events have groups 0 to 9."""


def ranks(item_index_BP: Ints, target_B: Ints) -> npt.NDArray[np.int64]:
    """Rank of each user's target, 1 for the best.

    Args:
        item_index_BP: ranked items, (B, P); -1 after the last item. A repeated item counts at its best place.
        target_B: held-out items, (B,).

    Returns:
        (B,) int64; `NOT_RANKED` where the target is not in the list.
    """
    hit_BP = item_index_BP == target_B[:, None]
    # A list may be shorter than K: the place after its end would count as a hit.
    place_B = hit_BP.argmax(axis=1) if hit_BP.shape[1] else 0
    return np.where(hit_BP.any(axis=1), place_B + 1, NOT_RANKED)


def rank_counts(rank_B: Ints, num_places: int) -> npt.NDArray[np.int64]:
    """Number of users with each rank, (C,) int64 with C = `num_places` + 1; larger ranks are misses."""
    return np.bincount(_cells(rank_B, num_places), minlength=num_places + 1)


def grouped_rank_counts(
    rank_B: Ints, num_places: int, group_B: Ints, num_groups: int
) -> npt.NDArray[np.int64]:
    """`rank_counts` of each group of users, (G, C) int64.

    Args:
        rank_B: result of `ranks`, (B,).
        num_places: P, at least the largest K of a later metric.
        group_B: group of each user, 0 to G - 1, (B,): `np.digitize(length_B, edges)` for history lengths,
            `popularity_groups(...)[target_B]` for the popularity of targets.
        num_groups: G.
    """
    cell = group_B.astype(np.int64) * (num_places + 1) + _cells(rank_B, num_places)
    return np.bincount(cell, minlength=num_groups * (num_places + 1)).reshape(num_groups, num_places + 1)


def joint_rank_counts(rank_B: Ints, other_rank_B: Ints, num_places: int) -> npt.NDArray[np.int64]:
    """Number of users with each pair of ranks from two rankers, (C, C) int64.

    Args:
        rank_B: ranks of the first ranker, the rows of the result, (B,).
        other_rank_B: ranks of the second ranker, the columns of the result, (B,).
        num_places: P, at least the largest K of a later metric.
    """
    return grouped_rank_counts(other_rank_B, num_places, _cells(rank_B, num_places), num_places + 1)


def share_found(item_index_BP: Ints, sought_BP: Ints) -> npt.NDArray[np.float64]:
    """Share of each user's sought items that are in the list of the same user.

    Args:
        item_index_BP: items of a list, (B, P), each at most once; -1 after the last item.
        sought_BP: items to find, (B, P'), each at most once; -1 after the last item. The cost is P P' per user.

    Returns:
        (B,) float64; 1 for a user without sought items.
    """
    sought = sought_BP >= 0
    found_B = ((sought_BP[:, :, None] == item_index_BP[:, None, :]).any(2) & sought).sum(1)
    return np.where(sought.any(1), found_B / np.maximum(sought.sum(1), 1), 1.0)


def _cells(rank_B: Ints, num_places: int) -> Ints:
    return np.minimum(rank_B, num_places + 1) - 1


@dataclass(frozen=True)
class Estimate:
    """A mean over users and its interval.

    >>> Estimate(0.25, 0.2, 0.3).excludes_zero
    True
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True for a difference that chance does not explain: the interval does not hold 0."""
        return self.low > 0 or self.high < 0


def metrics(count_C: Ints, ks: Sequence[int]) -> dict[str, float]:
    """Recall@K, NDCG@K and MRR@K for each K, and the number of users; zeros without users.

    Args:
        count_C: users by rank, (C,).
        ks: cut-offs K, none of them beyond the last place.

    Source: Recall@K and NDCG@K for leave-one-out as in TIGER, Rajput et al. 2023, section 4. With one relevant
    item, Recall@K is the share of users with a rank of at most K. NDCG@K is the mean of 1 / log2(rank + 1), and
    MRR@K the mean of 1 / rank, over all users, where users with a larger rank add 0.
    """
    users = int(count_C.sum())
    gains = _gains(len(count_C), ks)
    return {
        "users": users,
        **{name: float(count_C @ gain_C) / max(users, 1) for name, gain_C in gains.items()},
    }


def estimates(
    count_C: Ints, ks: Sequence[int], *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Estimate]:
    """The metrics of `metrics`, each with its percentile bootstrap interval over users.

    Args:
        count_C: users by rank, (C,).
        ks: cut-offs K, none of them beyond the last place.
        num_resamples: R.
        confidence: share of the resamples within the interval, 0 to 1.
        seed: of the resamples.

    Source: Efron and Tibshirani 1993, chapter 13. Ours: drawing users with replacement is a multinomial draw
    of counts by rank, whose cost does not grow with users.
    """
    return _bootstrap(count_C, _gains(len(count_C), ks), num_resamples, confidence, seed)


def differences(
    joint_CC: Ints, ks: Sequence[int], *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Estimate]:
    """Each metric of the first ranker minus that of the second, with its paired bootstrap interval.

    The rankers are compared user by user, so differences between users cancel out.

    Args:
        joint_CC: users by both ranks, (C, C), result of `joint_rank_counts`.
        ks, num_resamples, confidence, seed: as in `estimates`.
    """
    gains = {
        name: np.subtract.outer(gain_C, gain_C).ravel() for name, gain_C in _gains(len(joint_CC), ks).items()
    }
    return _bootstrap(joint_CC.ravel(), gains, num_resamples, confidence, seed)


def _gains(num_cells: int, ks: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
    """Contribution of a user in each cell to the sum of each metric, (C,)."""
    assert max(ks) < num_cells, f"users are counted up to rank {num_cells - 1}, and K is {max(ks)}"
    rank_P = np.arange(1, num_cells)
    gains = {"recall": np.ones(num_cells - 1), "ndcg": 1 / np.log2(rank_P + 1), "mrr": 1 / rank_P}
    return {
        f"{name}@{k}": np.append(np.where(rank_P <= k, gain_P, 0.0), 0.0)
        for k in ks
        for name, gain_P in gains.items()
    }


def _bootstrap(
    count_C: Ints,
    gains: Mapping[str, npt.NDArray[np.float64]],
    num_resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Estimate]:
    """Means of `gains`, each (C,), over the counted users, with percentile intervals."""
    # numpy's multinomial gives the last cell the rounding remainder, so the last cell must not be empty.
    seen = np.flatnonzero(count_C)
    if not len(seen):
        return dict.fromkeys(gains, Estimate(0.0, 0.0, 0.0))
    users, count_C = count_C.sum(), count_C[seen]
    gain_CM = np.column_stack(list(gains.values()))[seen]
    drawn_RC = np.random.default_rng(seed).multinomial(users, count_C / users, size=num_resamples)
    outside = (1 - confidence) / 2
    low_M, high_M = np.quantile(drawn_RC @ gain_CM / users, [outside, 1 - outside], axis=0)
    return {
        name: Estimate(*map(float, row))
        for name, *row in zip(gains, count_C @ gain_CM / users, low_M, high_M, strict=True)
    }


def popularity_ranks(training_events_N: Ints) -> npt.NDArray[np.int64]:
    """Rank of each item by its training events, (N,) int64: 1 for the most events, ties by item_index."""
    rank_N = np.empty(len(training_events_N), np.int64)
    rank_N[np.argsort(-training_events_N, kind="stable")] = np.arange(1, len(rank_N) + 1)
    return rank_N


def popularity_groups(training_events_N: Ints) -> npt.NDArray[np.int8]:
    """Popularity group of each item, (N,) int8: tenths of the warm items, 0 the most popular; or `COLD`."""
    warm_N = training_events_N > 0
    tenth_N = (popularity_ranks(training_events_N) - 1) * 10 // max(int(warm_N.sum()), 1)
    return np.where(warm_N, tenth_N, COLD).astype(np.int8)


def targets_in_history(item_E: Ints, lengths_B: Ints, target_B: Ints) -> npt.NDArray[np.bool_]:
    """True where the target is in the user's history, (B,) bool: masking histories makes such a hit impossible.

    Args:
        item_E: items of all histories one after the other, (E,).
        lengths_B: items per history, (B,).
        target_B: held-out items, (B,).
    """
    user_E = np.repeat(np.arange(len(target_B)), lengths_B)
    found_B = np.zeros(len(target_B), bool)
    found_B[user_E[item_E == target_B[user_E]]] = True
    return found_B


@dataclass(frozen=True)
class Exposure:
    """Counts of the items in the lists of some users. Exposures of disjoint users add up.

    >>> lists_BP, category_N = np.array([[0, 1], [0, -1]]), np.array([5, 5, 5])
    >>> exposure = Exposure.of(lists_BP, np.array([True, True, True]), category_N)
    >>> exposure.shown_N.tolist(), (exposure + exposure).users
    ([2, 1, 0], 4)
    """

    shown_N: npt.NDArray[np.int64]
    """Number of users with each item in their list, (N,); invalid entries do not count."""
    users: int
    entries: int
    """Total length of all lists, with invalid entries."""
    short_lists: int
    """Users whose list ends before the last place."""
    entropy_sum: float
    """Sum over users of `category_entropy`."""

    @classmethod
    def of(cls, item_index_BP: Ints, eligible_N: npt.NDArray[np.bool_], category_N: Ints) -> Exposure:
        """Count the entries of lists. An entry is invalid if it is not an eligible item, or a repeat in the list.

        Args:
            item_index_BP: shown items, (B, P); -1 after the last item. An index of N or more is invalid.
            eligible_N: true for an item that may be recommended, (N,) bool.
            category_N: as in `category_entropy`.
        """
        sorted_BP = np.sort(item_index_BP, axis=1)
        valid_BP = _differs_from_left(sorted_BP) & _look_up(eligible_N, sorted_BP, False)
        length_B = (item_index_BP >= 0).sum(axis=1)
        return cls(
            shown_N=np.bincount(sorted_BP[valid_BP], minlength=len(eligible_N)),
            users=len(item_index_BP),
            entries=int(length_B.sum()),
            short_lists=int((length_B < item_index_BP.shape[1]).sum()),
            entropy_sum=float(category_entropy(item_index_BP, category_N).sum()),
        )

    def __add__(self, other: Exposure) -> Exposure:
        return Exposure(
            self.shown_N + other.shown_N,
            self.users + other.users,
            self.entries + other.entries,
            self.short_lists + other.short_lists,
            self.entropy_sum + other.entropy_sum,
        )

    def metrics(self, eligible_N: npt.NDArray[np.bool_], training_events_N: Ints) -> dict[str, float]:
        """Spread and popularity of the shown items.

        Args:
            eligible_N: true for an item that may be recommended, (N,) bool.
            training_events_N: events of each item that training saw, (N,).

        Returns:
            `coverage`, the share of eligible items in at least one list; `gini` over the eligible items;
            `popularity_rank`, the mean of `popularity_ranks` over valid entries; `cold_share`, the share of
            valid entries without a training event; `invalid_share` of all entries; `short_lists`, the number
            of users; `entropy`, the mean of `category_entropy` over users.
        """
        shown = self.shown_N[eligible_N]
        valid = int(self.shown_N.sum())
        return {
            "coverage": float((shown > 0).sum()) / max(len(shown), 1),
            "gini": gini(shown),
            "popularity_rank": float(self.shown_N @ popularity_ranks(training_events_N)) / max(valid, 1),
            "cold_share": float(self.shown_N[training_events_N == 0].sum()) / max(valid, 1),
            "invalid_share": (self.entries - valid) / max(self.entries, 1),
            "short_lists": self.short_lists,
            "entropy": self.entropy_sum / max(self.users, 1),
        }


def gini(count_N: Ints) -> float:
    """Gini index of counts (N,): 0 for equal counts, (N - 1) / N if one item has all counts; 0 without counts.

    Source: mean absolute difference over twice the mean, in its form for sorted values.
    """
    num = len(count_N)
    weight_N = 2 * np.arange(1, num + 1) - num - 1
    return float(weight_N @ np.sort(count_N)) / max(num * int(count_N.sum()), 1)


def category_entropy(item_index_BP: Ints, category_N: Ints) -> npt.NDArray[np.float64]:
    """Entropy in nats of the categories in each user's list, (B,) float64; 0 for an empty list.

    Args:
        item_index_BP: the first K shown items, (B, P = K); -1 after the last item. A list may be short.
        category_N: category of each item, (N,); -1 for an unknown category, which counts as a category.

    Source: Entropy@K of TIGER, Rajput et al. 2023, study of diversity; the base of the logarithm is ours.
    """
    num_users, num_places = item_index_BP.shape
    there_BP = item_index_BP >= 0
    category_BP = np.sort(np.where(there_BP, _look_up(category_N, item_index_BP, -1), -2), axis=1)
    # `_differs_from_left` starts a run in every row, so a run never spans two rows.
    start = np.flatnonzero(_differs_from_left(category_BP))
    length = np.diff(start, append=category_BP.size)
    known = category_BP.ravel()[start] > -2
    user = start[known] // max(num_places, 1)
    share = length[known] / there_BP.sum(axis=1)[user]
    entropy_B = np.bincount(user, weights=-share * np.log(share), minlength=num_users)
    return entropy_B.astype(np.float64)  # numpy gives integers if all lists are empty


def _look_up(value_N: npt.NDArray[Any], item_index_BP: Ints, other: int) -> npt.NDArray[Any]:
    """Value of each entry, (B, P); `other` for an index that is -1, or N or more."""
    return np.append(value_N, np.asarray(other, value_N.dtype))[np.minimum(item_index_BP, len(value_N))]


def _differs_from_left(sorted_BP: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """True where a run of equal values begins in a row, (B, P) bool."""
    begins_BP = np.ones(sorted_BP.shape, bool)
    begins_BP[:, 1:] = sorted_BP[:, 1:] != sorted_BP[:, :-1]
    return begins_BP
