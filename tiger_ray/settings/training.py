"""Section `training`: batches, learning rate, validation and workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tiger_ray.settings.base import Count, CountOrZero, Positive, WorkerGroup, operational


class TrainingSettings(WorkerGroup):
    """Histories to a model."""

    holdout: Literal["leave_one_out", "time", "none"] = "leave_one_out"
    """Events hidden from training: each user's last two (validation, test), all from `sequences.validation_from`
    on (targets are a user's first of the validation and of the test period), or none for a production refit."""
    warm_start: bool = False
    """Begin with the weights of the last model published before this night; refused if its ID space or its
    shape is another."""
    num_steps: Count = 20_000
    """Optimizer steps at most."""
    global_batch_size: Count = 256
    """Examples per optimizer step over all workers."""
    events_in_memory: Count = 500_000_000
    """Events that each worker holds in memory, at 4 bytes each and 16 per user; longer logs are streamed, some
    user shards at a time, which also orders the examples in another way."""
    optimizer: Literal["adamw", "adafactor"] = "adafactor"
    """Adafactor, as in the paper, scales each step by the size of the weights: T5 begins with embeddings 10 to 90
    times as large as its other weights, and AdamW moves all of them equally far (try 1e-3 for it, and a decay)."""
    learning_rate: Positive = 0.01
    """Peak step size; torch's Adafactor also never takes more than 1 / sqrt(step)."""
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    """After the warm-up: a cosine to zero at the last step, or a fall with the square root of the step."""
    warmup_steps: CountOrZero = 500
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay, of matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradient clipping."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target's probability that is spread over all that `model.softmax` normalizes over."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of matrix products; weights and optimizer stay fp32. A device without bf16 instructions, where
    bf16 would take 30 times as long and more, computes in fp32 and says so."""
    batch_tokens: Count | None = None
    """Tokens that a worker computes at once, which sets memory; its share of a global batch is accumulated over
    several such batches if it holds more; empty: 16,384 on a CPU and 262,144 on a GPU."""
    validation_users: CountOrZero = 2000
    """Users whose validation event is ranked at each checkpoint (beam 20); the checkpoint of the best NDCG@10
    becomes the model. 0, or `holdout` none: the last one does."""
    patience: Count | None = None
    """Stop after so many checkpoints without a better NDCG@10; empty: never."""
    checkpoint_every_steps: Count = 1000
    """Steps between checkpoints on storage; a killed run repeats at most so many."""
    log_every_steps: Count = operational(100)
    """Steps between log lines."""
