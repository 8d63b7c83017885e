import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_models
from tests.tiny_models import histories_of, split
from tiger_ray.core import hashing
from tiger_ray.core.arrays import ranges
from tiger_ray.decoding import trie
from tiger_ray.decoding.beam_search import beam_search, best_places
from tiger_ray.decoding.cuda_graphs import pad_to_shape, power_of_two
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.decoding.inference import InferenceModel
from tiger_ray.decoding.sampling import Draw, gumbel, splitmix64
from tiger_ray.decoding.trie import Barred, Trie
from tiger_ray.errors import ArtifactError
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.model import ModelSettings

LEVEL_SIZES = (4, 3, 3, 2)
tiny_model = partial(tiny_models.tiny_model, LEVEL_SIZES, num_user_buckets=0)
catalog_of = partial(tiny_models.catalog_of, LEVEL_SIZES)
MODEL = tiny_model()
TABLE_BYTES = (0, trie.MAX_TABLE_BYTES)
"""Children of all levels as lists, or as tables, which is what so few codewords get otherwise."""


def score_every_item(model: TigerModel, codes_NI: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Log-probability of each item after one history, by the model's forward alone, (N,)."""
    token_NI = model.vocabulary.item_tokens(codes_NI)
    history_NT = token_NI[history.astype(np.int64)].reshape(1, -1).expand(len(codes_NI), -1)
    with torch.no_grad():
        logits_NIV = model.logits(history_NT, token_NI)
        if model.settings.softmax == "level":
            for level, (first, size) in enumerate(
                zip(model.vocabulary.offsets, model.vocabulary.level_sizes, strict=True)
            ):
                logits_NIV[:, level, :first] = logits_NIV[:, level, first + size :] = -torch.inf
    return logits_NIV.log_softmax(-1).gather(-1, token_NI[..., None]).sum((1, 2)).numpy()


MODELS = [
    tiny_model(softmax=softmax, tie_embeddings=tied)
    for softmax in ("vocabulary", "level")
    for tied in (True, False)
]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 72),
    st.floats(0.05, 1.0),
    st.booleans(),
    st.sampled_from(MODELS),
    st.sampled_from(TABLE_BYTES),
)
def test_beam_search_equals_exhaustive_scoring_on_tiny_catalogs(
    seed, num_items, share, exclude_history, model, table_bytes
):
    codes_NI = catalog_of(seed, num_items)
    eligible_N = np.random.default_rng(seed).random(num_items) < share
    eligible_N[seed % num_items] = True
    item_index, lengths_B = histories_of(seed, 3, num_items)

    with mock.patch.object(trie, "MAX_TABLE_BYTES", table_bytes):
        decoder = Decoder(model, codes_NI, eligible_N, DecodingSettings(beam_width=72))
    found_BK, score_BK = decoder.recommend(item_index, lengths_B, None, 72, exclude_history=exclude_history)

    for user, history in enumerate(split(item_index, lengths_B)):
        expected_N = score_every_item(model, codes_NI, history)
        allowed_N = eligible_N.copy()
        if exclude_history:
            allowed_N[history] = False
        count = allowed_N.sum()
        assert set(found_BK[user, :count]) == set(np.flatnonzero(allowed_N))
        assert (found_BK[user, count:] == -1).all()
        assert (score_BK[user, count:] == -np.inf).all()
        np.testing.assert_allclose(score_BK[user, :count], expected_N[found_BK[user, :count]], atol=1e-4)
        assert (np.diff(score_BK[user, :count]) <= 0).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("exclude_history", [False, True])
def test_no_item_is_ineligible_or_twice_or_out_of_order(precision, exclude_history):
    codes_NI = catalog_of(3, 60)
    eligible_N = np.arange(60) % 3 > 0
    item_index, lengths_B = histories_of(3, 30, 60)
    decoder = Decoder(MODEL, codes_NI, eligible_N, DecodingSettings(beam_width=12, precision=precision))
    found_BK, score_BK = decoder.recommend(item_index, lengths_B, None, 12, exclude_history=exclude_history)
    assert found_BK.dtype == np.int64
    assert score_BK.dtype == np.float32
    for user, history in enumerate(split(item_index, lengths_B)):
        assert eligible_N[found_BK[user]].all()
        assert len(set(found_BK[user])) == 12
        assert not exclude_history or not set(found_BK[user]) & set(history)
    assert (np.diff(score_BK, axis=1) <= 0).all()


