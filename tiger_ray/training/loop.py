"""The training loop: batches of examples to weights, on one worker or on one of many.

The loop trains any network that turns histories into losses; a `Collate` turns a batch into the network's inputs.
This module needs no Ray: `stages.model` starts the workers, and a script on one machine can call `fit`.

B examples of one batch, I id_length.
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
from tiger_ray.training.collate import Collate
from tiger_ray.training.examples import Batch
from tiger_ray.training.log import LossWindow, TrainingLog

BATCH_TOKENS = {"cpu": 16_384, "cuda": 262_144}
"""Default of `training.batch_tokens`, by type of device."""


def fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Sequence[Batch]],
    collate: Collate,
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
        network: the model, wrapped in DDP if there are several workers. Its forward takes the inputs of `collate`
            and the label smoothing, and returns losses, (B, I).
        optimizer: over the parameters of the network, in its state at `progress.step`.
        batches: this worker's share of each step from `progress.step` on, in one or several parts.
        collate: turns a batch into the network's inputs.
        settings: section `training`: schedule, precision, batch size over all workers.
        progress: of the run; updated at each checkpoint.
        log: receives every batch, step and checkpoint.
        seed: of dropout.
        rank: rank of this worker, from 0.
        world_size: number of workers.
        validate: gives the metrics of the current model, equal on all workers.
        save: called at each checkpoint: every `training.checkpoint_every_steps` steps, and at the end.

    Raises:
        TigerError: the loss or a weight is not finite; the last checkpoint is still good.
    """
    if progress.is_stale(settings.patience):
        return
    model: nn.Module = network.module if isinstance(network, DistributedDataParallel) else network
    device = next(model.parameters()).device
    dtype = dtype_of(settings.precision, device)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN lacks the gradient of the position bias
    loss_window = LossWindow(device)
    network.train()
    for step in range(progress.step, settings.num_steps):
        # Dropout follows from the step, so resuming is exact.
        torch.manual_seed(hash((seed, step, rank)) % 2**63)
        parts = next(batches)
        for left, batch in enumerate(parts, 1 - len(parts)):
            collated = collate(batch)
            inputs = [to_device(each, device) for each in collated.inputs]
            with (
                network.no_sync() if left and isinstance(network, DistributedDataParallel) else nullcontext()
            ):
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss_BI = network(*inputs, settings.label_smoothing)
                # DDP averages over workers, whose shares may differ by one example, so undo its division.
                scale = world_size / (settings.global_batch_size * loss_BI.shape[1])
                (loss_BI.sum() * scale).backward()
            loss_window.add(step, loss_BI)
            log.add_batch(step, loss_BI, collated.tokens, collated.padded, collated.operations)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.end_step(step, learning_rate(step, settings))
        if (step + 1) % settings.checkpoint_every_steps == 0 or step + 1 == settings.num_steps:
            with log.pause():
                loss = loss_window.mean()
                require_finite(model, step + 1)
                progress.add(step + 1, loss, validate(), model)
                log.add_checkpoint(progress.curve[-1])
                save(progress)
            if progress.is_stale(settings.patience):
                break


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; pinned memory makes the copy to a GPU asynchronous."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def require_finite(model: nn.Module, step: int) -> None:
    """Refuse weights that are not finite, before a checkpoint saves them.

    Raises:
        TigerError: a weight is not finite; all workers raise, because their weights are equal.
    """
    if not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        raise TigerError(
            f"a weight was not a finite number after step {step:,}, though the loss before it was finite; the "
            "last checkpoint is good. Lower training.learning_rate, or try training.precision fp32"
        )


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate of a step, counted from 0: linear warm-up to the peak, then a decay.

    The decay is a cosine to zero at the last step, or the peak times the root of warm-up steps over steps.

    Source: Vaswani et al. 2017, section 5.3, for the inverse root; TIGER's schedule is constant during warm-up.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "inverse_sqrt":
        return settings.learning_rate * math.sqrt(max(warmup, 1) / (step + 1))
    progress = (step - warmup) / max(1, settings.num_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW or Adafactor, without weight decay of norms and biases."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
