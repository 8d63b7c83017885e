"""Recall@K and NDCG@K equal a loop that follows their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.evaluation import NOT_RANKED, means, metric_sums, ranks

KS = (1, 3, 10)


def loop_metrics(lists, targets, ks):
    """Means over users by the definitions, one user at a time."""
    totals = {f"{name}@{k}": [] for k in ks for name in ("recall", "ndcg")}
    for ranked, target in zip(lists, targets, strict=True):
        for k in ks:
            gain = 0.0
            for place, item in enumerate(ranked[:k], start=1):
                if item == target:
                    gain = 1 / math.log2(place + 1)
                    break
            totals[f"recall@{k}"].append(1.0 if gain else 0.0)
            totals[f"ndcg@{k}"].append(gain)
    return {name: sum(values) / len(values) for name, values in totals.items()}


@st.composite
def rankings(draw):
    """Lists of distinct items, some of them short and filled with -1, and one target each."""
    width, users = draw(st.integers(1, 10)), draw(st.integers(1, 12))
    lists = [draw(st.permutations(range(12)))[: draw(st.integers(0, width))] for _ in range(users)]
    padded = [ranked + [-1] * (width - len(ranked)) for ranked in lists]
    return padded, [draw(st.integers(0, 11)) for _ in range(users)]


@given(rankings(), st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_metrics_of_any_two_parts_equal_the_loop_over_all_users(case, cut):
    lists, targets = case
    found, target = np.array(lists, np.int64), np.array(targets, np.int64)
    sums = [
        metric_sums(ranks(found[part], target[part]), KS) for part in (slice(None, cut), slice(cut, None))
    ]
    ours = means(sums)
    assert ours.pop("users") == len(targets)
    expected = loop_metrics(lists, targets, KS)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=0, abs=1e-12), name


def test_known_ranks():
    found = np.array([[5, 6, 7], [5, 6, 7], [5, -1, -1], [9, 9, 5], [-1, -1, -1]])
    assert ranks(found, np.array([5, 7, 7, 9, 0])).tolist() == [1, 3, NOT_RANKED, 1, NOT_RANKED]


def test_known_metrics():
    sums = metric_sums(np.array([1, 2, 3, 11]), (1, 2, 10))
    assert sums["users"] == 4
    assert [sums[f"recall@{k}"] for k in (1, 2, 10)] == [1, 2, 3]
    assert sums["ndcg@1"] == 1
    assert sums["ndcg@10"] == pytest.approx(1 + 1 / math.log2(3) + 0.5, abs=1e-15)


def test_a_target_that_is_not_in_the_list_is_a_miss_at_every_k():
    sums = metric_sums(ranks(np.array([[1, 2]]), np.array([3])), (2,))
    assert (sums["recall@2"], sums["ndcg@2"]) == (0, 0)


def test_no_user_gives_zeros_and_no_division_by_zero():
    nobody = metric_sums(ranks(np.zeros((0, 5), np.int64), np.zeros(0, np.int64)), (5,))
    assert means([nobody, nobody]) == {"users": 0, "recall@5": 0.0, "ndcg@5": 0.0}
