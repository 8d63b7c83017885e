"""A resumed or divided run equals one that was neither, and training learns."""

import numpy as np
import pytest
import torch

from tiger_ray.config import ModelSettings, TrainingSettings
from tiger_ray.errors import ArtifactError, TigerError
from tiger_ray.examples import Batch, Examples
from tiger_ray.model import TigerModel
from tiger_ray.tokens import Vocabulary
from tiger_ray.training import (
    fit,
    learning_rate,
    load_state,
    make_optimizer,
    save_state,
    tokens_of,
    user_buckets,
)

VOCABULARY = Vocabulary((4, 4, 3))
CODES_NI = np.array([[a, b, 0] for a in range(4) for b in range(3)], np.int16)  # 12 items
TINY = ModelSettings(num_layers=1, d_model=8, num_heads=2, d_kv=4, d_ff=16, dropout=0.1, max_history=4)


def examples_of(histories, max_history=4, seed=1):
    """Examples of users whose events are all visible."""
    lengths = np.array([len(history) for history in histories], np.int64)
    items = np.array([item for history in histories for item in history], np.int32)
    hashes = np.arange(len(histories), dtype=np.uint64) * np.uint64(7919)
    return Examples.of(items, lengths, hashes, max_history=max_history, seed=seed)


def test_a_user_token_comes_first_and_is_the_users_own():
    vocabulary = Vocabulary((4, 4, 3), num_user_buckets=5)
    item_tokens_NI = vocabulary.item_tokens(CODES_NI)
    batch = Batch(
        np.array([0, 2, 2, 3], np.int32),
        np.array([1, 1, 2]),
        np.array([0, 7919, 7919], np.uint64),
        np.array([1, 3, 4], np.int32),
    )
    history_BT, target_BI = tokens_of(batch, item_tokens_NI, vocabulary)
    bucket = [0 % 5, 7919 % 5, 7919 % 5]
    assert history_BT[:, 0].tolist() == [vocabulary.user_offset + b for b in bucket]
    items = [[*item_tokens_NI[0], 0, 0, 0], [*item_tokens_NI[2], 0, 0, 0], item_tokens_NI[[2, 3]].flatten()]
    assert history_BT[:, 1:].tolist() == [list(map(int, tokens)) for tokens in items]
    assert torch.equal(target_BI, item_tokens_NI[[1, 3, 4]])
    assert user_buckets(np.array([2**64 - 1], np.uint64), vocabulary).tolist() == [(2**64 - 1) % 5]


