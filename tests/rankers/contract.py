"""What every ranker promises, as tests that a ranker inherits.

A class of tests for a ranker names how the ranker is built, and inherits the rest:

    class TestMine(RankerContract):
        def ranker(self, rules):
            return Mine(..., rules)

        def tied(self, rules):
            return Mine(..., rules)  # to which all items are equally good
"""

from __future__ import annotations

import numpy as np
import pytest

from tiger_ray.rankers.base import GENERATED, NO_ITEM, Found, Histories, Ranker, Rules

NUM_ITEMS = 36
ELIGIBLE_N = np.arange(NUM_ITEMS) % 5 != 2
"""Items 2, 7, 12, ... must never come out."""

LISTS = [
    [3],
    [8, 8, 8],
    [2, 7],
    list(range(30)),
    [35, 0, 35, 1],
    *(np.random.default_rng(user).integers(0, NUM_ITEMS, 1 + user).tolist() for user in range(8)),
]
"""Histories of one item, with repeats, of ineligible items only, of nearly all items, and some drawn."""


def histories_of(lists: list[list[int]]) -> Histories:
    """Histories of users whose hashes are all different."""
    return Histories.of(lists, np.arange(1, len(lists) + 1, dtype=np.uint64) * np.uint64(2**60 - 93))


def require_shape(found: Found, num_users: int, k: int) -> None:
    """Check everything that holds for lists of any ranker, whoever the users are."""
    for slots in (found.item_BK, found.score_BK, found.source_BK):
        assert slots.shape == (num_users, k)
    assert found.item_BK.dtype == np.int64
    assert found.score_BK.dtype == np.float32
    assert found.source_BK.dtype == np.int8
    there_BK = found.item_BK != NO_ITEM
    assert (there_BK[:, 1:] <= there_BK[:, :-1]).all(), "there is an item after an empty slot"
    assert np.isfinite(found.score_BK[there_BK]).all()
    assert (found.score_BK[~there_BK] == -np.inf).all()
    for item_K in found.item_BK:
        items = item_K[item_K != NO_ITEM]
        assert ((items >= 0) & (items < NUM_ITEMS)).all()
        assert len(set(items)) == len(items), "an item came twice"


class RankerContract:
    """Inherited by the tests of each ranker."""

    empty_history_gets_items = False
    """Whether a user without history gets items."""
    source = GENERATED
    """Source of the slots of a user with history."""
    source_of_empty = GENERATED
    """Source of the slots of a user without."""

    def ranker(self, rules: Rules) -> Ranker:
        """A ranker to which all items differ."""
        raise NotImplementedError

    def tied(self, rules: Rules) -> Ranker:
        """A ranker to which all items are equally good; of Semantic IDs, the lower one has the lower index."""
        raise NotImplementedError

    def left_out(self, history: list[int]) -> set[int]:
        """Items that the ranker never gives this user, whatever the rules."""
        return set()

    def expected(self, history: list[int], rules: Rules) -> set[int]:
        """All items that may come out for a user."""
        left_out = self.left_out(history) | (set(history) if rules.exclude_history else set())
        return set(np.flatnonzero(rules.eligible_N).tolist()) - left_out

    @pytest.mark.parametrize("exclude_history", [False, True])
    def test_every_item_that_the_rules_allow_comes_once_and_no_other(self, exclude_history):
        rules = Rules(ELIGIBLE_N, exclude_history)
        k = NUM_ITEMS + 10
        found = self.ranker(rules).recommend(histories_of(LISTS), k)
        require_shape(found, len(LISTS), k)
        for history, item_K in zip(LISTS, found.item_BK, strict=True):
            assert set(item_K.tolist()) - {NO_ITEM} == self.expected(history, rules)

    @pytest.mark.parametrize("k", [1, 4, NUM_ITEMS])
    @pytest.mark.parametrize("exclude_history", [False, True])
    def test_items_come_best_first_and_a_shorter_list_is_the_beginning(self, k, exclude_history):
        ranker = self.ranker(Rules(ELIGIBLE_N, exclude_history))
        whole = ranker.recommend(histories_of(LISTS), NUM_ITEMS)
        found = ranker.recommend(histories_of(LISTS), k)
        require_shape(found, len(LISTS), k)
        np.testing.assert_array_equal(found.item_BK, whole.first(k).item_BK)
        assert (found.score_BK[:, 1:] <= found.score_BK[:, :-1]).all()
        assert len(np.unique(whole.score_BK[0][whole.item_BK[0] != NO_ITEM])) > NUM_ITEMS / 3, (
            "the scores must differ, or the order says nothing"
        )

    @pytest.mark.parametrize("exclude_history", [False, True])
    def test_of_equal_scores_the_lower_index_comes_first(self, exclude_history):
        rules = Rules(ELIGIBLE_N, exclude_history)
        found = self.tied(rules).recommend(histories_of(LISTS), 6)
        for history, item_K, score_K in zip(LISTS, found.item_BK, found.score_BK, strict=True):
            expected = sorted(self.expected(history, rules))[:6]
            assert item_K.tolist() == expected + [NO_ITEM] * (6 - len(expected))
            assert len(set(score_K[: len(expected)].tolist())) <= 1

    def test_users_get_the_same_items_alone_and_in_any_batch(self):
        ranker = self.ranker(Rules(ELIGIBLE_N, exclude_history=True))
        histories = histories_of([*LISTS, []])
        together = ranker.recommend(histories, 7)
        turned = ranker.recommend(histories.take(slice(None, None, -1)), 7)
        alone = [ranker.recommend(histories.take([user]), 7) for user in range(len(histories))]
        for other in (
            turned.take(slice(None, None, -1)),
            Found(*(np.concatenate([getattr(one, name) for one in alone]) for name in vars(together))),
        ):
            np.testing.assert_array_equal(other.item_BK, together.item_BK)
            np.testing.assert_array_equal(other.source_BK, together.source_BK)
            np.testing.assert_allclose(other.score_BK, together.score_BK, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("empty", [[0], [2], [5], [0, 1, 5], [0, 1, 2, 3, 4, 5]])
    def test_an_empty_history_changes_no_other_user(self, empty):
        lists = [[] if user in empty else LISTS[user] for user in range(6)]
        ranker = self.ranker(Rules(ELIGIBLE_N))
        found = ranker.recommend(histories_of(lists), 5)
        require_shape(found, 6, 5)
        assert (found.item_BK[empty] != NO_ITEM).any() == self.empty_history_gets_items
        assert set(found.source_BK[empty].ravel().tolist()) == {self.source_of_empty}
        others = [user for user in range(6) if user not in empty]
        if others:
            undisturbed = ranker.recommend(histories_of(LISTS[:6]), 5).take(others)
            np.testing.assert_array_equal(found.item_BK[others], undisturbed.item_BK)
            assert set(found.source_BK[others].ravel().tolist()) == {self.source}

    def test_no_users_get_no_lists(self):
        require_shape(self.ranker(Rules(ELIGIBLE_N)).recommend(histories_of([]), 3), 0, 3)

    def test_one_eligible_item_is_the_whole_list(self):
        only = np.arange(NUM_ITEMS) == 11
        found = self.ranker(Rules(only)).recommend(histories_of([[4, 5]]), 3)
        assert found.item_BK.tolist() == [[11, NO_ITEM, NO_ITEM]]
