"""The training loop: batches of examples to weights, on one worker or on one of many.

It trains any network that turns histories into losses; a `Task` says how such a network reads a batch. No Ray
here: `training.py` starts the workers, and a bare machine with a GPU can call `fit` itself.

B examples of one batch, T history tokens, I id_length, N items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tiger_ray.core.precision import dtype_of
from tiger_ray.errors import TigerError
from tiger_ray.settings.training import TrainingSettings
from tiger_ray.training.checkpoints import Progress
from tiger_ray.training.collate import Task
from tiger_ray.training.examples import Batch
from tiger_ray.training.log import LossWindow, TrainingLog

BATCH_TOKENS = {"cpu": 16_384, "cuda": 262_144}
"""Default of `training.batch_tokens`, by kind of device."""


def fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Sequence[Batch]],
    task: Task,
    settings: TrainingSettings,
    progress: Progress,
    log: TrainingLog,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    validate: Callable[[], Mapping[str, float]] = dict,
    save: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """One worker's training loop, from `progress.step` to the last step or the end of patience.

    Args:
        network: the model, wrapped for DDP where there are several workers; its forward takes what `task` gives
            and the label smoothing, and returns losses, (B, I).
        optimizer: over the parameters of the network, as it was at `progress.step`.
        batches: this worker's share of each step from `progress.step` on, in one or several parts.
        task: how the network reads a batch.
        settings: schedule, precision, batch size over all workers.
        progress: what is done; brought up to date at each checkpoint.
        log: gets every step.
        seed: of dropout.
        rank: of this worker.
        world_size: workers in all.
        validate: metrics of the model as it is, the same on all workers.
        save: called at each checkpoint, every `checkpoint_every_steps` and at the end.

    Raises:
        TigerError: the loss or a weight is not finite; the last checkpoint is still good.
    """
    if progress.is_stale(settings.patience):
        return
    model: nn.Module = network.module if isinstance(network, DistributedDataParallel) else network
    device = next(model.parameters()).device
    dtype = dtype_of(settings.precision, device)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it knows no gradient of the position bias
    loss_window = LossWindow(device)
    network.train()
    for step in range(progress.step, settings.num_steps):
        # dropout follows from the step, so resuming is exact
        torch.manual_seed(hash((seed, step, rank)) % 2**63)
        parts = next(batches)
        for left, batch in enumerate(parts, 1 - len(parts)):
            work = task(batch)
            inputs = [moved(each, device) for each in work.inputs]
            with (
                network.no_sync() if left and isinstance(network, DistributedDataParallel) else nullcontext()
            ):
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss_BI = network(*inputs, settings.label_smoothing)
                # DDP averages over workers, whose shares may differ by one example
                scale = world_size / (settings.global_batch_size * loss_BI.shape[1])
                (loss_BI.sum() * scale).backward()
            loss_window.add(step, loss_BI)
            log.add_batch(step, loss_BI, work.tokens, work.padded, work.operations)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.end_step(step, learning_rate(step, settings))
        if (step + 1) % settings.checkpoint_every_steps == 0 or step + 1 == settings.num_steps:
            with log.paused():
                loss = loss_window.mean()
                require_finite(model, step + 1)
                progress.add(step + 1, loss, validate(), model)
                log.add_checkpoint(progress.curve[-1])
                save(progress)
            if progress.is_stale(settings.patience):
                break


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; for a GPU by way of pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def require_finite(model: nn.Module, step: int) -> None:
    """Refuse weights that would make every later loss bad, and a bad checkpoint the last one.

    Raises:
        TigerError: a weight is not finite, which all workers find alike.
    """
    if not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        raise TigerError(
            f"a weight was not a finite number after step {step:,}, though the loss before it was; the last "
            "checkpoint is good. Lower training.learning_rate, or try training.precision fp32"
        )


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up to the peak; then a cosine to zero at the last step, or the peak times the root of
    warm-up steps over steps (source: Vaswani et al. 2017, section 5.3; the paper's own schedule is constant
    where this one warms up)."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "inverse_sqrt":
        return settings.learning_rate * math.sqrt(max(warmup, 1) / (step + 1))
    progress = (step - warmup) / max(1, settings.num_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW or Adafactor; norms, which only scale, are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
