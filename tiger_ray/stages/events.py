"""Stage `events`: count and check the events, and pin the input files that hold them."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.artifacts.store import InputFile
from tiger_ray.cluster.reading import blamed, read_events
from tiger_ray.cluster.shards import plain_errors
from tiger_ray.data.events import (
    TICKS_PER_SECOND,
    _both_strings,
    is_complete,
    require_tie,
    timestamp_unit,
    wanted_columns,
    wanted_rows,
)
from tiger_ray.data.inputs import id_type, list_inputs, read_input_schema
from tiger_ray.errors import DataError
from tiger_ray.settings.events import EventsSettings
from tiger_ray.stages.stage import Computed, Context, Stage

EARLIEST = datetime(1990, 1, 1, tzinfo=UTC).timestamp()


LATEST = datetime(2100, 1, 1, tzinfo=UTC).timestamp()


def catalog_item_ids(storage: Storage, catalog: Manifest) -> ray.ObjectRef:
    """All item ids of the catalog, gathered by a worker into the object store: one array, shared by all tasks."""

    def gather() -> pa.ChunkedArray:
        tables = [storage.read_table(catalog, entry.name, columns=["item_id"]) for entry in catalog.files]
        return schemas.as_large_string(pa.concat_tables(tables).column("item_id"))

    return ray.remote(gather).remote()


def _source(context: Context) -> dict[str, Any]:
    return {"files": [asdict(file) for file in list_inputs(context.settings.events.uri)]}


def _compute(run: Run, context: Context) -> Computed:
    settings, storage, catalog = context.settings.events, context.storage, context.inputs["catalog"]
    files = [InputFile(**file) for file in context.source["files"]]
    schema, rows = read_input_schema(files, settings.uri, wanted_columns(settings))
    user_id_type = id_type(schema, settings.user_id, settings.uri)
    item_id_type = id_type(schema, settings.item_id, settings.uri)
    if str(item_id_type) != catalog.metadata["id_type"] and not _both_strings(item_id_type, catalog):
        raise DataError(
            f"item ids are {item_id_type} in the events ({settings.uri}, column {settings.item_id!r}, {rows:,} rows) but "
            f"{catalog.metadata['id_type']} in the catalog; no event could be matched. Write both with one type."
        )
    unit = timestamp_unit(schema, settings)
    require_tie(schema, settings, rows)

    counted = read_events(files, settings).map_batches(
        _count,
        fn_args=(settings, catalog_item_ids(storage, catalog)),
        batch_size=None,
        batch_format="pyarrow",
    )
    with blamed(files, settings.uri, wanted_columns(settings).values()), plain_errors():
        counts = _add([json.loads(row["counts"]) for row in counted.iter_rows()])
    _judge(counts, unit, settings)
    facts: dict[str, Any] = {
        "summary": f"{counts['events']:,} events, {counts['unknown']:,} of unknown items",
        **{name: counts[name] for name in ("events", "nulls", "unknown", "unwanted_kind")},
        "files": [asdict(file) for file in files],
        "user_id_type": str(user_id_type),
        "timestamp_unit": unit,
    }
    return [
        run.write_file("counts.json", json.dumps(counts, sort_keys=True).encode(), rows=counts["events"])
    ], facts


def _count(batch: pa.Table, settings: EventsSettings, item_id_ref: ray.ObjectRef) -> pa.Table:
    item_ids = ray.get(item_id_ref)
    events = wanted_rows(batch, settings)
    events.validate(full=True)  # Parquet does not promise that text is UTF-8
    complete = events.filter(is_complete(events))
    item_id = complete.column("item_id")
    known = pc.is_in(item_id.cast(item_ids.type), value_set=item_ids)
    unknown = item_id.filter(pc.invert(known))
    times = pc.min_max(complete.column("timestamp")).as_py()
    counts = {
        "events": events.num_rows,
        "unwanted_kind": batch.num_rows - events.num_rows,
        "nulls": events.num_rows - complete.num_rows,
        "unknown": len(unknown),
        "unknown_examples": [str(item) for item in unknown.slice(0, 1000).unique()[:5].to_pylist()],
        "first": times["min"],
        "last": times["max"],
    }
    return pa.table({"counts": [json.dumps(counts)]})


def _add(parts: list[dict[str, Any]]) -> dict[str, Any]:
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


def _judge(counts: dict[str, Any], unit: str, settings: EventsSettings) -> None:
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


STAGE = Stage(
    name="events",
    does="events, counted and checked, their input files pinned",
    inputs=("catalog",),
    sections=("events",),
    source=_source,
    compute=_compute,
)
"""Publishes `events`.

Raises:
    DataError: a column is missing or mistyped, ids are of another type than the catalog's, the unit of
        an integer timestamp is not declared or cannot be right, too many nulls or unknown items.
"""
