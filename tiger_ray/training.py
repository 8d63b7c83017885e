"""Histories -> a checkpoint: the paper's sequence-to-sequence training, one loop, on Ray Train or without it.

An example is a user's history cut before one of its events: the model reads the items before it and writes
the Semantic ID of that item. Examples are never stored: each worker holds all histories as int32 (4 bytes
per event) and cuts batches out of them. Which examples make up step s follows from the seed and s alone,
so a resumed run continues exactly, and any number of workers sees the same global batches.

B examples per step of one worker, T history tokens, I id_length, E events of all users, U users, H items
that the model reads.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiger_ray.beam_search import ranges
from tiger_ray.config import Settings, TrainingSettings
from tiger_ray.errors import ArtifactError, DataError, TigerError
from tiger_ray.model import TigerModel
from tiger_ray.registry import id_space, load_semantic_ids, registry_of
from tiger_ray.sequences import HELD_OUT, training_lengths, user_shards
from tiger_ray.stage import Computed, StageResult, run_stage
from tiger_ray.storage import Manifest, Run, Storage
from tiger_ray.tokens import Vocabulary, pad_histories
from tiger_ray.workers import run_workers, this_worker

BATCHES_PER_WINDOW = 64
"""Batches that are sorted by length together, so that a batch holds histories of about one length."""

MODEL_FILES = ("model.safetensors", "config.json")


def run(settings: Settings, storage: Storage, sequences: Manifest, semantic_ids: Manifest) -> StageResult:
    """Publish the artifact `model`.

    Raises:
        DataError: no user has two events that training may see.
    """
    return run_stage(
        storage,
        settings,
        "model",
        inputs={"sequences": sequences, "semantic_ids": registry_of(semantic_ids)},
        sections={"model": settings.model, "training": settings.training},
        compute=lambda run: _compute(run, settings, storage, sequences, semantic_ids),
    )


def load_model(storage: Storage, model: Manifest, semantic_ids: Manifest) -> TigerModel:
    """The published model, checked against the Semantic IDs it is to write.

    Raises:
        ArtifactError: it was trained on another ID space.
    """
    require_same_id_space(model, semantic_ids)
    return TigerModel.from_files({name: storage.read_file(model, name) for name in MODEL_FILES})


def require_same_id_space(model: Manifest, semantic_ids: Manifest) -> None:
    """Refuse a model that was trained on other Semantic IDs, from the manifests alone.

    Raises:
        ArtifactError: names both ID spaces.
    """
    if model.metadata["space"] != id_space(semantic_ids):
        raise ArtifactError(
            f"model {model.run_id} was trained on ID space {model.metadata['space']}, but Semantic IDs "
            f"{semantic_ids.run_id} are of {id_space(semantic_ids)}; train a model on them (jobs/train_model.py)"
        )


@dataclass(frozen=True)
class Examples:
    """All examples of a set of histories, and the batches they make."""

    item_index: npt.NDArray[np.int32]
    """Events of all users, each user's oldest first, (E,)."""
    lengths_U: npt.NDArray[np.int64]
    """Events per user that training may see."""
    user_hash_U: npt.NDArray[np.uint64]
    """Hash of the user id, for user buckets."""
    max_history: int
    """Most recent items of a history that the model reads, H."""

    @classmethod
    def load(cls, storage: Storage, sequences: Manifest, holdout: str, max_history: int) -> Examples:
        """Read every user shard; events hidden by the holdout are not even kept."""
        items, lengths, hashes = [], [], []
        for entry in user_shards(sequences):
            table = storage.read_table(
                sequences, entry.name, columns=["history", "user_hash"]
            ).combine_chunks()
            history = table.column("history").combine_chunks()
            whole = np.diff(history.offsets.to_numpy()).astype(np.int64)
            seen = training_lengths(whole, HELD_OUT if holdout == "leave_one_out" else 0)
            first = np.cumsum(whole) - whole
            items.append(history.flatten().to_numpy()[ranges(first, seen)])
            lengths.append(seen)
            hashes.append(table.column("user_hash").to_numpy())
        return cls(np.concatenate(items), np.concatenate(lengths), np.concatenate(hashes), max_history)

    @cached_property
    def _first_event_U(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.lengths_U) - self.lengths_U

    @cached_property
    def _first_example_U(self) -> npt.NDArray[np.int64]:
        per_user = np.maximum(self.lengths_U - 1, 0)
        return np.cumsum(per_user) - per_user

    def __len__(self) -> int:
        return int(np.maximum(self.lengths_U - 1, 0).sum())

    def locate(self, example: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """User, and place of the target in the user's history (at least 1), of each example; same shape."""
        user = np.searchsorted(self._first_example_U, example, side="right") - 1
        return user, example - self._first_example_U[user] + 1

    def batches(
        self, batch_size: int, *, seed: int, start: int = 0
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """User and place of each example of each global batch from step `start` on, without end; (B,) each.

        Every epoch is one permutation of all examples; windows of it are sorted by length into batches.
        """
        window_size = BATCHES_PER_WINDOW * batch_size
        for window in range(start // BATCHES_PER_WINDOW, 2**62):
            example = self._permuted(window * window_size, window_size, seed)
            user, place = self.locate(example)
            by_length = np.argsort(np.minimum(place, self.max_history), kind="stable").reshape(-1, batch_size)
            order = np.random.default_rng([seed, 1, window]).permutation(BATCHES_PER_WINDOW)
            for batch in by_length[order][start % BATCHES_PER_WINDOW :]:
                yield user[batch], place[batch]
            start = 0

    def _permuted(self, first: int, count: int, seed: int) -> npt.NDArray[np.int64]:
        """Examples number `first` to `first + count` of an endless row of epochs."""
        parts: list[npt.NDArray[np.int64]] = []
        while count:
            epoch, place = divmod(first, len(self))
            if self._epochs.get("number") != epoch:
                self._epochs.update(
                    number=epoch, order=np.random.default_rng([seed, 0, epoch]).permutation(len(self))
                )
            parts.append(self._epochs["order"][place : place + count])
            first += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)

    @cached_property
    def _epochs(self) -> dict[str, Any]:
        return {}

    def tokens(
        self,
        user: npt.NDArray[np.int64],
        place: npt.NDArray[np.int64],
        item_tokens_NI: Tensor,
        vocabulary: Vocabulary,
    ) -> tuple[Tensor, Tensor]:
        """Token ids of histories, (B, T) int64, and of their next items, (B, I) int64."""
        lengths = np.minimum(place, self.max_history)
        end = self._first_event_U[user] + place
        user_tokens = None
        if vocabulary.num_user_buckets:
            user_tokens = torch.from_numpy(
                user_buckets(self.user_hash_U[user], vocabulary) + vocabulary.user_offset
            )
        read, target = (
            item_tokens_NI[
                torch.from_numpy(self.item_index[place].astype(np.int64)).to(item_tokens_NI.device)
            ]
            for place in (ranges(end - lengths, lengths), end)
        )
        return pad_histories(read, torch.from_numpy(lengths), user_tokens), target


def user_buckets(user_hash: npt.NDArray[np.uint64], vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """Bucket of each user, (B,) int64. Source: paper section 4 (hashing trick for user ids)."""
    return (user_hash % np.uint64(vocabulary.num_user_buckets)).astype(np.int64)


def fit(
    network: nn.Module,
    examples: Examples,
    item_tokens_NI: Tensor,
    vocabulary: Vocabulary,
    settings: TrainingSettings,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    checkpoint: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """One worker's training loop, from step `start` to `settings.num_steps`.

    Args:
        network: the model, wrapped for DDP where there are several workers.
        examples: of all users; this worker takes every `world_size`-th of each global batch.
        item_tokens_NI: token ids by item_index, (N, I) int64, on the device of the network.
        vocabulary: of the model.
        settings: batch size, schedule, precision.
        optimizer: over the parameters of the network, continued if `start` is not 0.
        seed: of batches and dropout.
        rank: of this worker.
        world_size: workers in all.
        start: steps done already.
        checkpoint: called with steps done and the mean loss since the last call, every
            `checkpoint_every_steps` and at the end.

    Returns:
        The mean loss that the last checkpoint got.

    Raises:
        TigerError: the loss is not finite; the last checkpoint is still good.
    """
    device = item_tokens_NI.device
    batches = examples.batches(settings.global_batch_size, seed=seed, start=start)
    meter = Meter(settings.log_every_steps, start, settings.num_steps, device)
    # Apart from the meter's, so that neither a resumed run nor another log interval changes the curve.
    mean_loss, loss_sum, counted = math.nan, torch.zeros((), device=device), 0
    network.train()
    for step in range(start, settings.num_steps):
        user, place = (column[rank::world_size] for column in next(batches))
        history_BT, target_BI = examples.tokens(user, place, item_tokens_NI, vocabulary)
        torch.manual_seed(
            hash((seed, step, rank)) % 2**63
        )  # dropout follows from the step, so resuming is exact
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = network(history_BT, target_BI).mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
        meter.add(step, loss.detach(), history_BT, show=rank == 0)
        loss_sum += loss.detach()
        counted += 1
        if (step + 1) % settings.checkpoint_every_steps == 0 or step + 1 == settings.num_steps:
            mean_loss = mean_over_workers(loss_sum, counted, step)
            checkpoint(step + 1, mean_loss)
            loss_sum, counted = torch.zeros_like(loss_sum), 0
    return mean_loss


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW; norms, which only scale, are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


class Meter:
    """Running loss and speed, printed now and then."""

    def __init__(self, every: int, start: int, num_steps: int, device: torch.device) -> None:
        self._every, self._num_steps = every, num_steps
        self._loss = torch.zeros((), device=device)
        self._steps = self._examples = self._tokens = self._padded = 0
        self._since = time.monotonic()

    def add(self, step: int, loss: Tensor, history_BT: Tensor, *, show: bool) -> None:
        """Count one step; every so many steps, print and start again."""
        self._loss += loss
        self._steps += 1
        self._examples += len(history_BT)
        self._tokens += int((history_BT != 0).sum()) if not history_BT.is_cuda else 0
        self._padded += history_BT.numel()
        if self._steps < self._every and step + 1 < self._num_steps:
            return
        mean, seconds = mean_over_workers(self._loss, self._steps, step), time.monotonic() - self._since
        if show:
            padding = f"  padding {1 - self._tokens / self._padded:.0%}" if self._tokens else ""
            rate = self._examples / seconds
            print(
                f"step {step + 1:,}/{self._num_steps:,}  loss {mean:.4f}  {rate:,.0f} examples/s per worker{padding}",
                flush=True,
            )
        self._loss.zero_()
        self._steps = self._examples = self._tokens = self._padded = 0
        self._since = time.monotonic()


def mean_over_workers(loss_sum: Tensor, steps: int, step: int) -> float:
    """Mean loss of the last `steps` steps, over all workers.

    Raises:
        TigerError: it is not finite.
    """
    total = torch.stack([loss_sum, torch.full_like(loss_sum, steps)])
    if dist.is_initialized():
        dist.all_reduce(total)
    mean = float(total[0] / total[1])
    if not math.isfinite(mean):
        raise TigerError(
            f"the training loss became {mean} at or before step {step + 1}; the last checkpoint is good. "
            "Lower training.learning_rate, or try training.precision fp32"
        )
    return mean


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, curve: list[Any]
) -> None:
    """Everything a resumed run needs, as safetensors and JSON."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (folder / "state.safetensors").write_bytes(safetensors.torch.save(tensors))
    (folder / "state.json").write_text(json.dumps({"step": step, "curve": curve}))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[Any]]:
    """Put a saved state into model and optimizer; returns steps done and the loss curve.

    Raises:
        ArtifactError: the state is of another model.
    """
    tensors = safetensors.torch.load((folder / "state.safetensors").read_bytes())
    state = json.loads((folder / "state.json").read_text())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            saved = tensors.get(f"model.{name}")
            if saved is None or saved.shape != parameter.shape:
                found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
                raise ArtifactError(
                    f"checkpoint tensor {name} {found}; this model wants {tuple(parameter.shape)}"
                )
            parameter.copy_(saved)
            prefix = f"optimizer.{name}."
            slots = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
            # The step count too: a fused optimizer reads it on the device of the parameter.
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in slots.items()}
    return int(state["step"]), list(state["curve"])


def _compute(
    run: Run, settings: Settings, storage: Storage, sequences: Manifest, semantic_ids: Manifest
) -> Computed:
    done = run.finished()
    if not all(name in done for name in (*MODEL_FILES, "curve.json")):
        training = settings.training
        if not sequences.metadata[f"examples_{training.holdout}"]:
            raise DataError(
                f"no training example: none of {sequences.metadata['users']:,} users has two events that "
                f"training may see (training.holdout is {training.holdout!r})"
            )
        arguments = {
            "settings": settings,
            "storage": storage,
            "sequences": sequences,
            "semantic_ids": semantic_ids,
        }
        run_workers(_train_worker, arguments, run=run, date=settings.date, settings=training)
        done = run.finished()
    curve = json.loads(run.read_file(done["curve.json"]))
    final = curve[-1]
    return [done[name] for name in (*MODEL_FILES, "curve.json")], {
        "summary": f"{final['step']:,} steps of {settings.training.global_batch_size}, loss {final['loss']:.3f}, "
        f"holdout {settings.training.holdout}",
        "space": id_space(semantic_ids),
        "level_sizes": semantic_ids.metadata["level_sizes"],
        "holdout": settings.training.holdout,
        "loss": final["loss"],
    }


def _train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    logging.disable(logging.INFO)  # Ray Train logs each report of each worker
    run, settings, storage = config["run"], config["settings"], config["storage"]
    rank, world_size, device = this_worker(settings.training.cpus_per_worker)
    ids = load_semantic_ids(storage, config["semantic_ids"])
    vocabulary = Vocabulary(ids.level_sizes, settings.model.num_user_buckets)
    examples = Examples.load(
        storage, config["sequences"], settings.training.holdout, settings.model.max_history
    )
    if rank == 0:
        print(f"training on {len(examples):,} examples, workers: {world_size}", flush=True)
    torch.manual_seed(settings.seed)
    model = TigerModel(settings.model, vocabulary).to(device)
    optimizer = make_optimizer(model, settings.training)
    start, curve = 0, list[Any]()
    resumed = ray.train.get_checkpoint()
    if resumed is not None:
        with resumed.as_directory() as folder:
            start, curve = load_state(Path(folder), model, optimizer)
        print(f"training resumes at step {start:,}", flush=True)
    network = ray.train.torch.prepare_model(model)

    def checkpoint(step: int, loss: float) -> None:
        curve.append({"step": step, "loss": loss})
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                save_state(Path(folder), model, optimizer, step, curve)
            ray.train.report(
                {"step": step, "loss": loss},
                checkpoint=ray.train.Checkpoint.from_directory(folder) if rank == 0 else None,
            )

    fit(
        network,
        examples,
        vocabulary.item_tokens(ids.codes_NI).to(device),
        vocabulary,
        settings.training,
        optimizer,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
        start=start,
        checkpoint=checkpoint,
    )
    if rank == 0:
        for name, data in model.to_files().items():
            run.write_file(name, data)
        run.write_file("curve.json", json.dumps(curve).encode())
