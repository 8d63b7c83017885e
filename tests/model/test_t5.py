import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_models import VOCABULARY, padded_batch, tiny_model
from tiger_ray.errors import ArtifactError
from tiger_ray.model.cpu_kernels import dropout_mask
from tiger_ray.model.t5 import EPSILON, Dropout, FeedForward, Norm, TigerModel
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.settings.model import ModelSettings
from tiger_ray.training.operations import tiger_operations


def losses_by_hand(model: TigerModel, history_BT: torch.Tensor, target_BI: torch.Tensor, smoothing: float):
    """Codeword by codeword: minus the log of what a softmax, written out, gives the target, (B, I)."""
    logits_BIV = model.logits(history_BT, target_BI)
    rows = []
    for user, target_I in enumerate(target_BI.tolist()):
        for level, target in enumerate(target_I):
            tokens = range(VOCABULARY.size)
            if model.settings.softmax == "level":
                first = VOCABULARY.offsets[level]
                tokens = range(first, first + VOCABULARY.level_sizes[level])
            total = sum(logits_BIV[user, level, token].exp() for token in tokens)
            loss = -(1 - smoothing) * (logits_BIV[user, level, target].exp() / total).log()
            for token in tokens:
                loss = loss - smoothing / len(tokens) * (logits_BIV[user, level, token].exp() / total).log()
            rows.append(loss)
    return torch.stack(rows).view(target_BI.shape)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softmax", ["vocabulary", "level"])
def test_losses_and_gradients_equal_a_softmax_written_out(softmax, smoothing, tied):
    model = tiny_model(softmax=softmax, tie_embeddings=tied)
    history_BT, target_BI = padded_batch()
    losses, gradients = [], []
    for loss_BI in (
        model(history_BT, target_BI, smoothing),
        losses_by_hand(model, history_BT, target_BI, smoothing),
    ):
        model.zero_grad()
        loss_BI.mean().backward()
        losses.append(loss_BI.detach())
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("softmax", "expected_I"),
    [("vocabulary", [19, 19, 19]), ("level", [6, 5, 4])],
)
def test_equal_logits_cost_the_log_of_how_many_there_are_to_choose_from(softmax, expected_I):
    model = tiny_model(softmax=softmax, tie_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss_BI = model(*padded_batch())
    torch.testing.assert_close(loss_BI, torch.tensor(expected_I).log().expand(4, 3))
    torch.testing.assert_close(model(*padded_batch(), 0.3), loss_BI)


def test_a_softmax_over_levels_leaves_the_logits_of_other_levels_alone():
    """Tokens of other levels, padding and users get no gradient from the output layer."""
    model = tiny_model(softmax="level", tie_embeddings=False)
    history_BT, target_BI = padded_batch()
    model(history_BT, target_BI)[:, 1].sum().backward()
    touched_V = model.lm_head.weight.grad.abs().sum(1) > 0
    first = VOCABULARY.offsets[1]
    assert touched_V.nonzero().flatten().tolist() == list(range(first, first + VOCABULARY.level_sizes[1]))


@pytest.mark.parametrize("softmax", ["vocabulary", "level"])
def test_bf16_stays_near_fp32(softmax):
    model = tiny_model(softmax=softmax)
    history_BT, target_BI = padded_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = model(history_BT, target_BI).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(history_BT, target_BI).mean().item(), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean_and_the_seed(dtype):
    dropout = Dropout(0.3)
    ones = torch.ones(1001, 999, dtype=dtype)  # an odd number, since masks are drawn four at a time
    torch.manual_seed(0)
    dropped = dropout(ones)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.002)
    assert dropped.float().mean().item() == pytest.approx(1.0, abs=0.005)
    # neighbours are drawn independently
    both = (dropped[:, 1:] == 0) & (dropped[:, :-1] == 0)
    assert both.float().mean().item() == pytest.approx(0.09, abs=0.002)
    torch.manual_seed(0)
    assert torch.equal(dropout(ones), dropped)
    assert torch.equal(dropout.eval()(ones), ones)


def test_dropout_of_nearly_everything_leaves_nearly_nothing():
    """Its bound is a 16-bit number, which would come around to all of them."""
    assert dropout_mask(torch.Size([1000]), 0.9999999).sum() < 5


