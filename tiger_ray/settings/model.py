"""Section `model`: the shape of the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tiger_ray.settings.base import Count, CountOrZero, Section


class ModelSettings(Section):
    """T5-style encoder-decoder over Semantic-ID tokens (defaults: the paper's, section 4)."""

    num_layers: Count = 4
    """Layers of the encoder, and again of the decoder."""
    d_model: Count = 128
    """Width of the residual stream."""
    num_heads: Count = 6
    """Attention heads."""
    d_kv: Count = 64
    """Width of one head."""
    d_ff: Count = 1024
    """Width of the feed-forward layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of activations dropped in training."""
    tie_embeddings: bool = True
    """Use the token embedding as the output layer too (T5 1.0)."""
    softmax: Literal["vocabulary", "level"] = "vocabulary"
    """What a codeword's probability is a share of: all tokens (the paper's, and Hugging Face's), or the codewords
    of its level, which costs one product of that level instead of the whole vocabulary."""
    num_user_buckets: CountOrZero = 0
    """Hash buckets for user tokens (paper: 2000, for a gain that open reproductions do not find); 0: none,
    and the endpoint can then serve histories of nobody in particular."""
    max_history: Count = 20
    """Most recent items of a history that the model reads."""