def test_the_learning_rate_rises_linearly_peaks_and_falls_to_zero_as_a_cosine():
    chosen = TrainingSettings(learning_rate=0.5, warmup_steps=10, num_steps=110)
    rates = [learning_rate(step, chosen) for step in range(111)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert (np.diff(rates[10:]) < 0).all()


def test_a_schedule_without_warmup_starts_at_the_peak():
    assert learning_rate(0, TrainingSettings(learning_rate=0.5, warmup_steps=0, num_steps=10)) == 0.5
    assert learning_rate(3, TrainingSettings(learning_rate=0.5, warmup_steps=4, num_steps=4)) == 0.5


HISTORIES = [[(n * k) % 12 for k in range(2 + n % 6)] for n in range(1, 25)]


def training_settings(**changed):
    values = {
        "num_steps": 12,
        "global_batch_size": 8,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "checkpoint_every_steps": 5,
        "precision": "fp32",
        "log_every_steps": 1000,
    }
    return TrainingSettings(**(values | changed))


def fresh(settings, model_settings=TINY):
    torch.manual_seed(0)
    model = TigerModel(model_settings, VOCABULARY)
    return model, make_optimizer(model, settings)


def train(model, optimizer, settings, **changed):
    return fit(
        model,
        examples_of(HISTORIES),
        VOCABULARY.item_tokens(CODES_NI),
        VOCABULARY,
        settings,
        optimizer,
        seed=1,
        **changed,
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_resumed_from_its_checkpoint_ends_bit_for_bit_where_an_uninterrupted_one_does(
    tmp_path, precision
):
    settings = training_settings(precision=precision)
    model, optimizer = fresh(settings)
    steps = []

    def checkpoint(step, loss):
        steps.append((step, loss))
        if step == 5:
            save_state(tmp_path, model, optimizer, step, steps)

    train(model, optimizer, settings, checkpoint=checkpoint)
    assert [step for step, _ in steps] == [5, 10, 12]

    torch.manual_seed(99)
    resumed = TigerModel(TINY, VOCABULARY)  # other weights
    resumed_optimizer = make_optimizer(resumed, settings)
    start, curve = load_state(tmp_path, resumed, resumed_optimizer)
    assert (start, curve) == (5, [list(steps[0])])
    again = []
    train(
        resumed,
        resumed_optimizer,
        settings,
        start=start,
        checkpoint=lambda step, loss: again.append((step, loss)),
    )
    assert again == steps[1:]
    assert_same_weights(weights(resumed), weights(model))


def test_the_same_seed_gives_the_same_model_and_another_one_does_not():
    settings = training_settings(num_steps=4)
    results = []
    for seed in (1, 1, 2):
        model, optimizer = fresh(settings)
        fit(
            model,
            examples_of(HISTORIES, seed=seed),
            VOCABULARY.item_tokens(CODES_NI),
            VOCABULARY,
            settings,
            optimizer,
            seed=seed,
        )
        results.append(weights(model))
    assert_same_weights(results[0], results[1])
    assert any(not torch.equal(value, results[2][name]) for name, value in results[0].items())


class Recorder(torch.optim.SGD):
    """Keeps the gradients of one step and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def test_two_workers_average_to_the_gradient_of_one():
    without_dropout = TINY.model_copy(update={"dropout": 0.0})
    settings = training_settings(num_steps=1, max_grad_norm=1e9)

    def gradients(rank, world_size):
        model, _ = fresh(settings, without_dropout)
        recorder = Recorder(model.parameters(), lr=0.1)
        train(model, recorder, settings, rank=rank, world_size=world_size)
        return recorder.gradients

    alone, first, second = gradients(0, 1), gradients(0, 2), gradients(1, 2)
    for whole, a, b in zip(alone, first, second, strict=True):
        torch.testing.assert_close((a + b) / 2, whole, rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_training_learns_what_comes_next():
    settings = training_settings(num_steps=100, learning_rate=0.02, checkpoint_every_steps=5)
    cycle = [[(start + k) % 12 for k in range(6)] for start in range(12)] * 2
    model, optimizer = fresh(settings, TINY.model_copy(update={"dropout": 0.0}))
    losses = []
    fit(
        model,
        examples_of(cycle),
        VOCABULARY.item_tokens(CODES_NI),
        VOCABULARY,
        settings,
        optimizer,
        seed=1,
        checkpoint=lambda step, loss: losses.append(loss),
    )
    assert losses[0] > 1.5
    assert losses[-1] < 1.0


def test_norms_are_not_decayed_and_everything_else_is():
    model, optimizer = fresh(training_settings(weight_decay=0.3))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_a_state_of_another_shape_is_refused(tmp_path):
    settings = training_settings(num_steps=1)
    model, optimizer = fresh(settings)
    train(model, optimizer, settings)
    save_state(tmp_path, model, optimizer, 1, [])
    wider, wider_optimizer = fresh(settings, TINY.model_copy(update={"d_ff": 32}))
    with pytest.raises(ArtifactError, match=r"checkpoint tensor .*has shape \(.*\); this model wants \(.*32"):
        load_state(tmp_path, wider, wider_optimizer)
    deeper, deeper_optimizer = fresh(settings, TINY.model_copy(update={"num_layers": 2}))
    with pytest.raises(ArtifactError, match=r"checkpoint tensor .*is missing"):
        load_state(tmp_path, deeper, deeper_optimizer)


def test_a_loss_that_is_not_finite_ends_training_before_it_is_saved():
    settings = training_settings(checkpoint_every_steps=2)
    model, optimizer = fresh(settings)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    saved = []
    with pytest.raises(
        TigerError,
        match=r"training loss became nan at or before step 2; the last checkpoint is good.*learning_rate",
    ):
        train(model, optimizer, settings, checkpoint=lambda step, loss: saved.append(step))
    assert saved == []