def test_excluded_items_cost_no_place_in_the_beam():
    """A user who had nearly everything still gets as many items as are left, with a beam that narrow."""
    codes_NI = catalog_of(4, 72)
    every_N = np.arange(72, dtype=np.int32)
    left = {3, 30, 41, 70}
    history = np.array([item for item in every_N if item not in left], np.int32)
    decoder = Decoder(MODEL, codes_NI, np.ones(72, bool), DecodingSettings(beam_width=4))
    found_BK, _ = decoder.recommend(np.tile(history, 2), np.array([68, 68]), None, 4, exclude_history=True)
    assert set(found_BK[0]) == set(found_BK[1]) == left


def test_a_user_gets_the_same_alone_and_among_others():
    model = tiny_model(num_user_buckets=10, max_history=4)
    codes_NI = catalog_of(5, 50)
    item_index, lengths_B = histories_of(5, 23, 50, longest=9)
    buckets_B = np.arange(23) % 10
    decoding = DecodingSettings(beam_width=8, batch_tokens=120)
    decoder = Decoder(model, codes_NI, np.ones(50, bool), decoding)
    found_BK, score_BK = decoder.recommend(item_index, lengths_B, buckets_B, 6)
    assert found_BK.shape == (23, 6)
    for user, history in enumerate(split(item_index, lengths_B)):
        found, score = decoder.recommend(history, lengths_B[user : user + 1], buckets_B[user : user + 1], 6)
        assert found[0].tolist() == found_BK[user].tolist()
        np.testing.assert_allclose(score[0], score_BK[user], atol=1e-4)


def test_only_the_last_max_history_items_are_read_and_the_bucket_is():
    model = tiny_model(num_user_buckets=10, max_history=3)
    decoder = Decoder(model, catalog_of(6, 50), np.ones(50, bool), DecodingSettings(beam_width=8))
    history = np.array([9, 8, 7, 1, 2, 3], np.int32)
    _, whole = decoder.recommend(history, np.array([6]), np.array([4]), 8)
    _, tail = decoder.recommend(history[3:], np.array([3]), np.array([4]), 8)
    _, other_tail = decoder.recommend(history[:3], np.array([3]), np.array([4]), 8)
    _, other_user = decoder.recommend(history[3:], np.array([3]), np.array([5]), 8)
    np.testing.assert_array_equal(whole, tail)
    assert not np.allclose(whole, other_tail)
    assert not np.allclose(whole, other_user)


def test_the_same_users_get_the_same_bytes_again():
    codes_NI = catalog_of(7, 60)
    item_index, lengths_B = histories_of(7, 20, 60)
    first, second = (
        Decoder(MODEL, codes_NI, np.ones(60, bool), DecodingSettings(beam_width=9)).recommend(
            item_index, lengths_B, None, 9
        )
        for _ in range(2)
    )
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


def test_a_model_of_another_id_space_is_refused():
    with pytest.raises(ArtifactError, match="different ID spaces"):
        Decoder(MODEL, np.full((3, 4), 9, np.int16), np.ones(3, bool), DecodingSettings())


@dataclass
class FixedState:
    level: int = 0

    def reorder(self, beam_BW: torch.Tensor) -> None:
        """Nothing depends on the past."""


class FixedModel:
    """Knows one row of log-probabilities per level, whatever the history."""

    def __init__(self, *log_prob_C: list[float]) -> None:
        self.log_prob = [torch.tensor(row) for row in log_prob_C]
        self.vocabulary = Vocabulary(tuple(len(row) for row in log_prob_C))

    def start(self, history_BT: torch.Tensor) -> FixedState:
        return FixedState()

    def next_log_probs(self, token_BW: torch.Tensor, state: FixedState) -> torch.Tensor:
        state.level += 1
        return self.log_prob[state.level - 1].expand(*token_BW.shape, -1)


def search(model: FixedModel, codes: list[tuple[int, ...]], width: int) -> tuple[list[int], list[float]]:
    trie = Trie.build(np.array(codes, np.int16), np.ones(len(codes), bool))
    found_BW, score_BW = beam_search(model, trie, torch.ones(1, 1, dtype=torch.int64), width)
    return found_BW[0].tolist(), score_BW[0].tolist()


