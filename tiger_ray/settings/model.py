"""Section `model`: the shape of the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tiger_ray.settings.base import Count, CountOrZero, Section


class ModelSettings(Section):
    """T5-style encoder-decoder over Semantic-ID tokens (defaults: the paper's, section 4)."""

    num_layers: Count = 4
    """Layers of the encoder; the decoder has as many."""
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
    """Use the token embedding as the output layer too, as T5 1.0 does."""
    softmax: Literal["vocabulary", "level"] = "vocabulary"
    """Tokens that a softmax covers: the whole `vocabulary`, as in the paper and in Hugging Face's T5, or the codewords
    of one `level`, which is cheaper: one matrix product with that level instead of the whole vocabulary."""
    num_user_buckets: CountOrZero = 0
    """Hash buckets for user tokens. The paper has 2000, but open reproductions find no gain. 0: no user token, so the
    endpoint can serve a history without a user id."""
    max_history: Count = 20
    """Most recent items of a history that the model reads."""
