"""Section `training`: batches, learning rate, validation and workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tiger_ray.settings.base import Count, CountOrZero, Positive, WorkerGroup, operational


class TrainingSettings(WorkerGroup):
    """Histories to a model."""

    holdout: Literal["leave_one_out", "time", "none"] = "leave_one_out"
    """Events hidden from training. `leave_one_out`: each user's last two, for validation and test. `time`: all events
    from `sequences.validation_from` on; the targets are a user's first events of the validation and of the test
    period. `none`: no event, to train a model for production on all."""
    warm_start: bool = False
    """Start from the weights of the last model published before this night; refused if that model has another ID
    space or another shape."""
    num_steps: Count = 20_000
    """Optimizer steps at most."""
    global_batch_size: Count = 256
    """Examples per optimizer step over all workers."""
    events_in_memory: Count = 500_000_000
    """Events at most that each worker holds in memory, at 4 bytes per event and 16 per user. Longer logs are streamed,
    some user shards at a time, and then the examples come in another order."""
    optimizer: Literal["adamw", "adafactor"] = "adafactor"
    """Adafactor, as in the paper, scales each step by the size of the weights. AdamW moves all weights equally far,
    although T5 starts with embeddings 10 to 90 times as large as its other weights (try a learning rate of 1e-3 and
    a decay)."""
    learning_rate: Positive = 0.01
    """Highest learning rate; torch's Adafactor never uses more than 1 / sqrt(step)."""
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    """Learning rate after the warm-up: a cosine to zero at the last step, or a fall with the square root of the step."""
    warmup_steps: CountOrZero = 500
    """Steps in which the learning rate rises linearly from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay of matrices; vectors have none."""
    max_grad_norm: Positive = 1.0
    """Clip the gradient to this norm."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target's probability that is spread over all tokens of `model.softmax`."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of matrix products; weights and optimizer stay fp32. A device without bf16 instructions computes in
    fp32 and logs that, because bf16 would take more than 30 times as long there."""
    batch_tokens: Count | None = None
    """Tokens that a worker computes at once; this sets memory. A worker accumulates its share of a global batch over
    several such batches if need be. Empty: 16,384 on a CPU and 262,144 on a GPU."""
    validation_users: CountOrZero = 2000
    """Users whose validation event is ranked at each checkpoint (beam 20); the checkpoint with the best NDCG@10
    becomes the model. With 0, or with `holdout` none, the last checkpoint becomes the model."""
    patience: Count | None = None
    """Stop after this number of checkpoints without a better NDCG@10. Empty: never."""
    checkpoint_every_steps: Count = 1000
    """Steps between checkpoints on storage; a killed run repeats this number of steps at most."""
    log_every_steps: Count = operational(100)
    """Steps between log lines."""
