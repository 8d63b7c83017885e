"""A resumed or divided run equals one that was neither, and training learns."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from tiger_ray.errors import TigerError
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary, user_buckets
from tiger_ray.settings.model import ModelSettings
from tiger_ray.settings.training import TrainingSettings
from tiger_ray.training.checkpoints import Progress, load_state, save_state
from tiger_ray.training.collate import tiger_collate, tokens_of
from tiger_ray.training.examples import Batch, Examples
from tiger_ray.training.log import TrainingLog
from tiger_ray.training.loop import fit, learning_rate, make_optimizer
from tiger_ray.training.operations import tiger_operations

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
    history_BT, target_BI = tokens_of(batch, CODES_NI, vocabulary)
    bucket = [0 % 5, 7919 % 5, 7919 % 5]
    assert history_BT[:, 0].tolist() == [vocabulary.user_offset + b for b in bucket]
    items = [[*item_tokens_NI[0], 0, 0, 0], [*item_tokens_NI[2], 0, 0, 0], item_tokens_NI[[2, 3]].flatten()]
    assert history_BT[:, 1:].tolist() == [list(map(int, tokens)) for tokens in items]
    assert torch.equal(target_BI, item_tokens_NI[[1, 3, 4]])
    assert user_buckets(np.array([2**64 - 1], np.uint64), vocabulary).tolist() == [(2**64 - 1) % 5]


def test_work_counts_user_tokens_and_codewords_with_and_without_padding():
    model = TigerModel(TINY.model_copy(update={"num_user_buckets": 5}), Vocabulary((4, 4, 3), 5))
    batch = Batch(
        np.array([0, 2, 3], np.int32), np.array([1, 2]), np.zeros(2, np.uint64), np.array([1, 4], np.int32)
    )
    collated = tiger_collate(model, CODES_NI)(batch)
    assert (collated.tokens, collated.padded) == (4 + 7, 2 * 7)
    assert collated.operations == tiger_operations(model, np.array([4, 7]))
    assert all(map(torch.equal, collated.inputs, tokens_of(batch, CODES_NI, model.vocabulary)))


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


def test_the_inverse_root_falls_with_the_root_of_the_step_after_the_warm_up():
    chosen = TrainingSettings(learning_rate=0.01, warmup_steps=100, num_steps=10**6, schedule="inverse_sqrt")
    assert learning_rate(99, chosen) == pytest.approx(0.01)
    for step in (100, 399, 9_999, 999_999):
        assert learning_rate(step, chosen) == pytest.approx(0.01 * math.sqrt(100 / (step + 1)))


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


def train(
    model,
    optimizer,
    settings,
    progress=None,
    *,
    examples=None,
    seed=1,
    rank=0,
    world_size=1,
    sinks=(),
    network=None,
    **changed,
):
    """Runs the loop; returns the progress."""
    progress = progress or Progress()
    fit(
        network or model,
        optimizer,
        (examples or examples_of(HISTORIES, seed=seed)).batches(
            settings.global_batch_size,
            start=progress.step,
            rank=rank,
            world_size=world_size,
            batch_tokens=settings.batch_tokens,
            id_length=VOCABULARY.id_length,
        ),
        tiger_collate(model, CODES_NI),
        settings,
        progress,
        TrainingLog(settings.log_every_steps, settings.num_steps, torch.device("cpu"), sinks=sinks),
        seed=seed,
        rank=rank,
        world_size=world_size,
        **changed,
    )
    return progress


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    "changed", [{}, {"precision": "bf16"}, {"optimizer": "adafactor"}, {"batch_tokens": 30}], ids=str
)
def test_a_run_resumed_from_its_checkpoint_ends_bit_for_bit_where_an_uninterrupted_one_does(
    changed,
):
    settings = training_settings(**changed)
    model, optimizer = fresh(settings)
    ndcg = iter([0.5, 0.4, 0.3])
    saved = []

    def save(progress):
        if progress.step == 5:
            saved.append(save_state(model, optimizer, progress))

    whole = train(model, optimizer, settings, save=save, validate=lambda: {"ndcg@10": next(ndcg)})
    assert [point["step"] for point in whole.curve] == [5, 10, 12]

    torch.manual_seed(99)
    resumed = TigerModel(TINY, VOCABULARY)  # other weights
    resumed_optimizer = make_optimizer(resumed, settings)
    progress = load_state(*saved, resumed, resumed_optimizer)
    assert (progress.step, progress.curve) == (5, whole.curve[:1])
    ndcg = iter([0.4, 0.3])
    train(resumed, resumed_optimizer, settings, progress, validate=lambda: {"ndcg@10": next(ndcg)})
    assert progress.curve == whole.curve
    assert_same_weights(weights(resumed), weights(model))
    assert_same_weights(progress.best, whole.best)


def test_the_same_seed_gives_the_same_model_and_another_one_does_not():
    settings = training_settings(num_steps=4)
    results = []
    for seed in (1, 1, 2):
        model, optimizer = fresh(settings)
        train(model, optimizer, settings, seed=seed)
        results.append(weights(model))
    assert_same_weights(results[0], results[1])
    assert any(not torch.equal(value, results[2][name]) for name, value in results[0].items())


class Recorder(torch.optim.SGD):
    """Keeps the gradients of one step and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


WITHOUT_DROPOUT = TINY.model_copy(update={"dropout": 0.0})