def test_equal_scores_come_in_the_order_of_the_semantic_ids():
    codes = [(1, 1), (0, 2), (1, 0), (0, 0), (2, 1), (0, 1)]
    assert search(FixedModel([-1.0] * 3, [-1.0] * 3), codes, 4)[0] == [3, 5, 1, 2]
    # the beams arrive by score, first (2,) and then (0,), yet (0, 0) ties with (2, 1) and comes first
    assert search(FixedModel([-2.0, -9.0, -1.0], [-1.0, -9.0, -2.0]), [(2, 2), (0, 0), (1, 0)], 2) == (
        [1, 0],
        [-3.0, -3.0],
    )


def test_a_narrow_beam_forgets_what_a_wide_one_finds():
    """The best item hides behind the worse first codeword: a beam of one must miss it."""
    model, codes = FixedModel([-1.0, -2.0], [-5.0, -0.5]), [(0, 0), (1, 1)]
    assert search(model, codes, 1) == ([0], [-6.0])
    assert search(model, codes, 2) == ([1, 0], [-2.5, -6.0])


def test_fewer_items_than_beams_leave_the_rest_empty():
    found, score = search(FixedModel([-1.0, -2.0], [-1.0, -1.0]), [(1, 1), (0, 1)], 4)
    assert found == [1, 0, -1, -1]
    assert score == [-2.0, -3.0, -float("inf"), -float("inf")]


@given(st.lists(st.sampled_from([-0.5, -1.0, -1e-30, -3e38, 0.0, 2.5, float("-inf")]), min_size=1), st.data())
def test_best_places_are_those_of_a_stable_sort(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    expected = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]
    assert best_places(torch.tensor([scores]), count).tolist() == [expected]


def test_ranges_follow_one_another():
    assert ranges(np.array([5, 0, 9]), np.array([2, 3, 1])).tolist() == [5, 6, 0, 1, 2, 9]
    assert ranges(np.array([7]), np.array([0])).tolist() == []


def test_ids_of_one_code_are_decoded_too():
    """Flat ids: each item is one token."""
    torch.manual_seed(1)
    sizes = {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 24}
    model = TigerModel(ModelSettings(**sizes), Vocabulary((40,))).eval()
    codes_NI = np.random.default_rng(0).permutation(40).astype(np.int16)[:30, None]
    item_index, lengths_B = histories_of(2, 3, 30)
    decoder = Decoder(model, codes_NI, np.arange(30) % 4 > 0, DecodingSettings(beam_width=10))
    found_BK, score_BK = decoder.recommend(item_index, lengths_B, None, 10)
    for user, history in enumerate(split(item_index, lengths_B)):
        expected_N = np.where(np.arange(30) % 4 > 0, score_every_item(model, codes_NI, history), -np.inf)
        assert found_BK[user].tolist() == np.argsort(-expected_N)[:10].tolist()
        np.testing.assert_allclose(score_BK[user], np.sort(expected_N)[::-1][:10], atol=1e-4)


def brute_force_beams(
    model: TigerModel, codes_NI: np.ndarray, history: np.ndarray, width: int
) -> list[tuple[int, float]]:
    """Items and scores of a beam search that scores every item at every level."""
    token_NI = model.vocabulary.item_tokens(codes_NI)
    history_NT = token_NI[history.astype(np.int64)].reshape(1, -1).expand(len(codes_NI), -1)
    with torch.no_grad():
        log_prob_NIV = model.logits(history_NT, token_NI).log_softmax(-1)
    score_NI = log_prob_NIV.gather(-1, token_NI[..., None])[..., 0].cumsum(1).numpy()
    alive = {(): None}
    for level in range(codes_NI.shape[1]):
        scores = {
            tuple(codes[: level + 1]): score
            for codes, score in zip(codes_NI.tolist(), score_NI[:, level].tolist(), strict=True)
            if tuple(codes[:level]) in alive
        }
        alive = dict(sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))[:width])
    item_of = {tuple(codes): item for item, codes in enumerate(codes_NI.tolist())}
    return [(item_of[codes], score) for codes, score in alive.items()]


