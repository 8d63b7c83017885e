"""Every metric equals a loop that follows its definition, parts add up to the whole, and intervals hold what they say."""

import json
import math
from collections import Counter
from fractions import Fraction
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.evaluation.metrics import (
    COLD,
    NOT_RANKED,
    Estimate,
    Exposure,
    category_entropy,
    differences,
    estimates,
    gini,
    grouped_rank_counts,
    joint_rank_counts,
    metrics,
    popularity_groups,
    popularity_ranks,
    rank_counts,
    ranks,
    share_found,
    targets_in_history,
)

pytestmark = pytest.mark.filterwarnings("error")
KS = (1, 3, 10)
PLACES = 10
NUM_ITEMS = 9


# Loops over users, by the definitions


def loop_rank(ranked, target):
    """Place of the target, or None."""
    items = [item for item in ranked if item != -1]
    return items.index(target) + 1 if target in items else None


def loop_metrics(found_ranks, ks=KS):
    """Means over users, one user at a time."""
    totals = {f"{name}@{k}": 0.0 for k in ks for name in ("recall", "ndcg", "mrr")}
    for rank in found_ranks:
        for k in ks:
            if rank is not None and rank <= k:
                totals[f"recall@{k}"] += 1
                totals[f"ndcg@{k}"] += 1 / math.log2(rank + 1)
                totals[f"mrr@{k}"] += 1 / rank
    users = len(found_ranks)
    return {"users": users, **{name: total / max(users, 1) for name, total in totals.items()}}


def loop_entropy(ranked, category):
    """Entropy of the categories of one list."""
    known = [category[item] if item < NUM_ITEMS else -1 for item in ranked if item != -1]
    shares = [count / len(known) for count in Counter(known).values()]
    return sum(share * math.log(1 / share) for share in shares)


def loop_exposure(lists, eligible, category, events):
    shown, valid, invalid = Counter(), [], 0
    for ranked in lists:
        items = [item for item in ranked if item != -1]
        for place, item in enumerate(items):
            if item < NUM_ITEMS and eligible[item] and item not in items[:place]:
                shown[item] += 1
                valid.append(item)
            else:
                invalid += 1
    may = [item for item in range(NUM_ITEMS) if eligible[item]]
    apart = sum(abs(shown[one] - shown[other]) for one in may for other in may)
    order = sorted(range(NUM_ITEMS), key=lambda item: (-events[item], item))
    return {
        "coverage": sum(shown[item] > 0 for item in may) / max(len(may), 1),
        "gini": apart / max(2 * len(may) * len(valid), 1),
        "popularity_rank": sum(order.index(item) + 1 for item in valid) / max(len(valid), 1),
        "cold_share": sum(events[item] == 0 for item in valid) / max(len(valid), 1),
        "invalid_share": invalid / max(len(valid) + invalid, 1),
        "short_lists": sum(-1 in ranked for ranked in lists),
        "entropy": sum(loop_entropy(ranked, category) for ranked in lists) / max(len(lists), 1),
    }


# Cases


generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def lists_of(rng, users, width, num_items=NUM_ITEMS):
    """Lists with repeated items, most of them short and filled with -1, (users, width)."""
    found = rng.integers(num_items, size=(users, width))
    found[np.arange(width) >= rng.integers(width + 1, size=(users, 1))] = -1
    return found


@st.composite
def rankings(draw):
    """Lists of two rankers, narrower than some K or not, and one target and one group for each user."""
    users, wide, narrow, rng = (
        draw(each) for each in (st.integers(0, 10), st.integers(1, 12), st.integers(0, 4), generators)
    )
    found = lists_of(rng, users, wide), lists_of(rng, users, narrow)
    return found, rng.integers(NUM_ITEMS, size=users), rng.integers(13, size=users).astype(np.int8)


@st.composite
def shelves(draw):
    """Lists, some of them with numbers that are no item; eligibility, category and training events of each item."""
    users, width, rng = draw(st.integers(0, 8)), draw(st.integers(1, 6)), draw(generators)
    eligible, category = rng.random(NUM_ITEMS) < rng.random(), rng.integers(-1, 4, NUM_ITEMS)
    return lists_of(rng, users, width, NUM_ITEMS + 2), eligible, category, rng.integers(4, size=NUM_ITEMS)


def parts_of(cut):
    return slice(None, cut), slice(cut, None)


# Accuracy


