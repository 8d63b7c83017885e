"""Catalog rows -> items: validated, with one clean text each, in files by a hash of the item id.

Everything downstream trusts this artifact: ids are unique and never null, text is unescaped and bounded,
`available` says whether an item may be recommended tonight.
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
from tiger_ray.cluster.reading import blamed, read_columns
from tiger_ray.cluster.shards import write_partitions
from tiger_ray.data.inputs import id_type, list_inputs, read_input_schema
from tiger_ray.data.text import clean_rows
from tiger_ray.errors import DataError
from tiger_ray.settings.catalog import CatalogSettings
from tiger_ray.stages.stage import Computed, Context, Stage


def _source(context: Context) -> dict[str, Any]:
    return {"files": [asdict(file) for file in list_inputs(context.settings.catalog.uri)]}


def _compute(run: Run, context: Context) -> Computed:
    settings = context.settings.catalog
    files = [InputFile(**file) for file in context.source["files"]]
    wanted = {"catalog.item_id": settings.item_id}
    wanted |= {f"catalog.text[{place}]": column for place, column in enumerate(settings.text)}
    for name in ("title", "category", "available", "vector"):
        if getattr(settings, name) is not None:
            wanted[f"catalog.{name}"] = getattr(settings, name)
    schema, rows = read_input_schema(files, settings.uri, wanted)
    item_id_type = id_type(schema, settings.item_id, settings.uri)
    vector_type = _vector_type(schema, settings)
    _require_readable(schema, settings)

    with blamed(files, settings.uri, wanted.values()):
        dataset = read_columns(files, settings.uri, wanted.values()).map_batches(
            clean_rows,
            fn_args=(settings, item_id_type, vector_type),
            batch_size=None,
            batch_format="pyarrow",
        )
        entries = write_partitions(dataset, _Finish(run, settings), num_shards=settings.num_shards)
    items = sum(entry.rows for entry in entries)
    empty = sum(int(entry.facts["empty_text"]) for entry in entries)
    if empty > settings.max_empty_text_share * items:
        raise DataError(
            f"{empty:,} of {items:,} items of {settings.uri} have no text in {', '.join(settings.text)}; at most "
            f"{settings.max_empty_text_share:.0%} may (catalog.max_empty_text_share). Name other columns in catalog.text."
        )
    assert items == rows, f"{rows} rows were read and {items} written"
    available = sum(int(entry.facts["available"]) for entry in entries)
    if available == 0:
        raise DataError(
            f"none of the {items:,} items of {settings.uri} is available ({settings.available} is never true)"
        )
    return entries, {
        "summary": f"{items:,} items, {available:,} available, {empty:,} without text",
        "items": items,
        "empty_text": empty,
        "available": available,
        "id_type": str(item_id_type),
    }


def _require_readable(schema: pa.Schema, settings: CatalogSettings) -> None:
    """Refuse columns that are no text, and an `available` that is neither true nor false."""
    for name in dict.fromkeys([*settings.text, settings.title, settings.category]):
        if name is None:
            continue
        found = schema.field(name).type
        inner = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else found
        inner = inner.value_type if pa.types.is_dictionary(inner) else inner
        if pa.types.is_nested(inner) or pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
            raise DataError(
                f"column {name!r} of {settings.uri} is {found}; item text, title and category are read from text, numbers "
                "or a list of them. Write it that way, or name another column (catalog.text, .title, .category)"
            )
    if settings.available is not None:
        found = schema.field(settings.available).type
        if not (pa.types.is_boolean(found) or pa.types.is_integer(found)):
            raise DataError(
                f"column {settings.available!r} of {settings.uri} is {found}; catalog.available must be boolean, or an "
                "integer that is 0 for no"
            )


def _vector_type(schema: pa.Schema, settings: CatalogSettings) -> pa.DataType | None:
    if settings.vector is None:
        return None
    found = schema.field(settings.vector).type
    if not (pa.types.is_fixed_size_list(found) and pa.types.is_floating(found.value_type)):
        raise DataError(
            f"column {settings.vector!r} of {settings.uri} is {found}; catalog.vector must be FixedSizeList<float>"
        )
    return pa.list_(pa.float32(), found.list_size)


class _Finish:
    """Check and write one shard of the catalog."""

    def __init__(self, run: Run, settings: CatalogSettings) -> None:
        self._run = run
        self._settings = settings

    def __call__(self, rows: pa.Table, shard: int) -> FileEntry:
        rows = rows.sort_by("item_id").combine_chunks()
        item_id = rows.column("item_id").combine_chunks()
        again = pc.equal(item_id.slice(1), item_id.slice(0, len(item_id) - 1))
        if pc.any(again).as_py():
            twice = item_id.slice(1).filter(again)
            raise DataError(
                f"{len(twice):,} rows of {self._settings.uri} repeat an item id of another row, among them "
                f"{', '.join(str(i) for i in twice.unique()[:10].to_pylist())}; item ids must be unique "
                f"(column {self._settings.item_id!r})"
            )
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