@pytest.mark.parametrize(("width", "k"), [(500, 500), (60, 10)])
def test_narrow_beams_keep_what_brute_force_keeps(width, k):
    """Of 1,200 items, so that even 500 beams forget some."""
    torch.manual_seed(2)
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 24}
    model = TigerModel(ModelSettings(**sizes), Vocabulary((20, 20, 20, 3))).eval()
    with torch.no_grad():
        model.shared.weight.mul_(3)  # probabilities apart from each other, as training makes them
    rng = np.random.default_rng(18)
    codes_NI = rng.permutation(np.array(list(np.ndindex(20, 20, 20, 3)), np.int16))[:1200]
    item_index, lengths_B = histories_of(18, 2, 1200)
    decoder = Decoder(model, codes_NI, np.ones(1200, bool), DecodingSettings(beam_width=width))
    found_BK, score_BK = decoder.recommend(item_index, lengths_B, None, k)
    for user, history in enumerate(split(item_index, lengths_B)):
        expected = brute_force_beams(model, codes_NI, history, width)[:k]
        np.testing.assert_allclose(score_BK[user], [score for _, score in expected], atol=1e-4)
        # near ties may change places
        assert len(set(found_BK[user]) & {item for item, _ in expected}) >= k - 1


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(2, 72),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.sampled_from(TABLE_BYTES),
)
def test_nothing_invalid_or_excluded_comes_out_of_narrow_beams(
    seed, num_items, width, sample, bf16, table_bytes
):
    """Of random catalogs, masks, models and seeds; and as many items as are left, up to the width."""
    model = tiny_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 2 * torch.rand(()))
    codes_NI = catalog_of(seed, num_items)
    eligible_N = np.random.default_rng(seed).random(num_items) < 0.5
    eligible_N[seed % num_items] = True
    item_index, lengths_B = histories_of(seed, 5, num_items, longest=12)
    decoding = DecodingSettings(beam_width=width, precision="bf16" if bf16 else "fp32")
    with mock.patch.object(trie, "MAX_TABLE_BYTES", table_bytes):
        decoder = Decoder(model, codes_NI, eligible_N, decoding)
    seed_B = np.arange(5) if sample else None
    found_BK, score_BK = decoder.recommend(
        item_index, lengths_B, None, width, exclude_history=True, seed_B=seed_B
    )
    for user, history in enumerate(split(item_index, lengths_B)):
        left = set(np.flatnonzero(eligible_N)) - set(history)
        count = min(width, len(left))
        assert set(found_BK[user, :count]) <= left
        assert len(set(found_BK[user, :count])) == count
        assert (found_BK[user, count:] == -1).all()
        assert np.isfinite(score_BK[user, :count]).all()
        assert sample or (np.diff(score_BK[user, :count]) <= 0).all()