@given(rankings(), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_metrics_of_any_two_parts_equal_the_loop_over_all_users(case, cut):
    found, target, _ = case
    for found_BP in found:
        counts = [rank_counts(ranks(found_BP[part], target[part]), PLACES) for part in parts_of(cut)]
        by_loop = [loop_rank(*user) for user in zip(found_BP.tolist(), target.tolist(), strict=True)]
        assert metrics(sum(counts), KS) == pytest.approx(loop_metrics(by_loop), rel=0, abs=1e-9)


@given(rankings(), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_counts_by_group_and_by_pair_of_ranks_are_those_of_their_users(case, cut):
    found, target, group = case
    one, other = (ranks(found_BP, target) for found_BP in found)
    parts = parts_of(cut)
    grouped = sum(grouped_rank_counts(one[part], PLACES, group[part], 14) for part in parts)
    assert grouped.shape == (14, PLACES + 1)
    for number, counts in enumerate(grouped):
        assert counts.tolist() == rank_counts(one[group == number], PLACES).tolist()

    joint = sum(joint_rank_counts(one[part], other[part], PLACES) for part in parts)
    cells = [[min(rank, PLACES + 1) - 1 for rank in both.tolist()] for both in (one, other)]
    expected = Counter(zip(*cells, strict=True))
    assert {cell: joint[cell] for cell in zip(*np.nonzero(joint), strict=True)} == expected

    theirs, ours = metrics(rank_counts(other, PLACES), KS), metrics(rank_counts(one, PLACES), KS)
    for name, difference in differences(joint, KS, num_resamples=2).items():
        assert difference.value == pytest.approx(ours[name] - theirs[name], rel=0, abs=1e-9)


def test_known_ranks():
    found = np.array([[5, 6, 7], [5, 6, 7], [5, -1, -1], [9, 9, 5], [-1, -1, -1]])
    assert ranks(found, np.array([5, 7, 7, 9, 0])).tolist() == [1, 3, NOT_RANKED, 1, NOT_RANKED]


def test_known_metrics():
    found = metrics(rank_counts(np.array([1, 2, 3, 11]), 20), (1, 2, 10))
    assert found["users"] == 4
    assert [found[f"recall@{k}"] for k in (1, 2, 10)] == [0.25, 0.5, 0.75]
    assert (found["ndcg@1"], found["mrr@1"]) == (0.25, 0.25)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3) + 0.5) / 4, abs=1e-15)
    assert found["mrr@10"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4, abs=1e-15)


def test_a_target_that_is_not_in_the_list_is_a_miss_at_every_k():
    counts = rank_counts(ranks(np.array([[1, 2]]), np.array([3])), 3)
    assert counts.tolist() == [0, 0, 0, 1]
    assert set(metrics(counts, (2, 3)).values()) == {0, 1}, "one user, and nothing else"


def test_ranks_beyond_the_places_that_are_counted_are_misses():
    assert rank_counts(np.array([1, 2, 3, NOT_RANKED]), 2).tolist() == [1, 1, 2]
    with pytest.raises(AssertionError, match="up to rank 2, and K is 3"):
        metrics(np.array([1, 1, 2]), (1, 3))


def test_no_user_gives_zeros_and_no_division_by_zero():
    nobody = rank_counts(ranks(np.zeros((0, 5), np.int64), np.zeros(0, np.int64)), 5)
    assert metrics(nobody, (5,)) == {"users": 0, "recall@5": 0, "ndcg@5": 0, "mrr@5": 0}
    assert set(estimates(nobody, (5,)).values()) == {Estimate(0, 0, 0)}
    nothing = Exposure.of(np.zeros((0, 5), np.int64), np.ones(3, bool), np.zeros(3, np.int64))
    assert set(nothing.metrics(np.ones(3, bool), np.zeros(3, np.int64)).values()) == {0}


@given(
    st.lists(st.tuples(*[st.lists(st.integers(0, 7), unique=True, max_size=5)] * 2), min_size=1, max_size=6)
)
def test_the_share_found_is_that_of_the_sets_of_each_user(users):
    def filled(lists):
        return np.array([items + [-1] * (5 - len(items)) for items in lists])

    found, sought = zip(*users, strict=True)
    expected = [len({*f} & {*s}) / len(s) if s else 1.0 for f, s in users]
    assert share_found(filled(found), filled(sought)).tolist() == expected


def test_history_lengths_fall_into_the_groups_between_the_edges():
    group = np.digitize([1, 4, 5, 9, 10, 400], (5, 10))
    counts = grouped_rank_counts(np.ones(6, np.int64), 1, group, 3)
    assert counts[:, 0].tolist() == [2, 2, 2]


# Intervals


def planted_counts(shares, users):
    """Users by rank, the rest missed."""
    hits = [round(share * users) for share in shares]
    return np.array([*hits, users - sum(hits)])


COUNTS = planted_counts([0.08, 0.05, 0.04, 0.02, 0.0, 0.01], 500)


