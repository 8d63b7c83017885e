"""Catalog rows -> items: validated, with one clean text each, in files by a hash of the item id.

Everything downstream trusts this artifact: ids are unique and never null, text is unescaped and bounded,
`available` says whether an item may be recommended tonight.
"""

from __future__ import annotations

import html
import string
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray import schemas
from tiger_ray.config import CatalogSettings, Settings
from tiger_ray.errors import DataError
from tiger_ray.hashing import shard_of, stable_hash
from tiger_ray.inputs import blamed, id_type, read_columns, read_input_schema
from tiger_ray.shards import shard_name, write_partitions
from tiger_ray.stage import Computed, StageResult, run_stage
from tiger_ray.storage import FileEntry, Run, Storage
from tiger_ray.stores import InputFile, list_inputs


def run(settings: Settings, storage: Storage) -> StageResult:
    """Publish the artifact `catalog`.

    Raises:
        DataError: no item, a column is missing or mistyped, an id is null or comes twice, too many items
            have no text.
    """
    files = list_inputs(settings.catalog.uri)
    return run_stage(
        storage,
        settings,
        "catalog",
        inputs={},
        sections={"catalog": settings.catalog},
        source={"files": [asdict(file) for file in files]},
        compute=lambda run: _compute(run, settings.catalog, files),
    )


def _compute(run: Run, settings: CatalogSettings, files: Sequence[InputFile]) -> Computed:
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


def clean_rows(
    batch: pa.Table, settings: CatalogSettings, item_id_type: pa.DataType, vector_type: pa.DataType | None
) -> pa.Table:
    """Rows of the input as rows of the artifact (`schemas.catalog`), plus the column `shard`.

    Raises:
        DataError: a null id.
    """
    item_id = batch.column(settings.item_id).cast(item_id_type).combine_chunks()
    if item_id.null_count:
        raise DataError(
            f"{item_id.null_count:,} of {len(item_id):,} rows read together from {settings.uri} have a null "
            f"{settings.item_id!r}; every item needs an id"
        )
    title = plain_text(batch.column(settings.title or settings.text[0]))
    columns = {
        "item_id": item_id,
        "title": pc.utf8_slice_codeunits(title, 0, 200),
        "text": item_text(batch, settings),
        "category": _last_entry(batch.column(settings.category))
        if settings.category
        else pa.nulls(len(item_id), pa.string()),
        "available": (
            pc.fill_null(batch.column(settings.available).cast(pa.bool_()), False)
            if settings.available
            else pa.repeat(True, len(item_id))
        ),
    }
    if vector_type is not None:
        columns["vector"] = batch.column(settings.vector)
    schema = schemas.catalog(item_id_type, vector_type)
    table = pa.table({name: columns[name] for name in schema.names}).cast(schema)
    shard = shard_of(stable_hash(item_id), settings.num_shards)
    return table.append_column("shard", pa.array(shard))


def item_text(batch: pa.Table, settings: CatalogSettings) -> pa.Array:
    """Item text of each row, HTML unescaped, whitespace collapsed, at most `max_text_chars` long; never null."""
    parts = {column: plain_text(batch.column(column)) for column in settings.text}
    if settings.template is None:
        # Not null_handling="skip": it loses rows whose parts are all null (seen with pyarrow 26).
        labelled = [
            pc.binary_join_element_wise(f"{column}: ", text, "; ", "") for column, text in parts.items()
        ]
        text = pc.binary_join_element_wise(*[pc.fill_null(part, "") for part in labelled], "")
        text = pc.replace_substring_regex(text, "; $", "")
    else:
        pieces = [
            piece if column is None else pc.fill_null(parts[column], "")
            for piece, column in _template_parts(settings)
        ]
        text = pc.binary_join_element_wise(*pieces, "") if pieces else pa.repeat("", batch.num_rows)
        nothing = pc.equal(
            pc.binary_join_element_wise(*[pc.fill_null(p, "") for p in parts.values()], ""), ""
        )
        text = pc.if_else(nothing, "", text)
    text = pc.fill_null(pc.utf8_trim_whitespace(text), "")
    return pc.utf8_slice_codeunits(text, 0, settings.max_text_chars)


def plain_text(column: pa.ChunkedArray) -> pa.Array:
    """Any column as clean strings: lists joined with ` > `, HTML entities unescaped, empty text as null."""
    values = column.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = pc.binary_join(_without_empty(values), " > ")
    values = values.cast(pa.string())
    escaped = pc.fill_null(pc.match_substring(values, "&"), False)
    if pc.any(escaped).as_py():
        # Twice, because exports often escape what was escaped already.
        plain = [html.unescape(html.unescape(text)) for text in values.filter(escaped).to_pylist()]
        fixed = pa.array(plain, pa.string())
        values = pc.replace_with_mask(values, escaped, fixed)
    values = pc.utf8_trim_whitespace(pc.replace_substring_regex(values, r"[\s\p{Z}]+", " "))
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def _without_empty(lists: pa.ListArray) -> pa.ListArray:
    """The same lists, sliced or not, without null and blank entries; a null list becomes an empty one."""
    entries = lists.flatten().cast(pa.string())
    kept = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(entries), ""), False)
    row = pc.list_parent_indices(lists).filter(kept).to_numpy()
    offsets = np.append(0, np.cumsum(np.bincount(row, minlength=len(lists))))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), entries.filter(kept))


def _last_entry(column: pa.ChunkedArray) -> pa.Array:
    """Deepest category of each row: the last entry of a list, or the value itself."""
    values = column.combine_chunks()
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        ends = np.cumsum(lengths)
        last = pa.array(ends - 1, mask=lengths == 0)
        values = values.flatten().take(last)
    return plain_text(pa.chunked_array([values]))


def _template_parts(settings: CatalogSettings) -> list[tuple[str, str | None]]:
    """A template as literal pieces (text, None) and fields ("", column)."""
    parts: list[tuple[str, str | None]] = []
    for literal, field, _, _ in string.Formatter().parse(settings.template or ""):
        if literal:
            parts.append((literal, None))
        if field is not None:
            parts.append(("", field))
    return parts


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
