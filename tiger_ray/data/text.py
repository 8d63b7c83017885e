"""Catalog rows as clean text: lists joined, HTML unescaped, whitespace collapsed, one text per item."""

from __future__ import annotations

import html
import string

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts import schemas
from tiger_ray.core.hashing import shard_of, stable_hash
from tiger_ray.errors import DataError
from tiger_ray.settings.catalog import CatalogSettings


def clean_rows(
    batch: pa.Table, settings: CatalogSettings, item_id_type: pa.DataType, vector_type: pa.DataType | None
) -> pa.Table:
    """Rows of the catalog input as rows of `schemas.catalog`, plus the column `shard` (int32).

    Args:
        batch: rows of the input, with the columns that the settings name.
        settings: section `catalog`.
        item_id_type: type of the ids in the artifact.
        vector_type: type of the column `vector`; None if the catalog brings no vectors.

    Raises:
        DataError: an id is null.
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
    """Item text of each row, never null: plain text, cut to `catalog.max_text_chars` characters."""
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
        # Unescape twice, because exports often escape text that is escaped already.
        plain = [html.unescape(html.unescape(text)) for text in values.filter(escaped).to_pylist()]
        fixed = pa.array(plain, pa.string())
        values = pc.replace_with_mask(values, escaped, fixed)
    values = pc.utf8_trim_whitespace(pc.replace_substring_regex(values, r"[\s\p{Z}]+", " "))
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def _without_empty(lists: pa.ListArray) -> pa.ListArray:
    """The lists without null and blank entries; a null list becomes an empty list. Sliced arrays are fine."""
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
    """The template as a list of literals (text, None) and fields ("", column)."""
    parts: list[tuple[str, str | None]] = []
    for literal, field, _, _ in string.Formatter().parse(settings.template or ""):
        if literal:
            parts.append((literal, None))
        if field is not None:
            parts.append(("", field))
    return parts