def test_intervals_are_those_of_users_drawn_with_replacement():
    num_resamples = 4000
    rank_B = np.repeat(np.arange(1, len(COUNTS) + 1), COUNTS)
    place_RB = np.random.default_rng(1).integers(len(rank_B), size=(num_resamples, len(rank_B)))
    ndcg_B = np.where(rank_B <= 6, 1 / np.log2(rank_B + 1), 0)
    for name, gain_B in (("recall@3", (rank_B <= 3) * 1.0), ("ndcg@6", ndcg_B)):
        mean_R = gain_B[place_RB].mean(axis=1)
        error = gain_B.std() / math.sqrt(len(rank_B))
        assert mean_R.std() == pytest.approx(error, rel=0.05)
        for confidence, z in ((0.0, 0.0), (0.5, 0.674), (0.95, 1.96)):
            low, high = np.quantile(mean_R, [(1 - confidence) / 2, (1 + confidence) / 2])
            found = estimates(COUNTS, (3, 6), num_resamples=num_resamples, confidence=confidence)[name]
            # four times the sampling error of the difference of two quantiles, and one user of the 500
            tolerance = 0.17 * error + 1 / len(rank_B) * (name == "recall@3")
            assert (found.low, found.high) == pytest.approx((low, high), abs=tolerance)
            assert found.high - found.low == pytest.approx(2 * z * error, abs=2 * tolerance)


def test_the_interval_of_recall_is_that_of_the_binomial_distribution():
    half = Estimate(0.5, 0.40, 0.60)
    found = estimates(np.array([50, 50]), (1,), num_resamples=20_000)["recall@1"]
    assert (found.value, found.low, found.high) == pytest.approx((half.value, half.low, half.high))


def test_where_all_users_are_alike_the_interval_has_no_width():
    assert set(estimates(np.array([7, 0, 0]), (1, 2)).values()) == {Estimate(1, 1, 1)}
    second = estimates(np.array([0, 7, 0]), (2,))
    assert second["mrr@2"] == Estimate(0.5, 0.5, 0.5)
    assert set(estimates(np.array([0, 0, 7]), (1, 2)).values()) == {Estimate(0, 0, 0)}


def test_a_hundred_times_the_users_have_a_tenth_of_the_interval():
    small, large = (estimates(COUNTS * times, (6,), num_resamples=4000) for times in (1, 100))
    for name, few in small.items():
        many = large[name]
        assert many.value == pytest.approx(few.value, abs=1e-12)
        assert (few.high - few.low) / (many.high - many.low) == pytest.approx(10, rel=0.1)


def test_a_seed_gives_the_same_interval_again_and_more_confidence_a_wider_one():
    again = [estimates(COUNTS, KS[:2], seed=seed) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    narrow, wide = (estimates(COUNTS, (6,), confidence=share) for share in (0.8, 0.99))
    for name, inner in narrow.items():
        assert wide[name].low < inner.low < inner.value < inner.high < wide[name].high


# Two rankers on the same users


def test_a_ranker_differs_from_itself_by_nothing():
    rank_B = np.repeat(np.arange(1, len(COUNTS) + 1), COUNTS)
    found = differences(joint_rank_counts(rank_B, rank_B, 6), (1, 6))
    assert set(found.values()) == {Estimate(0, 0, 0)}
    assert not any(difference.excludes_zero for difference in found.values())


def test_rankers_that_are_equally_good_on_different_users_do_not_differ():
    rank_B = np.repeat(np.arange(1, len(COUNTS) + 1), COUNTS)
    joint = joint_rank_counts(rank_B, np.random.default_rng(0).permutation(rank_B), 6)
    for name, difference in differences(joint, (1, 6)).items():
        assert difference.value == pytest.approx(0, abs=1e-12)
        assert difference.low < 0 < difference.high, name


def test_a_winner_whose_interval_overlaps_the_losers_is_found_by_comparing_user_by_user():
    winner = np.repeat([1, NOT_RANKED], [400, 1600])
    loser = np.repeat([1, NOT_RANKED], [380, 1620])
    ours, theirs = (estimates(rank_counts(rank_B, 1), (1,))["recall@1"] for rank_B in (winner, loser))
    assert theirs.low < ours.low < theirs.high < ours.high
    difference = differences(joint_rank_counts(winner, loser, 1), (1,))["recall@1"]
    assert difference.value == pytest.approx(0.01)
    assert difference.low > 0.005
    assert difference.excludes_zero
    backwards = differences(joint_rank_counts(loser, winner, 1), (1,))["recall@1"]
    assert backwards.high < 0
    assert backwards.excludes_zero


def test_a_paired_interval_is_that_of_the_differences_of_users():
    rng = np.random.default_rng(5)
    one = rng.integers(1, 9, 400)
    other = np.where(rng.random(400) < 0.6, one, rng.integers(1, 9, 400))
    gain_B = 1 / one * (one <= 5) - 1 / other * (other <= 5)
    found = differences(joint_rank_counts(one, other, 6), (5,), num_resamples=10_000)["mrr@5"]
    error = gain_B.std() / math.sqrt(400)
    assert found.value == pytest.approx(gain_B.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (gain_B.mean() - 1.96 * error, gain_B.mean() + 1.96 * error), abs=0.14 * error
    )


# Groups


@given(st.lists(st.integers(0, 5), max_size=40))
@settings(max_examples=60, deadline=None)
def test_popularity_counts_from_the_most_trained_item_and_tenths_are_of_warm_items(events):
    order = sorted(range(len(events)), key=lambda item: (-events[item], item))
    warm = [item for item in order if events[item] > 0]
    group = popularity_groups(np.array(events, np.int64))
    for place, item in enumerate(order):
        assert popularity_ranks(np.array(events, np.int64))[item] == place + 1
        if events[item]:
            tenth = Fraction(int(group[item]), 10)
            assert tenth <= Fraction(place, len(warm)) < tenth + Fraction(1, 10)
        else:
            assert group[item] == COLD


def test_tenths_hold_equally_many_items_and_no_cold_one():
    group = popularity_groups(np.arange(400, -1, -2).repeat(2))
    assert np.bincount(group).tolist() == [40] * 10 + [2]
    assert (group[0], group[-3], group[-1]) == (0, 9, COLD)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 5)),
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_target_is_in_the_history_of_its_own_user_or_it_is_not(users):
    items = np.array([item for history, _ in users for item in history], np.int32)
    lengths = np.array([len(history) for history, _ in users], np.int64)
    found = targets_in_history(items, lengths, np.array([target for _, target in users], np.int64))
    assert found.tolist() == [target in history for history, target in users]


