"""Events -> one history per user, by a keyed shuffle.

Item ids become int32 item_index before the shuffle, and a user's events are cut to the most recent
`sequences.max_events` before and after the shuffle. So the shuffle moves neither long ids nor all events of a busy
bot. A user whose events all name unknown items gets a row with an empty history.

E events, B users of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.files import shard_name
from tiger_ray.artifacts.lineage import registry_of
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import EventsMetadata, SemanticIdsMetadata
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.reading import name_bad_file, read_events
from tiger_ray.cluster.shards import plain_errors, write_partitions
from tiger_ray.data.events import ticks_at, wanted_columns
from tiger_ray.data.histories import (
    columns_for,
    cuts_of,
    decided_by_tie,
    histories_of,
    holdouts,
    item_table_of,
    popularity_of,
    prepare_events,
    seen_events,
)
from tiger_ray.errors import DataError
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.settings.sequences import SequencesSettings
from tiger_ray.stages.stage import Computed, Context, Stage


def _compute(run: Run, context: Context) -> Computed:
    settings, storage = context.settings, context.storage
    events, semantic_ids = context.inputs["events"], context.inputs["semantic_ids"]
    counted = EventsMetadata.of(events)
    files = counted.files
    # About 24 bytes per item, shared by all tasks of a node: a broadcast is faster than a join.
    items = ray.remote(_item_table).remote(storage, semantic_ids, settings.events.ties, settings.seed)
    chosen = settings.sequences
    moments = _moments(chosen, counted.timestamp_unit)
    with name_bad_file(files, settings.events.uri, wanted_columns(settings.events).values()):
        shuffled = read_events(files, settings.events).map_batches(
            lambda batch: prepare_events(batch, settings.events, settings.sequences, ray.get(items)),
            batch_size=None,
            batch_format="pyarrow",
        )
        entries = write_partitions(
            shuffled, _WriteShard(run, chosen.max_events, moments), num_shards=chosen.num_shards
        )
    users = sum(entry.rows for entry in entries)
    facts: dict[str, Any] = {name: sum(entry.fact(name) for entry in entries) for name in entries[0].facts}
    summary = f"{users:,} users, {facts['events']:,} of {counted.events:,} events kept"
    if moments is not None:
        if not facts["test_users_time"]:
            raise DataError(
                f"none of {users:,} users of {settings.events.uri} ({facts['events']:,} events) has an event from "
                f"sequences.test_from {chosen.test_from} on and one before it; choose moments within the events"
            )
        validated, tested = (facts[f"{split}_users_time"] for split in ("validation", "test"))
        summary += f", {validated:,} users to validate on and {tested:,} to test"
        facts |= chosen.model_dump(mode="json", include={"validation_from", "test_from"})
    num_items = SemanticIdsMetadata.of(semantic_ids).items
    entries.append(_write_popularity(run, entries, num_items, has_moments=moments is not None))
    return entries, {
        "summary": summary,
        "users": users,
        "user_id_type": counted.user_id_type,
        **facts,
    }


def _moments(settings: SequencesSettings, unit: str) -> tuple[int, int] | None:
    """The first ticks of the validation and the test period; None without a time split."""
    if settings.validation_from is None or settings.test_from is None:
        return None
    return ticks_at(settings.validation_from, unit), ticks_at(settings.test_from, unit)


def _item_table(storage: Storage, semantic_ids: Manifest, ties: str, seed: int) -> pa.Table:
    item_id = schemas.as_large_string(load_semantic_ids(storage, semantic_ids).item_id).combine_chunks()
    return item_table_of(item_id, ties, seed)


class _WriteShard:
    """Groups and writes one shard of users."""

    def __init__(self, run: Run, max_events: int, moments: tuple[int, int] | None) -> None:
        self._run, self._max_events, self._moments = run, max_events, moments

    def __call__(self, rows: pa.Table, shard: int) -> FileEntry:
        table, tied_E = histories_of(rows, self._max_events, self._moments)
        lengths = pc.list_value_length(table.column("history"))
        lengths_B = lengths.to_numpy().astype(np.int64)
        facts = {
            "events": pc.sum(lengths).as_py(),
            "users_without_history": pc.sum(pc.equal(lengths, 0)).as_py(),
        }
        for holdout in holdouts(self._moments is not None):
            cuts = cuts_of(table, holdout)
            facts[f"examples_{holdout}"] = cuts.num_examples
            if holdout != "none":
                for split, at_B in (("validation", cuts.validation_at_B), ("test", cuts.test_at_B)):
                    facts[f"{split}_users_{holdout}"] = int((at_B >= 0).sum())
                    facts[f"{split}_tied_{holdout}"] = int(decided_by_tie(at_B, lengths_B, tied_E).sum())
        return self._run.write_table(shard_name(shard), table, facts=facts)


def _write_popularity(
    run: Run, shards: Sequence[FileEntry], num_items: int, *, has_moments: bool
) -> FileEntry:
    """Count item popularity in a few tasks, each over many shards, and keep the top of the list."""
    names = holdouts(has_moments)
    columns = columns_for("time" if has_moments else "none")

    def count(part: Sequence[FileEntry]) -> np.ndarray:
        total = np.zeros((len(names), num_items), np.int64)
        for entry in part:
            total += seen_events(run.read_table(entry, columns=columns), num_items, names)
        return total

    def finish(*parts: np.ndarray) -> FileEntry:
        counts = dict(zip(names, np.sum(parts, axis=0), strict=True))
        return run.write_table("popularity.parquet", popularity_of(counts))

    num_tasks = min(8, len(shards))
    parts = [ray.remote(count).remote(list(shards[task::num_tasks])) for task in range(num_tasks)]
    with plain_errors():
        entry: FileEntry = ray.get(ray.remote(finish).remote(*parts))
    return entry


STAGE = Stage(
    name="sequences",
    does="events -> one history per user",
    inputs=("events", "semantic_ids"),
    sections=("events", "sequences"),
    keyed_inputs=lambda context: {
        "events": context.inputs["events"],
        "semantic_ids": registry_of(context.inputs["semantic_ids"]),
    },
    draws=lambda settings: settings.events.ties != "item_id",
    compute=_compute,
    format_version=4,
)
"""Publishes `sequences`: user shards and `popularity.parquet`.

Raises:
    DataError: a time split is set, and no user has a test event.
"""
