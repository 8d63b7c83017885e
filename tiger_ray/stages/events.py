"""Stage `events`: count and check the events, and pin the input files that hold them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import CatalogMetadata
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.artifacts.store import InputFile
from tiger_ray.cluster.reading import name_bad_file, read_events
from tiger_ray.cluster.shards import plain_errors
from tiger_ray.data.events import (
    add_counts,
    count_events,
    require_same_item_ids,
    require_tie,
    require_usable,
    timestamp_unit,
    wanted_columns,
)
from tiger_ray.data.inputs import id_type, list_inputs, read_input_schema
from tiger_ray.settings.events import EventsSettings
from tiger_ray.stages.stage import Computed, Context, Stage


def catalog_item_ids(storage: Storage, catalog: Manifest) -> ray.ObjectRef:
    """Reference to all item ids of the catalog: a worker gathers one array in the object store, which all tasks share."""

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
    require_same_item_ids(item_id_type, CatalogMetadata.of(catalog).id_type, settings, rows)
    unit = timestamp_unit(schema, settings)
    require_tie(schema, settings, rows)

    counted = read_events(files, settings).map_batches(
        _count,
        fn_args=(settings, catalog_item_ids(storage, catalog)),
        batch_size=None,
        batch_format="pyarrow",
    )
    with name_bad_file(files, settings.uri, wanted_columns(settings).values()), plain_errors():
        counts = add_counts([json.loads(row["counts"]) for row in counted.iter_rows()])
    require_usable(counts, unit, settings)
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
    return pa.table({"counts": [json.dumps(count_events(batch, settings, ray.get(item_id_ref)))]})


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