# What is shown


@given(shelves(), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_exposure_of_any_two_parts_equals_the_loop_over_all_users(case, cut):
    found, eligible, category, events = case
    both = reduce(add, [Exposure.of(found[part], eligible, category) for part in parts_of(cut)])
    assert (both.users, both.entries) == (len(found), (found != -1).sum())
    ours = both.metrics(eligible, events)
    assert ours == pytest.approx(loop_exposure(found.tolist(), eligible, category, events), rel=0, abs=1e-9)
    assert json.loads(json.dumps(ours)) == ours


@given(shelves())
@settings(max_examples=60, deadline=None)
def test_entropy_of_every_user_equals_the_loop(case):
    found, _, category, _ = case
    entropy = category_entropy(found, category)
    assert entropy.dtype == np.float64
    by_loop = [loop_entropy(ranked, category) for ranked in found.tolist()]
    assert entropy == pytest.approx(by_loop, rel=0, abs=1e-9)


def test_known_exposure():
    found = np.array([[0, 1, 2], [0, 0, 3], [4, -1, -1]])
    eligible, events = np.array([1, 1, 1, 0, 1, 1], bool), np.array([5, 9, 5, 7, 0, 0])
    exposure = Exposure.of(found, eligible, np.array([0, 1, 2, 3, 4, 5]))
    assert exposure.shown_N.tolist() == [2, 1, 1, 0, 1, 0]
    assert (exposure.users, exposure.entries, exposure.short_lists) == (3, 7, 1)
    assert exposure.metrics(eligible, events) == pytest.approx(
        {
            "coverage": 4 / 5,
            "gini": (-4 * 0 - 2 * 1 + 0 * 1 + 2 * 1 + 4 * 2) / (5 * 5),
            "popularity_rank": (3 + 3 + 1 + 4 + 5) / 5,
            "cold_share": 1 / 5,
            "invalid_share": 2 / 7,
            "short_lists": 1,
            "entropy": (math.log(3) + 2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)) / 3,
        }
    )


@pytest.mark.parametrize("num_items", [1, 2, 7])
def test_gini_is_zero_for_equal_counts_and_largest_for_one_item_alone(num_items):
    assert gini(np.full(num_items, 3)) == 0
    assert gini(np.array([5] + [0] * (num_items - 1))) == pytest.approx((num_items - 1) / num_items)
    assert gini(np.zeros(num_items, np.int64)) == 0


def test_gini_at_the_size_of_the_largest_catalogs_is_exact():
    count_N = np.zeros(2_000_000, np.int64)
    count_N[:1_000_000] = 10_000
    assert gini(count_N) == 0.5


def test_entropy_is_zero_for_one_category_and_the_logarithm_of_many_equal_ones():
    category = np.array([0, 0, 0, 0, 1, 2, 3, -1])
    lists = [[0, 1, 2, 3], [0, 4, 5, 6], [0, 1, 4, -1], [4, 5, 6, 7], [7, 7, 7, 7], [-1, -1, -1, -1]]
    expected = [0, math.log(4), math.log(3) - 2 / 3 * math.log(2), math.log(4), 0, 0]
    assert category_entropy(np.array(lists), category) == pytest.approx(expected, abs=1e-12)
