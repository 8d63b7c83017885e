"""Histories -> a checkpoint: the paper's sequence-to-sequence training, one loop, on Ray Train or without it.

An example is a user's history cut before one of its events: the model reads the items before it and writes
the Semantic ID of that item. Which examples make up step s follows from the seed and s alone (`examples`),
so a resumed run continues exactly, and any number of workers sees the same global batches.

B examples per step of one worker, T history tokens, I id_length.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiger_ray.config import Settings, TrainingSettings
from tiger_ray.errors import ArtifactError, DataError, TigerError
from tiger_ray.examples import Batch, Examples
from tiger_ray.model import TigerModel
from tiger_ray.registry import id_space, load_semantic_ids, registry_of
from tiger_ray.stage import Computed, StageResult, run_stage
from tiger_ray.storage import Manifest, Run, Storage
from tiger_ray.tokens import Vocabulary, pad_histories
from tiger_ray.workers import run_workers, this_worker

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


def tokens_of(batch: Batch, item_tokens_NI: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Token ids of histories, (B, T) int64, and of their next items, (B, I) int64."""
    user_tokens = None
    if vocabulary.num_user_buckets:
        user_tokens = torch.from_numpy(user_buckets(batch.user_hash_B, vocabulary) + vocabulary.user_offset)
    read, target = (
        item_tokens_NI[torch.from_numpy(items.astype(np.int64)).to(item_tokens_NI.device)]
        for items in (batch.item_E, batch.target_B)
    )
    return pad_histories(read, torch.from_numpy(batch.lengths_B), user_tokens), target


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
        seed: of dropout.
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
    batches = examples.batches(settings.global_batch_size, start=start, rank=rank, world_size=world_size)
    meter = Meter(settings.log_every_steps, start, settings.num_steps, device)
    # Apart from the meter's, so that neither a resumed run nor another log interval changes the curve.
    mean_loss, loss_sum, counted = math.nan, torch.zeros((), device=device), 0
    network.train()
    for step in range(start, settings.num_steps):
        (batch,) = next(batches)
        history_BT, target_BI = tokens_of(batch, item_tokens_NI, vocabulary)
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
    examples = Examples.open(
        storage,
        config["sequences"],
        holdout=settings.training.holdout,
        max_history=settings.model.max_history,
        events_in_memory=settings.training.events_in_memory,
        seed=settings.seed,
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
