"""Section `quantizer`: how embeddings are turned into codewords."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tiger_ray.settings.base import Count, LevelSize, Positive, Share, WorkerGroup, operational


class QuantizerSettings(WorkerGroup):
    """Embeddings to codewords. A change here starts a new ID space and needs a new model."""

    kind: Literal["rqvae", "residual_kmeans", "lsh", "random", "flat"] = "residual_kmeans"
    """Method. `lsh` (hyperplanes), `random` (hash of the item id) and `flat` (no codewords: each item is one token)
    are the controls of the paper; they learn nothing."""
    level_sizes: Annotated[tuple[LevelSize, ...], Field(min_length=1, max_length=8)] = (256, 256, 256)
    """Codewords of each learned level; a Semantic ID has one more codeword. Not read by `flat`."""
    sample_size: Count | None = 262_144
    """Learn the codebooks from about this number of items; all items get codewords. 1,024 items per codeword are
    plenty for k-means. Empty: all items."""
    validation_share: Share = 0.05
    """Share of the items that the codebooks are not learned from. These items tell when `rqvae` is done, and how
    well new items will fit."""
    num_iterations: Count = 30
    """Lloyd steps per level (`residual_kmeans`)."""
    latent_dim: Count = 32
    """Width of the codewords: the encoder's output (`rqvae`) or the number of principal components
    (`residual_kmeans`). A smaller width makes more items unique and keeps less of the content."""
    hidden_dims: tuple[Count, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers, mirrored in the decoder (`rqvae`)."""
    num_epochs: Count = 1000
    """Passes over the sample, at most (`rqvae`)."""
    batch_size: Count = 1024
    """Items per step, over all workers (`rqvae`)."""
    learning_rate: Positive = 1e-3
    """AdamW step size (`rqvae`)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW weight decay (`rqvae`)."""
    commitment_weight: Positive = 0.25
    """Weight of the commitment loss, beta in the paper (`rqvae`)."""
    version: Count = 1
    """Raise by one to fit a new quantizer on today's catalog; otherwise every night keeps the published quantizer."""
    memory_mb_per_worker: Count = operational(2048)
    """MiB of embeddings that a worker keeps in memory; further embeddings are read from storage again on each pass."""

    @model_validator(mode="after")
    def _levels_fit(self) -> QuantizerSettings:
        if math.prod(self.level_sizes) >= 2**62:
            raise ValueError(
                f"quantizer.level_sizes {self.level_sizes} span more than 2^62 codes; use fewer or smaller levels"
            )
        if self.kind == "lsh" and any(size & (size - 1) for size in self.level_sizes):
            raise ValueError(
                f"quantizer.level_sizes {self.level_sizes} must be powers of two for lsh: one bit per hyperplane"
            )
        return self
