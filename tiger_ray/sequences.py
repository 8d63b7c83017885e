"""Events -> one history per user, by a keyed shuffle.

Item ids become int32 item_index before the shuffle and a user's events are cut to the most recent
`sequences.max_events` on both sides of it, so neither long ids nor one busy bot travel through it. A user
whose events all name unknown items still gets a row, with an empty history.

E events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from tiger_ray import schemas
from tiger_ray.config import EventsSettings, SequencesSettings, Settings
from tiger_ray.errors import DataError
from tiger_ray.events import is_complete, read_events, ticks_at, wanted_columns, wanted_rows
from tiger_ray.hashing import shard_of, stable_hash
from tiger_ray.histories import POPULARITY_COLUMNS, columns_for, cuts_of, holdouts
from tiger_ray.inputs import blamed
from tiger_ray.registry import load_semantic_ids, registry_of
from tiger_ray.shards import plain_errors, shard_name, write_partitions
from tiger_ray.stage import Computed, StageResult, run_stage
from tiger_ray.storage import FileEntry, Manifest, Run, Storage
from tiger_ray.stores import InputFile

NUM_POPULAR = 100_000
"""Most popular items kept for fallback lists and as the baseline: so many that some of them can be had tonight."""


def run(settings: Settings, storage: Storage, events: Manifest, semantic_ids: Manifest) -> StageResult:
    """Publish the artifact `sequences`: user shards and `popularity.parquet`.

    Raises:
        DataError: a time split is set, and nobody has an event to be tested on.
    """
    return run_stage(
        storage,
        settings,
        "sequences",
        inputs={"events": events, "semantic_ids": registry_of(semantic_ids)},
        sections={"events": settings.events, "sequences": settings.sequences},
        draws=settings.events.ties == "shuffled",
        compute=lambda run: _compute(run, settings, storage, events, semantic_ids),
    )


def histories_of(events: pa.Table, max_events: int, moments: tuple[int, int] | None = None) -> pa.Table:
    """Group one shard's events into histories; an exact repeat of an event counts once.

    A repeat has user, item and timestamp of another event. With a column `order`, the first of them counts.

    Args:
        events: user_id, timestamp int64, tie int32, item_index int32 (-1: unknown item); and order int64, if
            that comes before tie among equal timestamps.
        max_events: most recent events kept per user.
        moments: ticks at which the validation and the test period of the time split begin, if it is set.

    Returns:
        `schemas.sequences` rows sorted by user_id.
    """
    has_order = "order" in events.column_names
    keys = ["user_id", "timestamp", "tie", *(["order"] if has_order else [])]
    events = events.sort_by([(key, "ascending") for key in keys]).combine_chunks()
    user_id = events.column("user_id").combine_chunks()
    item_index = events.column("item_index").to_numpy()
    timestamp = events.column("timestamp").to_numpy()
    new_user = _differs_from_previous(user_id)
    known = item_index >= 0
    repeat = np.zeros(len(item_index), bool)
    repeat[1:] = (
        ~new_user[1:] & (item_index[1:] == item_index[:-1]) & (timestamp[1:] == timestamp[:-1]) & known[1:]
    )

    keep = known & ~repeat
    users = user_id.filter(pa.array(new_user))
    user, item_index, timestamp = (np.cumsum(new_user) - 1)[keep], item_index[keep], timestamp[keep]
    if has_order:
        # Only here: above, the repeats of an event stand beside it. Equal ones stay in the order of tie.
        order = events.column("order").to_numpy()[keep]
        item_index = item_index[np.lexsort((order, timestamp, user))]
    # Place of each kept event counted from its user's newest, 0-based.
    lengths = np.bincount(user, minlength=len(users))
    from_end = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(user))
    recent = from_end < max_events
    history = item_index[recent]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_events))]).astype(np.int32)
    before = [
        np.bincount(user[recent & (timestamp < moment)], minlength=len(users)) for moment in moments or ()
    ]
    return pa.table(
        [
            users,
            pa.array(stable_hash(users)),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(history, pa.int32())),
            *(pa.array(count, pa.int32()) for count in before),
        ],
        schema=schemas.sequences(users.type, has_moments=moments is not None),
    )


def seen_events(users: pa.Table, num_items: int, holdouts: Sequence[str]) -> np.ndarray:
    """Events of each item that each holdout lets training see, (holdouts, items) int64.

    Args:
        users: rows of a user shard, with the columns that these holdouts need.
        num_items: items ever registered.
        holdouts: their names.
    """
    history = users.column("history").combine_chunks()
    lengths = pc.list_value_length(history).to_numpy()
    items = history.flatten().to_numpy()
    place = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    seen = (place < np.repeat(cuts_of(users, holdout).seen_B, lengths) for holdout in holdouts)
    return np.stack([np.bincount(items[some], minlength=num_items) for some in seen])


def popularity_of(counts: Mapping[str, np.ndarray]) -> pa.Table:
    """The items that are most popular by any of these counts, as rows of `schemas.popularity`.

    Args:
        counts: holdout -> events of each item that training may see, (items,) int64.
    """
    tops = {holdout: np.argsort(-count, kind="stable")[:NUM_POPULAR] for holdout, count in counts.items()}
    top = tops.pop("none")
    kept = np.concatenate([top, np.setdiff1d(np.concatenate(list(tops.values())), top)])
    columns = {POPULARITY_COLUMNS[holdout]: count[kept] for holdout, count in counts.items()}
    columns["item_index"] = kept.astype(np.int32)
    schema = schemas.popularity(has_moments="time" in counts)
    return pa.table([pa.array(columns[name]) for name in schema.names], schema=schema)


def prepare_events(
    batch: pa.Table, events: EventsSettings, sequences: SequencesSettings, items: pa.Table
) -> pa.Table:
    """Events of one block, ready for the shuffle: shard, user_id, timestamp, tie, item_index, and perhaps order.

    Args:
        batch: rows of the input.
        events: which columns and kinds count.
        sequences: number of shards and the cap per user.
        items: item_id and tie of every registered item, in the order of item_index.
    """
    rows = wanted_rows(batch, events)
    complete = is_complete(rows)
    incomplete = rows.filter(pc.invert(complete)).column("user_id").drop_null()
    rows = rows.filter(complete)
    item_id = rows.column("item_id").cast(items.column("item_id").type)
    item_index = pc.fill_null(pc.index_in(item_id, value_set=items.column("item_id")), -1)
    rows = rows.drop_columns(["item_id"]).append_column("item_index", item_index.cast(pa.int32()))
    known = pc.greater_equal(rows.column("item_index"), 0)
    # One row keeps a user alive whose items are all unknown or not given; more would only cost.
    unknown = rows.filter(pc.invert(known)).column("user_id")
    users = pc.unique(pa.chunked_array([*unknown.chunks, *incomplete.chunks], unknown.type))
    markers = pa.table(
        {
            "user_id": users,
            "timestamp": pa.repeat(pa.scalar(0, pa.int64()), len(users)),
            "order": pa.repeat(pa.scalar(0, pa.int64()), len(users)),
            "item_index": pa.repeat(pa.scalar(-1, pa.int32()), len(users)),
        }
    )
    rows = pa.concat_tables(
        [_most_recent(rows.filter(known), sequences.max_events), markers.select(rows.column_names)]
    )
    index = rows.column("item_index").to_numpy()
    tie = np.where(index >= 0, items.column("tie").to_numpy()[index], -1).astype(np.int32)
    shard = shard_of(stable_hash(rows.column("user_id")), sequences.num_shards)
    return rows.append_column("tie", pa.array(tie)).append_column("shard", pa.array(shard))


def _most_recent(rows: pa.Table, max_events: int) -> pa.Table:
    """The last `max_events` of each user of this block; equal timestamps at the edge are all kept."""
    if rows.num_rows <= max_events:
        return rows
    # Repeats go first: they would push older events out, and other ones wherever the blocks are cut.
    rows = _without_repeats(rows)
    rows = rows.sort_by([("user_id", "ascending"), ("timestamp", "ascending")]).combine_chunks()
    new_user = _differs_from_previous(rows.column("user_id").combine_chunks())
    lengths = np.diff(np.append(np.flatnonzero(new_user), rows.num_rows))
    ends = np.repeat(np.cumsum(lengths), lengths)
    timestamp = rows.column("timestamp").to_numpy()
    oldest_kept = np.maximum(ends - max_events, ends - np.repeat(lengths, lengths))
    return rows.filter(pa.array(timestamp >= timestamp[oldest_kept]))


def _without_repeats(rows: pa.Table) -> pa.Table:
    """One row for each event, the first in the column `order` if there is one."""
    keys = [name for name in rows.column_names if name != "order"]
    firsts = [("order", "min")] if "order" in rows.column_names else []
    rest = rows.group_by(keys, use_threads=False).aggregate(firsts)
    return rest.rename_columns([*keys, *(name for name, _ in firsts)]).select(rows.column_names)


def _differs_from_previous(values: pa.Array) -> np.ndarray:
    """(N,) bool: a value that starts a run of equal values."""
    starts = np.ones(len(values), bool)
    if len(values) > 1:
        starts[1:] = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1)).to_numpy(
            zero_copy_only=False
        )
    return starts


def _compute(
    run: Run, settings: Settings, storage: Storage, events: Manifest, semantic_ids: Manifest
) -> Computed:
    files = [InputFile(**file) for file in events.metadata["files"]]
    # 20 bytes or so per item, shared by all tasks of a node: a broadcast beats a join.
    items = ray.remote(_item_table).remote(storage, semantic_ids, settings.events.ties, settings.seed)
    chosen = settings.sequences
    moments = _moments(chosen, events.metadata["timestamp_unit"])
    with blamed(files, settings.events.uri, wanted_columns(settings.events).values()):
        shuffled = read_events(files, settings.events).map_batches(
            lambda batch: prepare_events(batch, settings.events, settings.sequences, ray.get(items)),
            batch_size=None,
            batch_format="pyarrow",
        )
        entries = write_partitions(
            shuffled, _Finish(run, chosen.max_events, moments), num_shards=chosen.num_shards
        )
    users = sum(entry.rows for entry in entries)
    facts: dict[str, Any] = {
        name: sum(int(entry.facts[name]) for entry in entries) for name in entries[0].facts
    }
    summary = f"{users:,} users, {facts['events']:,} of {events.metadata['events']:,} events kept"
    if moments is not None:
        if not facts["test_users_time"]:
            raise DataError(
                f"none of {users:,} users of {settings.events.uri} ({facts['events']:,} events) has an event from "
                f"sequences.test_from {chosen.test_from} on and one before it; choose moments within the events"
            )
        validated, tested = (facts[f"{split}_users_time"] for split in ("validation", "test"))
        summary += f", {validated:,} users to validate on and {tested:,} to test"
        facts |= chosen.model_dump(mode="json", include={"validation_from", "test_from"})
    num_items = int(semantic_ids.metadata["items"])
    entries.append(_write_popularity(run, entries, num_items, has_moments=moments is not None))
    return entries, {
        "summary": summary,
        "users": users,
        "user_id_type": events.metadata["user_id_type"],
        **facts,
    }


def _moments(settings: SequencesSettings, unit: str) -> tuple[int, int] | None:
    """The first ticks of the validation and the test period, if a time split is set."""
    if settings.validation_from is None or settings.test_from is None:
        return None
    return ticks_at(settings.validation_from, unit), ticks_at(settings.test_from, unit)


def _item_table(storage: Storage, semantic_ids: Manifest, ties: str, seed: int) -> pa.Table:
    """item_id and tie (int32 rank that decides between equal timestamps), in the order of item_index."""
    item_id = schemas.wide(load_semantic_ids(storage, semantic_ids).item_id).combine_chunks()
    if ties == "shuffled":
        order = np.argsort(stable_hash(item_id) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64), kind="stable")
    else:
        order = pc.sort_indices(item_id).to_numpy()
    tie = np.empty(len(order), np.int32)
    tie[order] = np.arange(len(order), dtype=np.int32)
    return pa.table({"item_id": item_id, "tie": tie})


class _Finish:
    """Group and write one shard of users."""

    def __init__(self, run: Run, max_events: int, moments: tuple[int, int] | None) -> None:
        self._run, self._max_events, self._moments = run, max_events, moments

    def __call__(self, rows: pa.Table, shard: int) -> FileEntry:
        table = histories_of(rows, self._max_events, self._moments)
        lengths = pc.list_value_length(table.column("history"))
        facts = {
            "events": pc.sum(lengths).as_py(),
            "users_without_history": pc.sum(pc.equal(lengths, 0)).as_py(),
        }
        for holdout in holdouts(self._moments is not None):
            cuts = cuts_of(table, holdout)
            facts[f"examples_{holdout}"] = cuts.num_examples
            if holdout != "none":
                facts[f"validation_users_{holdout}"] = int((cuts.validation_at_B >= 0).sum())
                facts[f"test_users_{holdout}"] = int((cuts.test_at_B >= 0).sum())
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