def gradients(rank=0, world_size=1, wrap=lambda model: model, **changed):
    """Of one step."""
    settings = training_settings(num_steps=1, max_grad_norm=1e9, **changed)
    model, _ = fresh(settings, WITHOUT_DROPOUT)
    recorder = Recorder(model.parameters(), lr=0.1)
    train(model, recorder, settings, rank=rank, world_size=world_size, network=wrap(model))
    return recorder.gradients


@pytest.mark.parametrize("world_size", [2, 3])  # 8 examples: 3 workers have unequal shares
def test_workers_average_to_the_gradient_of_one(world_size):
    parts = [gradients(rank, world_size) for rank in range(world_size)]
    for whole, *of_workers in zip(gradients(), *parts, strict=True):
        torch.testing.assert_close(sum(of_workers) / world_size, whole, rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(parts[0], parts[1], strict=True))


@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_accumulated_parts_give_the_gradient_of_the_whole(batch_tokens):
    for whole, accumulated in zip(gradients(), gradients(batch_tokens=batch_tokens), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-7)


UNEQUAL_PARTS = 14
"""Tokens per part that one of three workers needs more parts for than another."""


def accumulate_as_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=3)
    found = gradients(rank, 3, DistributedDataParallel, batch_tokens=UNEQUAL_PARTS)
    torch.save(found, f"{folder}/gradients-{rank}")
    dist.destroy_process_group()


def test_ddp_workers_of_unequally_many_parts_all_have_the_gradient_of_the_whole(tmp_path):
    shares = [
        next(
            examples_of(HISTORIES).batches(
                8, rank=rank, world_size=3, batch_tokens=UNEQUAL_PARTS, id_length=VOCABULARY.id_length
            )
        )
        for rank in range(3)
    ]
    assert sorted(map(len, shares)) == [1, 2, 2]
    start_processes(accumulate_as_worker, (str(tmp_path),), 3, start_method="forkserver")
    for rank in range(3):
        for whole, found in zip(gradients(), torch.load(tmp_path / f"gradients-{rank}"), strict=True):
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-7)


def test_the_loss_shown_is_the_mean_over_codewords_and_checkpoints_do_not_depend_on_log_lines():
    seen = []
    settings = training_settings(num_steps=6, checkpoint_every_steps=3, log_every_steps=2)
    train(*fresh(settings), settings, sinks=[lambda step, values: seen.append((step, values))])
    training = [(step, values) for step, values in seen if "training/loss" in values]
    points = [(step, values) for step, values in seen if "checkpoint/loss" in values]
    assert [step for step, _ in training] == [2, 4, 6]
    assert [step for step, _ in points] == [3, 6]
    other = training_settings(num_steps=6, checkpoint_every_steps=3, log_every_steps=100)
    again = train(*fresh(other), other)
    assert [point["loss"] for point in again.curve] == [values["checkpoint/loss"] for _, values in points]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_training_learns_what_comes_next(optimizer):
    settings = training_settings(
        num_steps=100, learning_rate=0.02, checkpoint_every_steps=5, optimizer=optimizer
    )
    cycle = examples_of([[(start + k) % 12 for k in range(6)] for start in range(12)] * 2)
    progress = train(*fresh(settings, WITHOUT_DROPOUT), settings, examples=cycle)
    assert progress.curve[0]["loss"] > 1.5
    assert progress.curve[-1]["loss"] < 1.0


def test_norms_are_not_decayed_and_everything_else_is():
    model, optimizer = fresh(training_settings(weight_decay=0.3))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_the_model_is_that_of_the_best_checkpoint_and_patience_ends_the_run_behind_it():
    settings = training_settings(num_steps=100, checkpoint_every_steps=1, patience=2)
    model, optimizer = fresh(settings)
    ndcg = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    kept = []
    progress = train(
        model,
        optimizer,
        settings,
        validate=lambda: {"ndcg@10": next(ndcg)},
        save=lambda progress: kept.append(weights(model)),
    )
    assert [point["ndcg@10"] for point in progress.curve] == [0.1, 0.3, 0.2, 0.3]
    assert progress.chosen == progress.curve[1]
    assert_same_weights(progress.best, kept[1])

    train(model, optimizer, settings, progress)  # killed after its last checkpoint, and started again
    assert progress.step == 4


def test_without_validation_the_last_checkpoint_is_the_model():
    settings = training_settings(num_steps=4, checkpoint_every_steps=2)
    progress = train(*fresh(settings), settings)
    assert progress.chosen == progress.curve[-1]
    assert not progress.best


@pytest.mark.parametrize(
    ("breaks_after", "message", "checkpoints"),
    [
        (7, r"loss was not a finite number at step 8; the last checkpoint is good", [5]),
        (10, r"a weight was not a finite number after step 10, .* the last checkpoint is good", [5]),
        (12, r"a weight was not a finite number after step 12, .* the last checkpoint is good", [5, 10]),
    ],
    ids=["between checkpoints", "right before a checkpoint", "with the last step"],
)
def test_numbers_that_are_not_finite_end_training_before_they_are_saved_and_the_step_is_named(
    breaks_after, message, checkpoints
):
    settings = training_settings(checkpoint_every_steps=5, log_every_steps=5)
    model, _ = fresh(settings)
    saved = []

    class Breaks(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            super().step(closure)
            self.count += 1
            if self.count == breaks_after:
                with torch.no_grad():
                    model.shared.weight.fill_(float("nan"))

    with pytest.raises(TigerError, match=rf"{message}.*training\.learning_rate"):
        train(
            model,
            Breaks(model.parameters(), lr=0.01),
            settings,
            save=lambda progress: saved.append(progress.step),
        )
    assert saved == checkpoints
