"""Events in: checked before any expensive work, and pinned, so that a night reads the same files throughout.

The artifact `events` holds no rows: its manifest names the input files with their versions and counts what
is in them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.errors import DataError
from tiger_ray.settings.events import EventsSettings

TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def wanted_rows(batch: pa.Table, settings: EventsSettings) -> pa.Table:
    """Events of the wanted kinds: user_id, item_id, timestamp (int64 ticks of the input's unit), and the place
    among equal timestamps as column order (int64), if `events.tie` names a column."""
    if settings.event_type is not None:
        kind = batch.column(settings.event_type).cast(pa.string())
        batch = batch.filter(pc.is_in(kind, value_set=pa.array(settings.event_types)))
    timestamp = batch.column(settings.timestamp)
    if pa.types.is_date(timestamp.type):
        timestamp = timestamp.cast(pa.timestamp("ms"))
    columns = {
        "user_id": _plain(batch.column(settings.user_id)),
        "item_id": _plain(batch.column(settings.item_id)),
        "timestamp": timestamp.cast(pa.int64()),
    }
    if settings.tie is not None:
        columns["order"] = batch.column(settings.tie).cast(pa.int64())
    return pa.table(columns)


def is_complete(events: pa.Table) -> pa.ChunkedArray:
    """True for rows of `wanted_rows` in which nothing is null."""
    return reduce(pc.and_, [pc.is_valid(column) for column in events.columns])


def timestamp_unit(schema: pa.Schema, settings: EventsSettings) -> str:
    """Unit of the timestamp column, from its type or from the settings.

    Raises:
        DataError: neither a time nor an integer, or an integer without a declared unit.
    """
    found = schema.field(settings.timestamp).type
    if pa.types.is_timestamp(found):
        return str(found.unit)
    if pa.types.is_date(found):
        return "ms"
    if not pa.types.is_integer(found) or found == pa.uint64():
        raise DataError(
            f"column {settings.timestamp!r} of {settings.uri} is {found}; events.timestamp must be a timestamp, a date or an "
            "integer that int64 can hold"
        )
    if settings.timestamp_unit is None:
        raise DataError(
            f"column {settings.timestamp!r} of {settings.uri} is {found}, and its unit is not declared; "
            "set events.timestamp_unit to s, ms, us, ns or position"
        )
    return settings.timestamp_unit


def require_tie(schema: pa.Schema, settings: EventsSettings, rows: int) -> None:
    """Refuse a column for ties that has no order of int64 values.

    Raises:
        DataError: it is no integer, or unsigned with 64 bits.
    """
    if settings.tie is None:
        return
    found = schema.field(settings.tie).type
    if not pa.types.is_integer(found) or found == pa.uint64():
        raise DataError(
            f"column {settings.tie!r} of {settings.uri} ({rows:,} rows) is {found}; events.tie must name a column of "
            "integers that int64 can hold"
        )


def ticks_at(moment: datetime, unit: str) -> int:
    """The first tick of this unit that is not before a moment, counted from 1970."""
    microseconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return -(-microseconds * TICKS_PER_SECOND[unit] // 10**6)


def wanted_columns(settings: EventsSettings) -> dict[str, str]:
    """Setting -> the column of the input that it names."""
    names = ("user_id", "item_id", "timestamp", "event_type", "tie")
    return {f"events.{name}": column for name in names if (column := getattr(settings, name)) is not None}


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _both_strings(item_id_type: pa.DataType, catalog: Manifest) -> bool:
    return {str(item_id_type), catalog.metadata["id_type"]} <= {"string", "large_string"}
