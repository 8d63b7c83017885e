"""Rows of the events input: which rows and columns a night reads, and the unit of their timestamps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.errors import DataError
from tiger_ray.settings.events import EventsSettings

TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


EARLIEST = datetime(1990, 1, 1, tzinfo=UTC).timestamp()


LATEST = datetime(2100, 1, 1, tzinfo=UTC).timestamp()


def wanted_rows(batch: pa.Table, settings: EventsSettings) -> pa.Table:
    """Events of the kinds in `events.event_types`, with columns user_id, item_id and timestamp.

    timestamp is int64, in ticks of the input's unit. If `events.tie` names a column, the result has a fourth
    column, order (int64): the order of events with equal timestamps.
    """
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
    """True for a row of `wanted_rows` without nulls."""
    return reduce(pc.and_, [pc.is_valid(column) for column in events.columns])


def timestamp_unit(schema: pa.Schema, settings: EventsSettings) -> str:
    """Unit of the timestamp column, from its type or from the settings.

    Raises:
        DataError: the column is neither a time nor an integer, or is an integer without a declared unit.
    """
    found = schema.field(settings.timestamp).type
    if pa.types.is_timestamp(found):
        return str(found.unit)
    if pa.types.is_date(found):
        return "ms"
    if not pa.types.is_integer(found) or found == pa.uint64():
        raise DataError(
            f"column {settings.timestamp!r} of {settings.uri} is {found}; events.timestamp must name a column of "
            "timestamps, of dates, or of integers that int64 can hold"
        )
    if settings.timestamp_unit is None:
        raise DataError(
            f"column {settings.timestamp!r} of {settings.uri} is {found}, and its unit is not declared; "
            "set events.timestamp_unit to s, ms, us, ns or position"
        )
    return settings.timestamp_unit


def require_tie(schema: pa.Schema, settings: EventsSettings, rows: int) -> None:
    """Refuse a column `events.tie` whose values int64 cannot hold.

    Args:
        schema: of the events input.
        settings: section `events`.
        rows: of the events input, for the message.

    Raises:
        DataError: the column is not an integer, or is uint64.
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
    """The first tick at or after `moment`, in ticks of `unit` since 1970."""
    microseconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return -(-microseconds * TICKS_PER_SECOND[unit] // 10**6)


def wanted_columns(settings: EventsSettings) -> dict[str, str]:
    """Setting -> the column of the input that the setting names."""
    names = ("user_id", "item_id", "timestamp", "event_type", "tie")
    return {f"events.{name}": column for name in names if (column := getattr(settings, name)) is not None}


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def require_same_item_ids(found: pa.DataType, catalogs: str, settings: EventsSettings, rows: int) -> None:
    """Refuse item ids of which none could be in the catalog.

    Args:
        found: type of the item ids in the events.
        catalogs: name of the type of the item ids in the catalog.
        settings: names input and column.
        rows: of the input.

    Raises:
        DataError: one is text and the other a number.
    """
    if str(found) != catalogs and not {str(found), catalogs} <= {"string", "large_string"}:
        raise DataError(
            f"item ids are {found} in the events ({settings.uri}, column {settings.item_id!r}, {rows:,} rows) but "
            f"{catalogs} in the catalog; no event could be matched. Write both with one type."
        )


def count_events(
    batch: pa.Table, settings: EventsSettings, item_ids: pa.Array | pa.ChunkedArray | None
) -> dict[str, Any]:
    """Counts over some rows of the input, ready for JSON.

    Args:
        batch: wanted columns of the input.
        settings: kinds of event that count.
        item_ids: of the whole catalog; None: no item counts as unknown.
    """
    events = wanted_rows(batch, settings)
    events.validate(full=True)  # Parquet does not promise that text is UTF-8
    complete = events.filter(is_complete(events))
    item_id = complete.column("item_id")
    unknown = item_id[:0]
    if item_ids is not None:
        known = pc.is_in(item_id.cast(item_ids.type), value_set=item_ids)
        unknown = item_id.filter(pc.invert(known))
    times = pc.min_max(complete.column("timestamp")).as_py()
    return {
        "events": events.num_rows,
        "unwanted_kind": batch.num_rows - events.num_rows,
        "nulls": events.num_rows - complete.num_rows,
        "unknown": len(unknown),
        "unknown_examples": [str(item) for item in unknown.slice(0, 1000).unique()[:5].to_pylist()],
        "first": times["min"],
        "last": times["max"],
    }


def add_counts(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of `count_events` of several tables together."""
    parts = list(parts)
    firsts = [part["first"] for part in parts if part["first"] is not None]
    lasts = [part["last"] for part in parts if part["last"] is not None]
    examples = sorted({example for part in parts for example in part["unknown_examples"]})
    return {
        **{
            name: sum(part[name] for part in parts)
            for name in ("events", "unwanted_kind", "nulls", "unknown")
        },
        "unknown_examples": examples[:5],
        "first": min(firsts, default=None),
        "last": max(lasts, default=None),
    }


def require_usable(counts: Mapping[str, Any], unit: str, settings: EventsSettings) -> None:
    """Refuse events with too many nulls or unknown items, or with times that cannot be.

    Args:
        counts: of `count_events`, over all events.
        unit: of the timestamps.
        settings: the limits.

    Raises:
        DataError: says which limit.
    """
    events, where = counts["events"], settings.uri
    if events == 0:
        raise DataError(
            f"none of the {counts['unwanted_kind']:,} rows of {where} is of a kind in events.event_types "
            f"{list(settings.event_types)} (column {settings.event_type!r})"
        )
    if counts["nulls"] > settings.max_null_share * events:
        named = (settings.user_id, settings.item_id, settings.timestamp, settings.tie)
        columns = [repr(column) for column in named if column is not None]
        raise DataError(
            f"{counts['nulls']:,} of {events:,} events of {where} have a null in {', '.join(columns[:-1])} or {columns[-1]}; "
            f"at most {settings.max_null_share:.1%} may (events.max_null_share)"
        )
    complete = events - counts["nulls"]
    if counts["unknown"] > settings.max_unknown_share * complete:
        raise DataError(
            f"{counts['unknown']:,} of {complete:,} events of {where} name items that are not in the catalog, for example "
            f"{', '.join(counts['unknown_examples'])}; at most {settings.max_unknown_share:.1%} may "
            "(events.max_unknown_share). Is the catalog complete, and of the same day? Items that were removed from it count too"
        )
    if unit in TICKS_PER_SECOND and complete:
        first, last = (counts[end] / TICKS_PER_SECOND[unit] for end in ("first", "last"))
        if not (EARLIEST <= first and last < LATEST):
            raise DataError(
                f"timestamps of {where} (column {settings.timestamp!r}) run from {counts['first']} to {counts['last']}, which in "
                f"unit {unit!r} is not between 1990 and 2100; check events.timestamp_unit, or filter such rows"
            )
