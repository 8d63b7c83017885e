"""The training loop: batches of examples to weights, on one worker or on one of many.

No Ray here: `training.py` starts the workers, and a bare machine with a GPU can call `fit` itself.

B examples of one batch, T history tokens, I id_length, N items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tiger_ray.checkpoints import Progress
from tiger_ray.config import TrainingSettings
from tiger_ray.errors import TigerError
from tiger_ray.examples import Batch
from tiger_ray.model import TigerModel
from tiger_ray.precision import dtype_of
from tiger_ray.tokens import Vocabulary, pad_histories, user_buckets
from tiger_ray.training_log import LossWindow, TrainingLog


def fit(
    network: TigerModel | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Sequence[Batch]],
    codes_NI: npt.NDArray[np.int16],
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
        network: the model, wrapped for DDP where there are several workers.
        optimizer: over the parameters of the network, as it was at `progress.step`.
        batches: this worker's share of each step from `progress.step` on, in one or several parts.
        codes_NI: Semantic IDs by item_index, (N, I) int16.
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
    model: TigerModel = network if isinstance(network, TigerModel) else network.module
    device = model.shared.weight.device
    dtype = dtype_of(settings.precision, device)
    loss_window = LossWindow(device)
    # DDP averages over workers, whose shares may differ by one example
    scale = world_size / (settings.global_batch_size * model.vocabulary.id_length)
    network.train()
    for step in range(progress.step, settings.num_steps):
        # dropout follows from the step, so resuming is exact
        torch.manual_seed(hash((seed, step, rank)) % 2**63)
        parts = next(batches)
        for left, batch in enumerate(parts, 1 - len(parts)):
            history_BT, target_BI = (each.to(device) for each in tokens_of(batch, codes_NI, model.vocabulary))
            with (
                network.no_sync() if left and isinstance(network, DistributedDataParallel) else nullcontext()
            ):
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss_BI = network(history_BT, target_BI, settings.label_smoothing)
                (loss_BI.sum() * scale).backward()
            loss_window.add(step, loss_BI)
            log.add_batch(step, loss_BI, batch.lengths_B, history_BT.numel())
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


def tokens_of(batch: Batch, codes_NI: npt.NDArray[np.int16], vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Token ids of histories, (B, T) int64, and of their next items, (B, I) int64; Semantic IDs are (N, I)."""
    user_tokens = None
    if vocabulary.num_user_buckets:
        user_tokens = torch.from_numpy(user_buckets(batch.user_hash_B, vocabulary) + vocabulary.user_offset)
    read_EI = vocabulary.tokens(codes_NI[batch.item_E])
    history_BT = pad_histories(read_EI, torch.from_numpy(batch.lengths_B), user_tokens)
    return history_BT, vocabulary.tokens(codes_NI[batch.target_B])


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
