"""The published registry of Semantic IDs, read without Ray."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from tiger_ray.artifacts.lineage import segments_of
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import SemanticIdsMetadata
from tiger_ray.artifacts.objects import Objects
from tiger_ray.ids.semantic_ids import SemanticIds


def load_semantic_ids(storage: Objects, manifest: Manifest) -> SemanticIds:
    """The published registry with tonight's eligibility, checked; the item ids stay on disk, memory-mapped."""
    segments = (storage.read_table(manifest, entry) for entry in segments_of(manifest))
    eligible = storage.read_table(manifest, "eligible.parquet").column("eligible").combine_chunks()
    level_sizes = SemanticIdsMetadata.of(manifest).level_sizes
    mapped = _memory_mapped(segments)
    pieces = [pa.Table.from_batches([batch]) for batch in mapped.to_batches()] or [mapped]
    ids = SemanticIds.from_segments(pieces, level_sizes, eligible)
    # Arrow keeps the freed memory of reading, which is more than the registry itself.
    pa.default_memory_pool().release_unused()
    return ids


def load_item_ids(storage: Objects, manifest: Manifest) -> pa.ChunkedArray:
    """Item ids in the order of item_index, without the codes; the ids stay on disk, memory-mapped."""
    entries = segments_of(manifest)
    tables = (storage.read_table(manifest, entry, columns=["item_id"]) for entry in entries)
    return _memory_mapped(tables).column("item_id")


def load_report(storage: Objects, manifest: Manifest) -> dict[str, Any]:
    """The ID report, see `ids.report.id_report`, and under `sample` the report of `ids.report.sample_report`."""
    report: dict[str, Any] = json.loads(storage.read_file(manifest, newest_of(manifest, "report")))
    return report


def newest_of(link: Manifest, what: str) -> FileEntry:
    """The newest file of a kind, `counts` or `report`, in a link of the registry."""
    return max((entry for entry in link.files if entry.name.startswith(f"{what}-")), key=lambda e: e.name)


def item_ids_of(
    storage: Objects, link: Manifest, entries: list[FileEntry], item_id_type: pa.DataType
) -> pa.ChunkedArray:
    """Item ids of some files of the registry, in the order of the files.

    Args:
        storage: where the registry lies.
        link: manifest of the registry.
        entries: files of the registry to read.
        item_id_type: type of the ids in the answer.
    """
    columns = (storage.read_table(link, entry, columns=["item_id"]).column("item_id") for entry in entries)
    chunks = [chunk for column in columns for chunk in column.cast(item_id_type).chunks]
    return pa.chunked_array(chunks, item_id_type)


def _memory_mapped(tables: Iterable[pa.Table]) -> pa.Table:
    """The concatenated tables, in an unnamed file that the operating system reads as needed."""
    with tempfile.NamedTemporaryFile() as file:
        writer = None
        for table in tables:
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
        assert writer is not None, "a registry has at least one segment"
        writer.close()
        file.flush()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()
