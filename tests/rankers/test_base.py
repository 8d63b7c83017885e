"""Histories and found items are cut, put together and ordered as loops over lists would."""

import doctest

import numpy as np
import pytest

from tiger_ray.rankers import base, fallback, neighbours, popularity, sasrec
from tiger_ray.rankers.base import FALLBACK, GENERATED, Found, Histories

LISTS = [[7, 3, 7], [], [5], [1, 2, 3, 4], []]
HASHES = np.array([9, 8, 7, 6, 5], np.uint64)


def test_histories_of_lists_are_the_lists_again():
    histories = Histories.of(LISTS, HASHES)
    assert histories.lists() == LISTS
    assert len(histories) == 5
    assert (histories.item_index_E.dtype, histories.lengths_B.dtype) == (np.int32, np.int64)
    assert Histories.of([]).lists() == []


@pytest.mark.parametrize(
    ("users", "places"),
    [
        ([3, 0, 3], [3, 0, 3]),
        (np.array([True, True, False, False, True]), [0, 1, 4]),
        (slice(1, 4), [1, 2, 3]),
        ([], []),
    ],
)
def test_taken_users_keep_their_histories_and_hashes(users, places):
    taken = Histories.of(LISTS, HASHES).take(users)
    assert taken.lists() == [LISTS[place] for place in places]
    assert taken.user_hash_B.tolist() == [9 - place for place in places]
    assert Histories.of(LISTS).take(users).user_hash_B is None


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_the_newest_events_are_the_last_of_each_history(count):
    newest = Histories.of(LISTS, HASHES).newest(count)
    assert newest.lists() == [items[max(0, len(items) - count) :] for items in LISTS]
    assert newest.user_hash_B.tolist() == HASHES.tolist()


def test_best_first_orders_a_draw_by_score_and_leaves_empty_slots_last():
    found = Found(
        np.array([[4, 7, 1, -1]]),
        np.array([[-2.0, -1.0, -2.0, -np.inf]], np.float32),
        np.array([[0, 1, 0, 0]], np.int8),
    ).best_first()
    assert found.item_BK.tolist() == [[7, 4, 1, -1]]
    assert found.score_BK.tolist() == [[-1.0, -2.0, -2.0, -np.inf]]
    assert found.source_BK.tolist() == [[1, 0, 0, 0]]


def test_what_is_put_replaces_the_slots_of_these_users_and_leaves_the_others():
    nothing = Found.nothing(3, 2)
    part = Found.of(np.array([[5, 6]]), np.zeros((1, 2), np.float32), FALLBACK)
    found = nothing.put(np.array([False, True, False]), part)
    assert found.item_BK.tolist() == [[-1, -1], [5, 6], [-1, -1]]
    assert found.source_BK.tolist() == [[GENERATED] * 2, [FALLBACK] * 2, [GENERATED] * 2]
    assert found.take([1]).first(1).item_BK.tolist() == [[5]]
    assert (nothing.item_BK == -1).all(), "put must not change the values that it begins with"


@pytest.mark.parametrize("module", [base, fallback, neighbours, popularity, sasrec])
def test_the_examples_of_the_docstrings_say_what_comes_out(module):
    tried = doctest.testmod(module, extraglobs={"Histories": Histories, "Rules": base.Rules})
    assert tried.attempted
    assert not tried.failed
