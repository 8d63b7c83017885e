from functools import partial

import pytest
import torch

from tests import tiny_models
from tests.tiny_models import VOCABULARY
from tiger_ray.decoding.inference import InferenceModel, softmax
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import PAD

padded_batch = partial(tiny_models.padded_batch, lengths=(61, 46, 9, 1))  # 61: 20 items and a user


def tiny_model(**changes) -> TigerModel:
    """Scales of norms begin at one, where nothing would tell that they are left out."""
    model = tiny_models.tiny_model(**changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                weight.uniform_(0.5, 1.5)
    return model


def written(model: InferenceModel, history_BT: torch.Tensor, target_BI: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities of each level's codewords after those of the target before it, (B, C) each."""
    state = model.start(history_BT)
    token_BW = torch.full((len(history_BT), 1), PAD)
    rows = []
    for level in range(VOCABULARY.id_length):
        rows.append(model.next_log_probs(token_BW, state)[:, 0])
        token_BW = target_BI[:, level : level + 1]
    return rows


def at_once(model: TigerModel, history_BT: torch.Tensor, target_BI: torch.Tensor, temperature: float = 1.0):
    """The same by the model's own logits."""
    logits_BIV = model.logits(history_BT, target_BI) / temperature
    rows = []
    for level, (first, size) in enumerate(zip(VOCABULARY.offsets, VOCABULARY.level_sizes, strict=True)):
        own = slice(first, first + size)
        if model.settings.softmax == "level":
            rows.append(logits_BIV[:, level, own].log_softmax(-1))
        else:
            rows.append(logits_BIV[:, level].log_softmax(-1)[:, own])
    return rows


BOTH = pytest.mark.parametrize("softmax", ["vocabulary", "level"])


@BOTH
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [61, 1])
def test_writing_level_by_level_equals_the_model_at_once(tied, length, softmax):
    model = tiny_model(tie_embeddings=tied, softmax=softmax)
    history_BT, target_BI = padded_batch()
    history_BT = history_BT[:, :length]
    with torch.no_grad():
        for found_BC, expected_BC in zip(
            written(InferenceModel(model), history_BT, target_BI),
            at_once(model, history_BT, target_BI),
            strict=True,
        ):
            assert found_BC.dtype == torch.float32
            torch.testing.assert_close(found_BC, expected_BC, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_of_a_level_sum_to_one_if_they_are_normalized_over_it(dtype):
    history_BT, target_BI = padded_batch()
    totals = {}
    for over in ("vocabulary", "level"):
        model = InferenceModel(tiny_model(softmax=over), dtype, temperature=0.7)
        with torch.no_grad():
            rows = written(model, history_BT, target_BI)
        totals[over] = torch.stack([row_BC.exp().sum(-1) for row_BC in rows])
    torch.testing.assert_close(totals["level"], torch.ones(3, 4))
    assert (totals["vocabulary"] < 0.99).all()


@BOTH
def test_temperature_divides_the_logits(softmax):
    model = tiny_model(softmax=softmax)
    history_BT, target_BI = padded_batch()
    with torch.no_grad():
        cold = written(InferenceModel(model, temperature=0.25), history_BT, target_BI)
        for found_BC, expected_BC in zip(cold, at_once(model, history_BT, target_BI, 0.25), strict=True):
            torch.testing.assert_close(found_BC, expected_BC, atol=1e-4, rtol=0)


@BOTH
def test_bf16_stays_near_fp32(softmax):
    model = tiny_model(softmax=softmax)
    history_BT, target_BI = padded_batch()
    with torch.no_grad():
        rounded = written(InferenceModel(model, torch.bfloat16), history_BT, target_BI)
        for found_BC, expected_BC in zip(rounded, at_once(model, history_BT, target_BI), strict=True):
            assert found_BC.dtype == torch.float32
            torch.testing.assert_close(found_BC, expected_BC, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing(dtype):
    model = InferenceModel(tiny_model(), dtype)
    history_BT, target_BI = padded_batch()
    with torch.no_grad():
        among = written(model, history_BT, target_BI)
        alone = written(model, history_BT[2:3, :9], target_BI[2:3])
    for among_BC, alone_BC in zip(among, alone, strict=True):
        torch.testing.assert_close(
            among_BC[2:3], alone_BC, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0
        )


def test_beams_keep_their_own_past_when_they_are_reordered():
    model = tiny_model()
    fast = InferenceModel(model)
    history_BT, _ = padded_batch()
    first, second, third = VOCABULARY.offsets
    with torch.no_grad():
        state = fast.start(history_BT)
        fast.next_log_probs(torch.full((4, 1), PAD), state)
        state.reorder(torch.zeros(4, 2, dtype=torch.int64))
        fast.next_log_probs(torch.tensor([[first, first + 1]] * 4), state)
        state.reorder(torch.tensor([[1, 0, 1]] * 4))
        log_prob_BWC = fast.next_log_probs(torch.tensor([[second, second + 1, second + 2]] * 4), state)
        for beam, past in enumerate(([first + 1, second], [first, second + 1], [first + 1, second + 2])):
            target_BI = torch.tensor([[*past, third]] * 4)
            expected_BC = model.logits(history_BT, target_BI).log_softmax(-1)[:, 2, third : third + 4]
            torch.testing.assert_close(log_prob_BWC[:, beam], expected_BC, atol=1e-5, rtol=0)


def test_the_model_it_came_from_is_left_as_it_is():
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    history_BT, target_BI = padded_batch()
    with torch.no_grad():
        written(InferenceModel(model, torch.bfloat16), history_BT, target_BI)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_softmax_in_bf16_is_that_of_fp32_for_large_scores_too():
    torch.manual_seed(0)
    score = (torch.randn(6, 5, 9) * 40).bfloat16()
    expected = score.float().softmax(-1)
    torch.testing.assert_close(softmax(score).float(), expected, atol=0.004, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_without_onednn_writes_the_same(dtype, monkeypatch):
    model = tiny_model()
    history_BT, target_BI = padded_batch()
    with torch.no_grad():
        expected = written(InferenceModel(model, dtype), history_BT, target_BI)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        found = written(InferenceModel(model, dtype), history_BT, target_BI)
    for found_BC, expected_BC in zip(found, expected, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(found_BC, expected_BC, atol=tolerance, rtol=0)