def item_probabilities(codes_NI: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Of each item, when every codeword is drawn from those that some item goes on with, (N,)."""
    token_NI = MODEL.vocabulary.item_tokens(codes_NI)
    history_NT = token_NI[history.astype(np.int64)].reshape(1, -1).expand(len(codes_NI), -1)
    with torch.no_grad():
        log_prob_NIV = MODEL.logits(history_NT, token_NI).log_softmax(-1).numpy()
    probability_N = np.ones(len(codes_NI))
    for item, codes in enumerate(codes_NI):
        for level in range(codes_NI.shape[1]):
            siblings = {
                other[level] for other in codes_NI.tolist() if other[:level] == codes[:level].tolist()
            }
            own = np.exp(log_prob_NIV[item, level])
            first = MODEL.vocabulary.offsets[level]
            probability_N[item] *= own[first + codes[level]] / sum(own[first + code] for code in siblings)
    return probability_N


def test_draws_are_without_replacement_by_probability():
    """First items, and ordered pairs, as often as their probabilities say."""
    codes_NI = catalog_of(8, 6)
    history = np.array([2, 0], np.int32)
    probability_N = item_probabilities(codes_NI, history)
    assert probability_N.sum() == pytest.approx(1, abs=1e-5)
    count = 20_000
    model = InferenceModel(MODEL)
    trie = Trie.build(codes_NI, np.ones(6, bool))
    history_BT = MODEL.vocabulary.tokens(codes_NI[history]).reshape(1, -1).expand(count, -1)
    with torch.inference_mode():
        found_BW, _ = beam_search(model, trie, history_BT, 2, seed_B=splitmix64(torch.arange(count)))
    pairs = np.zeros((6, 6))
    np.add.at(pairs, tuple(found_BW.numpy().T), 1)
    expected = np.outer(probability_N, probability_N) / (1 - probability_N[:, None])
    np.fill_diagonal(expected, 0)
    # within five standard deviations of each count
    assert (np.abs(pairs - count * expected) <= 5 * np.sqrt(count * expected) + 1e-9).all()


def test_users_of_neighbouring_seeds_draw_independently():
    """Their numbers for all codewords but the last are not those of the next user, shifted by one."""
    draw, count = Draw(torch.arange(200)), 6
    rank_BM = draw.extend(torch.zeros(200, 1, count), torch.arange(count).expand(200, 1, -1))[:, 0]
    same = rank_BM[:-1, 1:].argsort(-1) == rank_BM[1:, :-1].argsort(-1)
    assert same.all(-1).float().mean() < 0.1  # of 120 orders


def test_a_draw_of_everything_is_everything_and_a_seed_decides():
    codes_NI = catalog_of(9, 30)
    item_index, lengths_B = histories_of(9, 40, 30)
    decoder = Decoder(MODEL, codes_NI, np.ones(30, bool), DecodingSettings(beam_width=30))
    seed_B = np.arange(40) * 7919
    whole_BK, _ = decoder.recommend(item_index, lengths_B, None, 30, seed_B=seed_B)
    assert (np.sort(whole_BK, axis=1) == np.arange(30)).all()

    few = [
        decoder.recommend(item_index, lengths_B, None, 5, seed_B=seed)[0]
        for seed in (seed_B, seed_B, seed_B + 1)
    ]
    best_BK, _ = decoder.recommend(item_index, lengths_B, None, 5)
    assert (few[0] == few[1]).all()
    assert (few[0] != few[2]).any(axis=1).mean() > 0.5
    assert (few[0] != best_BK).any(axis=1).mean() > 0.5


@pytest.mark.parametrize("sample", [False, True])
def test_neither_the_batch_nor_the_other_users_nor_the_threads_change_an_answer(sample):
    codes_NI = catalog_of(10, 60)
    item_index, lengths_B = histories_of(10, 37, 60, longest=9)
    seed_B = np.random.default_rng(0).integers(0, 2**62, 37)
    order = np.random.default_rng(1).permutation(37)
    rows = split(item_index, lengths_B)
    shuffled = np.concatenate([rows[user] for user in order])
    answers = []
    for threads, tokens in ((1, None), (1, 1), (2, 100)):
        decoding = DecodingSettings(beam_width=8, batch_tokens=tokens)
        decoder = Decoder(MODEL, codes_NI, np.ones(60, bool), decoding)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        seeds = seed_B if sample else None
        straight_BK, score_BK = decoder.recommend(item_index, lengths_B, None, 6, seed_B=seeds)
        mixed_BK, _ = decoder.recommend(
            shuffled, lengths_B[order], None, 6, seed_B=seeds if seeds is None else seeds[order]
        )
        torch.set_num_threads(before)
        np.testing.assert_array_equal(straight_BK[order], mixed_BK)
        answers.append((straight_BK, score_BK))
    for found_BK, score_BK in answers[1:]:
        np.testing.assert_array_equal(found_BK, answers[0][0])
        np.testing.assert_allclose(score_BK, answers[0][1], atol=1e-4)


def test_a_batch_holds_as_many_tokens_as_the_budget_and_every_user_once():
    model = tiny_model(max_history=6)
    decoder = Decoder(
        model, catalog_of(11, 20), np.ones(20, bool), DecodingSettings(beam_width=10, batch_tokens=200)
    )
    read_B = np.random.default_rng(0).integers(1, 7, 100)
    excluded_B = np.where(np.arange(100) == 50, 100_000, 0)
    batches = list(decoder._batches(read_B, excluded_B))
    assert sorted(np.concatenate(batches)) == list(range(100))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (4 * read_B[batch].max() + 10) <= 200
        assert 50 not in batch or len(batch) == 1
    assert len(batches) < 40


def test_excluded_items_are_budgeted_by_the_longest_list_they_are_looked_up_in(monkeypatch):
    """10,240 of them against four children each take the memory of 40 tokens, not of the one beam's 10."""
    monkeypatch.setattr(trie, "MAX_TABLE_BYTES", 0)
    decoding = DecodingSettings(beam_width=1, batch_tokens=450)
    decoder = Decoder(MODEL, catalog_of(11, 72), np.ones(72, bool), decoding)
    batches = list(decoder._batches(np.full(30, 1), np.full(30, 10_240)))
    assert [len(batch) for batch in batches] == [10, 10, 10]


def test_the_hash_of_a_draw_is_that_of_the_rest_of_the_package():
    key_N = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 100)
    expected = hashing.splitmix64(key_N.view(np.uint64))
    assert (splitmix64(torch.from_numpy(key_N)).numpy().view(np.uint64) == expected).all()


