"""The checks of the stages `catalog` and `events` over the input files, streamed by this process alone.

A long input is judged by its first rows, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.store import InputFile
from tiger_ray.data import catalog, events
from tiger_ray.data.inputs import id_type, read_input, read_input_schema
from tiger_ray.data.text import clean_rows
from tiger_ray.errors import DataError
from tiger_ray.settings.catalog import CatalogSettings
from tiger_ray.settings.events import EventsSettings

MAX_IDS = 20_000_000
"""Rows of the catalog whose ids are held in memory."""

MAX_TEXTS = 200_000
"""Rows of the catalog whose text is cleaned."""

MAX_EVENTS = 5_000_000
"""Rows of the events that are counted."""


@dataclass(frozen=True)
class Surveyed:
    """What was found in one input."""

    text: str
    """Counts, and how many rows they are of, for people."""
    item_ids: pa.ChunkedArray | None = None
    """Of the whole catalog; None if the catalog is too long, or for events."""


def survey_catalog(
    files: Sequence[InputFile],
    settings: CatalogSettings,
    *,
    max_ids: int = MAX_IDS,
    max_texts: int = MAX_TEXTS,
) -> Surveyed:
    """Look for null and repeated ids, missing text, and items that may be recommended.

    Args:
        files: of the catalog.
        settings: columns and limits.
        max_ids: rows whose ids are compared.
        max_texts: rows whose text and availability are counted.

    Raises:
        DataError: as the stage `catalog`.
    """
    wanted = catalog.wanted_columns(settings)
    schema, rows = read_input_schema(files, settings.uri, wanted)
    item_id_type = id_type(schema, settings.item_id, settings.uri)
    vectors = catalog.vector_type(schema, settings)
    chunks = [
        table.column(settings.item_id).cast(item_id_type)
        for table in _tables(files, settings.uri, [settings.item_id], max_ids)
    ]
    item_ids = pa.chunked_array([chunk for column in chunks for chunk in column.chunks], item_id_type)
    if item_ids.null_count:
        raise DataError(
            f"{item_ids.null_count:,} of {len(item_ids):,} rows of {settings.uri} have a null {settings.item_id!r}; every "
            "item needs an id"
        )
    counts = pc.value_counts(schemas.as_large_string(item_ids))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        again = len(item_ids) - len(counts)
        raise catalog.repeated_ids(again, twice.field("values")[:10].to_pylist(), settings)
    items = empty = available = 0
    for table in _tables(files, settings.uri, wanted.values(), max_texts):
        clean = clean_rows(table, settings, item_id_type, vectors)
        items += clean.num_rows
        empty += pc.sum(pc.equal(clean.column("text"), "")).as_py() or 0
        available += pc.sum(clean.column("available")).as_py() or 0
    catalog.require_usable(items, empty, available, settings)
    text = (
        f"{_seen(len(item_ids), rows)} ids, none null or twice; {_seen(items, rows)} items: {available:,} available, "
        f"{empty:,} without text"
    )
    return Surveyed(text, schemas.as_large_string(item_ids) if len(item_ids) == rows else None)


def survey_events(
    files: Sequence[InputFile],
    settings: EventsSettings,
    item_ids: pa.ChunkedArray | None,
    *,
    max_events: int = MAX_EVENTS,
) -> Surveyed:
    """Look for nulls, unknown items, unwanted kinds, times that cannot be, and events that come twice.

    Args:
        files: of the events.
        settings: columns and limits.
        item_ids: of the whole catalog; None: unknown items are not counted.
        max_events: rows that are counted.

    Raises:
        DataError: as the stage `events`.
    """
    wanted = events.wanted_columns(settings)
    schema, rows = read_input_schema(files, settings.uri, wanted)
    unit = events.timestamp_unit(schema, settings)
    parts: list[dict[str, Any]] = []
    repeats = 0
    for table in _tables(files, settings.uri, wanted.values(), max_events):
        parts.append(events.count_events(table, settings, item_ids))
        kept = events.wanted_rows(table, settings).select(["user_id", "item_id", "timestamp"])
        repeats += kept.num_rows - kept.group_by(kept.column_names).aggregate([]).num_rows
    counts = events.add_counts(parts)
    events.require_usable(counts, unit, settings)
    unknown = (
        f"{counts['unknown']:,} of unknown items"
        if item_ids is not None
        else "unknown items not counted (long catalog)"
    )
    return Surveyed(
        f"{_seen(sum(part['events'] + part['unwanted_kind'] for part in parts), rows)} rows: {counts['events']:,} events of "
        f"wanted kinds, {counts['nulls']:,} with a null, {unknown}, {repeats:,} twice in one batch (they count once)"
    )


def _seen(seen: int, rows: int) -> str:
    return f"all {rows:,}" if seen == rows else f"the first {seen:,} of {rows:,}"


def _tables(
    files: Sequence[InputFile], uri: str, columns: Iterable[str], max_rows: int
) -> Iterator[pa.Table]:
    """These columns of the files in order, a row group at a time, dictionaries as their values."""
    names = sorted(set(columns))
    left = max_rows
    for file in files:
        group = 0
        while left > 0:
            table = _row_group(file, uri, names, group)
            if table is None:
                break
            yield table[:left]
            left -= table.num_rows
            group += 1


def _row_group(file: InputFile, uri: str, names: list[str], group: int) -> pa.Table | None:
    """One row group; None after the last."""

    def read(source: Any) -> pa.Table | None:
        parquet = pq.ParquetFile(source)
        if group >= parquet.num_row_groups:
            return None
        table = parquet.read_row_group(group, names)
        table.validate(full=True)  # Parquet does not promise that text is UTF-8
        return table

    try:
        table = read_input(uri, file, read)
    except FileNotFoundError:
        raise DataError(
            f"{file.path} is gone since {uri} was listed; check again when its writer is done"
        ) from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
            raise  # of the store, not of the file
        raise DataError(
            f"row group {group} of {file.path} cannot be read: {error}; write the file again, as UTF-8 where it is text"
        ) from None
    if table is None:
        return None
    plain = [
        column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    return pa.table(dict(zip(table.column_names, plain, strict=True)))
