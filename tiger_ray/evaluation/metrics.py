"""Ranked lists -> accuracy with its uncertainty, whom it serves, and what is shown: full ranking, item level.

One held-out event per user. A hit is the target item itself, with its disambiguator; an item that only shares
its codewords is a miss. All accuracy follows from how many users have their target at which rank, resampled
users included, so workers count, counts of disjoint users add up, and no later step knows how many users
there are.

B users, P places of a ranked list, C cells of a count by rank: rank 1 to rank P, then the users whose target is
not there (C = P + 1), G groups, N items, E events of all users, M metrics, R resamples.
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
"""Rank of a target that is not in the list; beyond every K."""


COLD = 10
"""The popularity group of items without a training event; those of the others are 0 to 9."""


def ranks(item_index_BP: Ints, target_B: Ints) -> npt.NDArray[np.int64]:
    """Rank of each user's target, 1 for the best.

    Args:
        item_index_BP: ranked items, (B, P); -1 after the last. A repeated item counts at its best place.
        target_B: held-out items, (B,).

    Returns:
        (B,) int64; `NOT_RANKED` where the target is not in the list.
    """
    hit_BP = item_index_BP == target_B[:, None]
    # A list may be shorter than K: the place after its end would count as a hit.
    place_B = hit_BP.argmax(axis=1) if hit_BP.shape[1] else 0
    return np.where(hit_BP.any(axis=1), place_B + 1, NOT_RANKED)


def rank_counts(rank_B: Ints, num_places: int) -> npt.NDArray[np.int64]:
    """How many users have which rank, (C,) int64 with C = `num_places` + 1; larger ranks are misses."""
    return np.bincount(_cells(rank_B, num_places), minlength=num_places + 1)


def grouped_rank_counts(
    rank_B: Ints, num_places: int, group_B: Ints, num_groups: int
) -> npt.NDArray[np.int64]:
    """`rank_counts` of each group of users, (G, C) int64.

    Args:
        rank_B: as `ranks` gives them, (B,).
        num_places: P, at least every K that is asked for later.
        group_B: 0 to G - 1, (B,): history lengths as `np.digitize(length_B, edges)`, targets as
            `popularity_groups(...)[target_B]`.
        num_groups: G.
    """
    cell = group_B.astype(np.int64) * (num_places + 1) + _cells(rank_B, num_places)
    return np.bincount(cell, minlength=num_groups * (num_places + 1)).reshape(num_groups, num_places + 1)


def joint_rank_counts(rank_B: Ints, other_rank_B: Ints, num_places: int) -> npt.NDArray[np.int64]:
    """How many users have which pair of ranks from two rankers, (C, C) int64; the first ranker's are the rows."""
    return grouped_rank_counts(other_rank_B, num_places, _cells(rank_B, num_places), num_places + 1)


def share_found(item_index_BP: Ints, sought_BP: Ints) -> npt.NDArray[np.float64]:
    """Share of each user's sought items that are among the items of the same user.

    Args:
        item_index_BP: items of a list, (B, P), each at most once; -1 after the last.
        sought_BP: items to be found, likewise, (B, P'); all P P' pairs of a user are compared.

    Returns:
        (B,); 1 where nothing is sought.
    """
    sought = sought_BP >= 0
    found_B = ((sought_BP[:, :, None] == item_index_BP[:, None, :]).any(2) & sought).sum(1)
    return np.where(sought.any(1), found_B / np.maximum(sought.sum(1), 1), 1.0)


def _cells(rank_B: Ints, num_places: int) -> Ints:
    return np.minimum(rank_B, num_places + 1) - 1


@dataclass(frozen=True)
class Estimate:
    """A mean over users and its interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Of a difference: is it more than chance?"""
        return self.low > 0 or self.high < 0