def test_gumbel_noise_has_its_mean_and_deviation():
    noise = gumbel(splitmix64(torch.arange(200_000)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(np.pi / np.sqrt(6), abs=0.02)


@pytest.mark.parametrize("table_bytes", TABLE_BYTES)
@pytest.mark.parametrize("sample", [False, True])
def test_no_step_of_the_search_asks_for_a_value(sample, table_bytes, monkeypatch):
    """On tensors without values such a step raises; a GPU would wait there, and could not record it. (What waits
    inside a kernel of a GPU is not seen here.)"""
    monkeypatch.setattr(trie, "MAX_TABLE_BYTES", table_bytes)
    valid = Trie.build(catalog_of(12, 60), np.ones(60, bool)).to("meta")
    model = InferenceModel(MODEL, torch.bfloat16, "meta")
    history_BT = torch.ones(5, 24, dtype=torch.int64, device="meta")
    place_E = torch.ones(7, dtype=torch.int64, device="meta")
    barred = (Barred(place_E, place_E, place_E),) * 4
    seed_B = torch.ones(5, dtype=torch.int64, device="meta") if sample else None
    with torch.inference_mode():
        found_BW, score_BW = beam_search(model, valid, history_BT, 9, barred, seed_B)
    assert found_BW.shape == score_BW.shape == (5, 9)
    with pytest.raises(RuntimeError, match="meta"):
        bool(found_BW.any())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.booleans())
def test_padding_for_a_gpu_changes_no_answer(seed, exclude_history, sample, with_user):
    """Up to the longest histories, which are padded beyond what the model reads."""
    model = tiny_model(num_user_buckets=10 if with_user else 0, max_history=7)
    codes_NI = catalog_of(seed, 50)
    item_index, lengths_B = histories_of(seed, 5, 50, longest=9)
    decoder = Decoder(model, codes_NI, np.ones(50, bool), DecodingSettings(beam_width=6))
    users = {"exclude_history": exclude_history, "seed_B": np.arange(5) + seed if sample else None}
    buckets_B = np.arange(5) if with_user else None
    expected = decoder.recommend(item_index, lengths_B, buckets_B, 6, **users)

    shapes = []

    def search(*arguments):
        inputs, rebuild = pad_to_shape(*arguments)
        shapes.append([tuple(tensor.shape) for tensor in inputs])
        history_BT, barred, seed_B = rebuild(inputs)
        found_BW, score_BW = beam_search(decoder.model, decoder.trie, history_BT, 6, barred, seed_B)
        return found_BW[: len(arguments[0])], score_BW[: len(arguments[0])]

    decoder._recorded = search
    found = decoder.recommend(item_index, lengths_B, buckets_B, 6, **users)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    for (num_users, length), *others in shapes:
        assert num_users == power_of_two(num_users)
        assert length % 16 == 0
        assert len({shape for shape in others if shape != (num_users,)}) <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_searches_equal_plain_ones_whatever_was_replayed_before():
    codes_NI = catalog_of(13, 60)
    decoding = DecodingSettings(beam_width=8, batch_tokens=400)
    decoder = Decoder(MODEL, codes_NI, np.ones(60, bool), decoding, "cuda")
    for seed, sample in itertools.product((1, 2, 3, 1), (False, True)):
        item_index, lengths_B = histories_of(seed, 20, 60, longest=12)
        asked = {"exclude_history": True, "seed_B": np.arange(20) if sample else None}
        found = decoder.recommend(item_index, lengths_B, None, 8, **asked)
        recorded, decoder._recorded = decoder._recorded, None
        expected = decoder.recommend(item_index, lengths_B, None, 8, **asked)
        decoder._recorded = recorded
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


def test_a_batch_that_will_be_padded_to_a_power_of_two_is_one():
    decoder = Decoder(
        MODEL, catalog_of(11, 20), np.ones(20, bool), DecodingSettings(beam_width=10, batch_tokens=700)
    )
    decoder._recorded = beam_search  # any
    batches = list(decoder._batches(np.full(100, 5), np.zeros(100, np.int64)))
    assert [len(batch) for batch in batches] == [16] * 6 + [4]
    # one item is 4 tokens, and 16 with what it is padded by
    batches = list(decoder._batches(np.full(100, 1), np.zeros(100, np.int64)))
    assert [len(batch) for batch in batches] == [16] * 6 + [4]


def test_the_recorded_searches_of_a_decoder_go_with_it(monkeypatch):
    """Their graphs hold gigabytes of a GPU, and each validation makes a decoder."""

    class Recorded:
        def __init__(self, search):
            self.search = search

    monkeypatch.setattr("tiger_ray.decoding.decoder.RecordedSearch", Recorded)
    monkeypatch.setattr(InferenceModel, "__init__", lambda self, *_: None)
    monkeypatch.setattr(Trie, "to", lambda self, device: self)
    gc.disable()
    try:
        decoder = Decoder(MODEL, catalog_of(11, 20), np.ones(20, bool), DecodingSettings(), "cuda")
        recorded = weakref.ref(decoder._recorded)
        assert recorded() is not None
        del decoder
        assert recorded() is None
    finally:
        gc.enable()


def test_temperature_of_the_settings_divides_the_logits():
    codes_NI = catalog_of(14, 30)
    item_index, lengths_B = histories_of(14, 4, 30)
    decoding = DecodingSettings(beam_width=30, temperature=3.0)
    found_BK, score_BK = Decoder(MODEL, codes_NI, np.ones(30, bool), decoding).recommend(
        item_index, lengths_B, None, 30
    )
    token_NI = MODEL.vocabulary.item_tokens(codes_NI)
    for user, history in enumerate(split(item_index, lengths_B)):
        history_NT = token_NI[history.astype(np.int64)].reshape(1, -1).expand(30, -1)
        with torch.no_grad():
            log_prob_NIV = (MODEL.logits(history_NT, token_NI) / 3.0).log_softmax(-1)
        expected_N = log_prob_NIV.gather(-1, token_NI[..., None]).sum((1, 2)).numpy()
        np.testing.assert_allclose(score_BK[user], expected_N[found_BK[user]], atol=1e-4)


def test_a_draw_depends_neither_on_the_layout_of_the_trie_nor_on_items_out_of_stock(monkeypatch):
    codes_NI = catalog_of(15, 60)
    item_index, lengths_B = histories_of(15, 30, 60)
    decoding, seed_B = DecodingSettings(beam_width=60), np.arange(30) * 31

    def drawn(eligible_N):
        decoder = Decoder(MODEL, codes_NI, eligible_N, decoding)
        return decoder.recommend(item_index, lengths_B, None, 10, seed_B=seed_B)[0]

    with_tables_BK = drawn(np.ones(60, bool))
    monkeypatch.setattr(trie, "MAX_TABLE_BYTES", 0)
    np.testing.assert_array_equal(with_tables_BK, drawn(np.ones(60, bool)))
    gone = codes_NI[:, 0] == 0  # a whole branch, so that no probability below the root's other ones changes
    left_BK = drawn(~gone)
    for before, after in zip(with_tables_BK, left_BK, strict=True):
        kept = [item for item in before if not gone[item]]
        assert after[: len(kept)].tolist() == kept


def test_threads_of_a_caller_are_as_many_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    item_index, lengths_B = histories_of(16, 30, 40)
    decoding = DecodingSettings(beam_width=5, batch_tokens=50)
    Decoder(MODEL, catalog_of(16, 40), np.ones(40, bool), decoding).recommend(item_index, lengths_B, None, 5)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2 == torch.get_num_threads()
    torch.set_num_threads(before)


def test_nobody_gets_nothing_and_too_many_items_are_refused():
    decoder = Decoder(MODEL, catalog_of(17, 40), np.ones(40, bool), DecodingSettings(beam_width=5))
    found_BK, score_BK = decoder.recommend(np.empty(0, np.int32), np.empty(0, np.int64), None, 5)
    assert found_BK.shape == score_BK.shape == (0, 5)
    with pytest.raises(ValueError, match=r"6 items are asked for, but decoding\.beam_width is 5"):
        decoder.recommend(np.zeros(1, np.int32), np.ones(1, np.int64), None, 6)


@given(st.integers(1, 10_000))
def test_power_of_two(count):
    assert power_of_two(count) >= count > power_of_two(count) // 2
    assert bin(power_of_two(count)).count("1") == 1
