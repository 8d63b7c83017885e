"""Catalog rows -> items: validated, with one clean text each, in files by a hash of the item id.

Everything downstream trusts this artifact: ids are unique and never null, text is unescaped and bounded,
`available` is true for an item that may be recommended tonight.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts.files import shard_name
from tiger_ray.artifacts.manifest import FileEntry
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.store import InputFile
from tiger_ray.cluster.reading import name_bad_file, read_columns
from tiger_ray.cluster.shards import write_partitions
from tiger_ray.data.catalog import (
    repeated_ids,
    require_readable,
    require_usable,
    vector_type,
    wanted_columns,
)
from tiger_ray.data.inputs import id_type, list_inputs, read_input_schema
from tiger_ray.data.text import clean_rows
from tiger_ray.settings.catalog import CatalogSettings
from tiger_ray.stages.stage import Computed, Context, Stage


def _source(context: Context) -> dict[str, Any]:
    return {"files": [asdict(file) for file in list_inputs(context.settings.catalog.uri)]}


def _compute(run: Run, context: Context) -> Computed:
    settings = context.settings.catalog
    files = [InputFile(**file) for file in context.source["files"]]
    wanted = wanted_columns(settings)
    schema, rows = read_input_schema(files, settings.uri, wanted)
    item_id_type = id_type(schema, settings.item_id, settings.uri)
    vectors = vector_type(schema, settings)
    require_readable(schema, settings)

    with name_bad_file(files, settings.uri, wanted.values()):
        dataset = read_columns(files, settings.uri, wanted.values()).map_batches(
            clean_rows,
            fn_args=(settings, item_id_type, vectors),
            batch_size=None,
            batch_format="pyarrow",
        )
        entries = write_partitions(dataset, _WriteShard(run, settings), num_shards=settings.num_shards)
    items = sum(entry.rows for entry in entries)
    empty = sum(entry.fact("empty_text") for entry in entries)
    assert items == rows, f"{rows} rows were read and {items} written"
    available = sum(entry.fact("available") for entry in entries)
    require_usable(items, empty, available, settings)
    return entries, {
        "summary": f"{items:,} items, {available:,} available, {empty:,} without text",
        "items": items,
        "empty_text": empty,
        "available": available,
        "id_type": str(item_id_type),
    }


class _WriteShard:
    """Checks and writes one shard of the catalog."""

    def __init__(self, run: Run, settings: CatalogSettings) -> None:
        self._run = run
        self._settings = settings

    def __call__(self, rows: pa.Table, shard: int) -> FileEntry:
        rows = rows.sort_by("item_id").combine_chunks()
        item_id = rows.column("item_id").combine_chunks()
        again = pc.equal(item_id.slice(1), item_id.slice(0, len(item_id) - 1))
        if pc.any(again).as_py():
            twice = item_id.slice(1).filter(again)
            raise repeated_ids(len(twice), twice.unique()[:10].to_pylist(), self._settings)
        facts = {
            "empty_text": pc.sum(pc.equal(rows.column("text"), "")).as_py(),
            "available": pc.sum(rows.column("available")).as_py(),
        }
        return self._run.write_table(shard_name(shard), rows, facts=facts)


STAGE = Stage(
    name="catalog",
    does="items, checked, with one clean text each",
    inputs=(),
    sections=("catalog",),
    source=_source,
    compute=_compute,
    format_version=2,
)
"""Publishes `catalog`.

Raises:
    DataError: no item, a column is missing or mistyped, an id is null or comes twice, too many items
        have no text.
"""