def metrics(count_C: Ints, ks: Sequence[int]) -> dict[str, float]:
    """Recall@K, NDCG@K and MRR@K for each K, and the number of users; zeros if there is nobody.

    Args:
        count_C: users by rank, (C,).
        ks: cut-offs K, none of them beyond the last place.

    Source: Recall@K and NDCG@K for leave-one-out as in the paper, section 4: with one relevant item they are
    the share of users with a rank of at most K, and their mean of 1 / log2(rank + 1). MRR@K is the mean of
    1 / rank. All others add 0.
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
    """The metrics of users by rank, (C,), each with its percentile bootstrap interval over users.

    Args:
        count_C: users by rank, (C,).
        ks: cut-offs K, none of them beyond the last place.
        num_resamples: R.
        confidence: share of the resamples that the interval holds.
        seed: of the resamples.

    Source: Efron and Tibshirani 1993, chapter 13. That users drawn with replacement are a multinomial draw of
    counts by rank is ours; it makes the cost depend on ranks, not on users.
    """
    return _bootstrap(count_C, _gains(len(count_C), ks), num_resamples, confidence, seed)


def differences(
    joint_CC: Ints, ks: Sequence[int], *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Estimate]:
    """What the first ranker has more of each metric than the second, with its paired bootstrap interval.

    Both are compared user by user, so what makes users easy or hard for both cancels out.

    Args:
        joint_CC: users by both ranks, (C, C), of `joint_rank_counts`.
        ks, num_resamples, confidence, seed: as in `estimates`.
    """
    gains = {
        name: np.subtract.outer(gain_C, gain_C).ravel() for name, gain_C in _gains(len(joint_CC), ks).items()
    }
    return _bootstrap(joint_CC.ravel(), gains, num_resamples, confidence, seed)


def _gains(num_cells: int, ks: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
    """What a user in each cell adds to the sum of each metric, (C,)."""
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
    """Means of `gains`, each (C,), over the users that are counted, with percentile intervals."""
    # numpy gives the last cell what rounding leaves over, so that must not be an empty one
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
    """Rank of each item by its training events, (N,) int64: 1 for the most, ties by item_index."""
    rank_N = np.empty(len(training_events_N), np.int64)
    rank_N[np.argsort(-training_events_N, kind="stable")] = np.arange(1, len(rank_N) + 1)
    return rank_N


def popularity_groups(training_events_N: Ints) -> npt.NDArray[np.int8]:
    """The tenth that each warm item belongs to by `popularity_ranks`, (N,) int8: 0 the most popular; or `COLD`."""
    warm_N = training_events_N > 0
    tenth_N = (popularity_ranks(training_events_N) - 1) * 10 // max(int(warm_N.sum()), 1)
    return np.where(warm_N, tenth_N, COLD).astype(np.int8)


def targets_in_history(item_E: Ints, lengths_B: Ints, target_B: Ints) -> npt.NDArray[np.bool_]:
    """Is the target in the user's own history? (B,) bool: where histories are masked, those can never be hit.

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
    """What the lists of some users show; those of disjoint users add up."""

    shown_N: npt.NDArray[np.int64]
    """Users to whom each item is shown, (N,); entries that are invalid do not count."""
    users: int
    entries: int
    """Length of all lists together, invalid entries included."""
    short_lists: int
    """Users whose list ends before the last place."""
    entropy_sum: float
    """Sum over users of `category_entropy`."""

    @classmethod
    def of(cls, item_index_BP: Ints, eligible_N: npt.NDArray[np.bool_], category_N: Ints) -> Exposure:
        """Count the entries of lists, and the invalid ones: no eligible item, or a repeat within the list.

        Args:
            item_index_BP: shown items, (B, P); -1 after the last. An index of N or more is no item.
            eligible_N: may the item be recommended? (N,) bool.
            category_N: as in `category_entropy`.
        """
        sorted_BP = np.sort(item_index_BP, axis=1)
        valid_BP = _differs_from_left(sorted_BP) & _looked_up(eligible_N, sorted_BP, False)
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
        """How widely and to what items the lists point.

        Args:
            eligible_N: may the item be recommended? (N,) bool.
            training_events_N: events of each item that training saw, (N,).

        Returns:
            `coverage`, share of the eligible items that somebody is shown; `gini` over the eligible items;
            `popularity_rank`, mean of `popularity_ranks`, and `cold_share`, share of items without a training
            event, both over all valid entries; `invalid_share` of all entries; `short_lists`, users; `entropy`,
            mean over users.
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
    """Gini index of counts (N,): 0 if all are equal, (N - 1) / N if one item has everything; 0 if there are none.

    Source: mean absolute difference over twice the mean, in its form for sorted values.
    """
    num = len(count_N)
    weight_N = 2 * np.arange(1, num + 1) - num - 1
    return float(weight_N @ np.sort(count_N)) / max(num * int(count_N.sum()), 1)


def category_entropy(item_index_BP: Ints, category_N: Ints) -> npt.NDArray[np.float64]:
    """Entropy in nats of the categories in each user's list, (B,) float64; 0 for an empty list.

    Args:
        item_index_BP: the first K items shown, (B, P = K); -1 after the last. A short list is measured as it is.
        category_N: category of each item, (N,); -1 for unknown, which counts as one more category.

    Source: Entropy@K of the paper, its study of diversity; the base of the logarithm is ours.
    """
    num_users, num_places = item_index_BP.shape
    there_BP = item_index_BP >= 0
    category_BP = np.sort(np.where(there_BP, _looked_up(category_N, item_index_BP, -1), -2), axis=1)
    # a run of equal categories never goes on in the next row
    start = np.flatnonzero(_differs_from_left(category_BP))
    length = np.diff(start, append=category_BP.size)
    known = category_BP.ravel()[start] > -2
    user = start[known] // max(num_places, 1)
    share = length[known] / there_BP.sum(axis=1)[user]
    entropy_B = np.bincount(user, weights=-share * np.log(share), minlength=num_users)
    return entropy_B.astype(np.float64)  # numpy gives integers if all lists are empty


def _looked_up(value_N: npt.NDArray[Any], item_index_BP: Ints, other: int) -> npt.NDArray[Any]:
    """Value of each entry, (B, P); `other` where it is no item, be it -1 or N and more."""
    return np.append(value_N, np.asarray(other, value_N.dtype))[np.minimum(item_index_BP, len(value_N))]


def _differs_from_left(sorted_BP: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Does a run of equal values begin here? (B, P) bool."""
    begins_BP = np.ones(sorted_BP.shape, bool)
    begins_BP[:, 1:] = sorted_BP[:, 1:] != sorted_BP[:, :-1]
    return begins_BP
