"""Stage `embeddings`: item text -> embedding (N, D), in Ray Data actors, one file per catalog file.

An item whose text is the same as last night keeps its embedding: only new and changed items are encoded.

N items in a shard, D embedding width.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import EmbeddingsMetadata
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.shards import map_shards
from tiger_ray.core.hashing import fingerprint, stable_hash
from tiger_ray.errors import ArtifactError
from tiger_ray.ids.encoders import (
    as_matrix,
    check,
    folder_digest,
    make_encoder,
    random_directions,
    refuse_bad_rows,
)
from tiger_ray.settings.embeddings import EmbeddingsSettings
from tiger_ray.stages.stage import Computed, Context, Stage

log = logging.getLogger(__name__)


def _source(context: Context) -> dict[str, Any]:
    weights = folder_digest(context.settings.embeddings)
    return {"weights": weights} if weights else {}


def _compute(run: Run, context: Context) -> Computed:
    settings, storage, catalog = context.settings.embeddings, context.storage, context.inputs["catalog"]
    source = dict(context.source)
    if settings.encoder == "catalog":
        source["vector"] = str(
            context.settings.catalog.vector
        )  # vectors of another column lie in another space
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
    dims = {entry.fact("dim") for entry in entries}
    if len(dims) != 1:
        raise ArtifactError(
            f"embeddings.model gave vectors of different widths in one run, {sorted(dims)}: its files changed between "
            "shards or retries. Set embeddings.revision, or leave the model's folder alone, and run the night again"
        )
    rows, encoded = sum(entry.rows for entry in entries), sum(entry.fact("encoded") for entry in entries)
    log.info("embeddings: %s texts encoded, %s kept", f"{encoded:,}", f"{rows - encoded:,}")
    dim = dims.pop()
    return entries, {"summary": f"{rows:,} items x {dim}, {settings.encoder}", "dim": dim, "encoder": encoder}


def _previous(storage: Storage, encoder: str) -> Manifest | None:
    """The last published embeddings if the same encoder made them, else None."""
    try:
        last = storage.resolve("embeddings")
        same = EmbeddingsMetadata.of(last).encoder == encoder
    except ArtifactError:
        return None
    return last if same and storage.is_intact(last) else None


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
            embedding, encoded = as_matrix(items.column("vector"), shard.name), 0
            text_hash = np.zeros(len(item_id), np.uint64)
        else:
            text_hash = stable_hash(items.column("text"))
            embedding, encoded = self._encode_changed(items, item_id, text_hash, shard)
            blank = pc.equal(items.column("text"), "").to_numpy()
            if self._settings.encoder == "hashing":
                blank |= ~embedding.any(axis=1)  # this encoder reads only words of two letters or more
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
        """Embeddings (N, D), and the number of encoded texts; an item with the text of the last night is not encoded."""
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
        old = as_matrix(before.column("embedding"), shard.name)
        embedding = old[place]
        if len(fresh):
            embedding[fresh] = new
        return embedding, len(fresh)

    def _last_night(self, shard: FileEntry, id_type: pa.DataType) -> pa.Table | None:
        if self._previous is None or shard.name not in {entry.name for entry in self._previous.files}:
            return None
        table = self._storage.read_table(self._previous, shard.name)
        # Ids of another type are other items; the stage semantic_ids refuses them.
        return table if table.num_rows and table.schema.field("item_id").type == id_type else None


STAGE = Stage(
    name="embeddings",
    does="item text -> vectors",
    inputs=("catalog",),
    sections=("embeddings",),
    check=lambda context: check(context.settings),
    source=_source,
    compute=_compute,
    format_version=3,
)
"""Publishes `embeddings`.

Raises:
    SettingsError: the encoder could not be loaded on every machine.
    DataError: an embedding is not finite, or has the same number in every dimension.
"""