def test_dropout_passes_gradients_where_it_passed_values():
    value = torch.randn(64, 64, requires_grad=True)
    dropped = Dropout(0.5)(value)
    dropped.sum().backward()
    torch.testing.assert_close(value.grad * value, dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_feed_forward_layer_drops_by_its_mask_and_has_the_gradient_of_that(dtype):
    layer = FeedForward(ModelSettings(d_model=8, d_ff=33, dropout=0.3)).to(dtype)
    hidden = torch.randn(5, 7, 8, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    ours = layer(hidden)
    torch.manual_seed(1)
    expected = layer.wo(layer.wi(hidden).relu() * dropout_mask(torch.Size([5, 7, 33]), 0.3) / 0.7)
    torch.testing.assert_close(ours, expected)
    gradients, theirs = (
        torch.autograd.grad(y.square().sum(), (hidden, layer.wi.weight, layer.wo.weight))
        for y in (ours, expected)
    )
    torch.testing.assert_close(gradients, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_files_hold_the_whole_model(tied):
    model = tiny_model(tie_embeddings=tied)
    loaded = TigerModel.from_files(model.to_files())
    assert not loaded.training
    assert loaded.settings == model.settings
    assert loaded.vocabulary == model.vocabulary
    assert (loaded.lm_head.weight is loaded.shared.weight) == tied
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_files_are_the_same_bytes_each_time():
    assert tiny_model().to_files() == tiny_model().to_files()


NORM = "encoder.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"lacks the tensor {NORM}"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "holds the tensor extra,"),
        (
            lambda tensors: tensors.update({NORM: torch.ones(3)}),
            rf"tensor {NORM} .* shape \(3,\), .* \(16,\)",
        ),
        (lambda tensors: tensors[NORM].fill_(float("nan")), f"tensor {NORM} .* not finite"),
    ],
    ids=["missing", "unknown", "other shape", "not finite"],
)
def test_weights_that_are_not_this_models_are_refused_by_name(change, message):
    files = tiny_model().to_files()
    tensors = safetensors.torch.load(files["model.safetensors"])
    change(tensors)
    files["model.safetensors"] = safetensors.torch.save(tensors)
    with pytest.raises(ArtifactError, match=message):
        TigerModel.from_files(files)


def test_damaged_files_are_refused_by_name():
    files = tiny_model().to_files()
    with pytest.raises(ArtifactError, match=r"no file config\.json"):
        TigerModel.from_files({"model.safetensors": files["model.safetensors"]})
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        TigerModel.from_files(files | {"model.safetensors": files["model.safetensors"][:-5]})
    for damage in (
        b"{",
        b"{}",
        b"[]",
        json.dumps({"tiger_ray": {"model": {"depth": 1}, "level_sizes": [2]}}).encode(),
    ):
        with pytest.raises(ArtifactError, match=r"config\.json"):
            TigerModel.from_files(files | {"config.json": damage})


def test_the_norm_and_its_gradient_are_those_of_torch():
    norm = Norm(6).double()
    torch.nn.init.normal_(norm.weight)
    hidden = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.rms_norm(hidden, (6,), norm.weight, EPSILON)
    torch.testing.assert_close(norm(hidden), expected)
    upstream = torch.randn_like(hidden)
    gradients, theirs = (
        torch.autograd.grad(y, (hidden, norm.weight), upstream) for y in (norm(hidden), expected)
    )
    torch.testing.assert_close(gradients, theirs)


@pytest.mark.parametrize("softmax", ["vocabulary", "level"])
@pytest.mark.parametrize("sizes", [{}, {"num_layers": 2, "d_model": 64, "num_heads": 3, "d_kv": 16}], ids=str)
def test_operations_are_those_of_the_matrix_products_without_padding(softmax, sizes):
    model = TigerModel(ModelSettings(softmax=softmax, **sizes), Vocabulary((256, 256, 256, 64)))
    num_examples, num_tokens = 8, 28
    history_BT = torch.randint(1, 833, (num_examples, num_tokens))
    target_BI = torch.tensor([[1, 257, 513, 769]]).repeat(num_examples, 1)
    with FlopCounterMode(display=False) as counter:
        model(history_BT, target_BI).sum().backward()
    counted = tiger_operations(model, np.full(num_examples, num_tokens))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
