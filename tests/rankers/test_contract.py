"""Every ranker keeps the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.rankers.contract import ELIGIBLE_N, LISTS, NUM_ITEMS, RankerContract, histories_of
from tests.tiny_models import tiny_model
from tiger_ray.model.sasrec import SasrecModel
from tiger_ray.rankers.base import FALLBACK, Histories, Rules
from tiger_ray.rankers.fallback import FallbackRanker
from tiger_ray.rankers.neighbours import Neighbours
from tiger_ray.rankers.popularity import Popularity
from tiger_ray.rankers.sasrec import Sasrec
from tiger_ray.rankers.tiger import TigerRanker
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.sasrec import SasrecSettings

CODES_NI = np.array(list(np.ndindex(4, 3, 3)), np.int16)
"""Semantic IDs in the order of item_index."""


def with_weights(model, value=None):
    """The model with all weights at one value, or far enough from each other to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value) if value is not None else weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def tiger(model, rules):
    return TigerRanker(
        model, "cpu", codes_NI=CODES_NI, rules=rules, decoding=DecodingSettings(beam_width=2 * NUM_ITEMS)
    )


class TestTiger(RankerContract):
    def ranker(self, rules):
        return tiger(with_weights(tiny_model((4, 3, 3))), rules)

    def tied(self, rules):
        return tiger(with_weights(tiny_model((4, 3, 3)), 0.0), rules)


class TestPopularity(RankerContract):
    empty_history_gets_items = True

    def ranker(self, rules):
        return Popularity(np.random.default_rng(0).permutation(NUM_ITEMS) + 1, rules)

    def tied(self, rules):
        return Popularity(np.full(NUM_ITEMS, 3), rules)


class TestNeighbours(RankerContract):
    def ranker(self, rules):
        embedding_ND = np.random.default_rng(0).normal(size=(NUM_ITEMS, 5)).astype(np.float32)
        return Neighbours(embedding_ND, rules)

    def tied(self, rules):
        return Neighbours(np.ones((NUM_ITEMS, 4), np.float32), rules)

    def left_out(self, history):
        return {history[-1]}


def sasrec_model():
    settings = SasrecSettings(d_model=8, num_heads=2, d_ff=12, max_history=5, dropout=0.0)
    return SasrecModel(settings, NUM_ITEMS).eval()


class TestSasrec(RankerContract):
    def ranker(self, rules):
        return Sasrec(with_weights(sasrec_model()), "cpu", rules=rules)

    def tied(self, rules):
        return Sasrec(with_weights(sasrec_model(), 0.0), "cpu", rules=rules)


class TestFallback(RankerContract):
    empty_history_gets_items = True
    source_of_empty = FALLBACK

    def ranker(self, rules):
        return FallbackRanker(TestTiger().ranker(rules), TestPopularity().ranker(rules))

    def tied(self, rules):
        return FallbackRanker(TestTiger().tied(rules), TestPopularity().tied(rules))

    def test_a_user_without_history_gets_the_popular_items_with_their_scores(self):
        rules = Rules(ELIGIBLE_N)
        found = self.ranker(rules).recommend(histories_of([[], LISTS[0], []]), 4)
        popular = TestPopularity().ranker(rules).recommend(histories_of([[], []]), 4)
        np.testing.assert_array_equal(found.item_BK[[0, 2]], popular.item_BK)
        np.testing.assert_array_equal(found.score_BK[[0, 2]], popular.score_BK)
        own = TestTiger().ranker(rules).recommend(histories_of([[], LISTS[0], []]), 4)
        np.testing.assert_array_equal(found.item_BK[1], own.item_BK[1])
        np.testing.assert_array_equal(found.score_BK[1], own.score_BK[1])


# What only TIGER promises


@pytest.mark.parametrize(
    ("buckets", "sample"), [(0, True), (3, False), (3, True)], ids=["drawn", "user token", "both"]
)
def test_a_model_that_tells_users_apart_follows_the_hash_of_the_user(buckets, sample):
    decoding = DecodingSettings(beam_width=2 * NUM_ITEMS, sample=sample)
    model = with_weights(tiny_model((4, 3, 3), num_user_buckets=buckets))
    rules = Rules(ELIGIBLE_N)
    ranker, other = (
        TigerRanker(model, "cpu", codes_NI=CODES_NI, rules=rules, decoding=decoding, seed=seed)
        for seed in (0, 1)
    )
    histories = Histories.of([[3, 4]] * 30, np.arange(30, dtype=np.uint64) * np.uint64(2**59 - 55))
    found = ranker.recommend(histories, 5)
    assert len(np.unique(found.item_BK, axis=0)) >= (10 if sample else 2)
    np.testing.assert_array_equal(
        ranker.recommend(histories.take(slice(None, None, -1)), 5).item_BK[::-1], found.item_BK
    )
    same = (other.recommend(histories, 5).item_BK == found.item_BK).all()
    assert same == (not sample), "only a draw follows the seed"
    with pytest.raises(AssertionError, match="histories need user_hash_B"):
        ranker.recommend(Histories.of([[3, 4]]), 5)
