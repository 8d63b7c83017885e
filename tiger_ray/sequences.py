"""Events -> one history per user, by a keyed shuffle.

Item ids become int32 item_index before the shuffle and a user's events are cut to the most recent
`sequences.max_events` on both sides of it, so neither long ids nor one busy bot travel through it. A user
whose events all name unknown items still gets a row, with an empty history.

E events.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from tiger_ray import schemas
from tiger_ray.config import EventsSettings, SequencesSettings, Settings
from tiger_ray.events import is_complete, read_events, wanted_rows
from tiger_ray.hashing import shard_of, stable_hash
from tiger_ray.histories import HELD_OUT, num_examples, training_lengths
from tiger_ray.registry import load_semantic_ids, registry_of
from tiger_ray.shards import plain_errors, shard_name, write_partitions
from tiger_ray.stage import Computed, StageResult, run_stage
from tiger_ray.storage import FileEntry, Manifest, Run, Storage
from tiger_ray.stores import InputFile

NUM_POPULAR = 1000
"""Most popular items kept for fallback lists and as the baseline."""


def run(settings: Settings, storage: Storage, events: Manifest, semantic_ids: Manifest) -> StageResult:
    """Publish the artifact `sequences`: user shards and `popularity.parquet`."""
    return run_stage(
        storage,
        settings,
        "sequences",
        inputs={"events": events, "semantic_ids": registry_of(semantic_ids)},
        sections={"events": settings.events, "sequences": settings.sequences},
        compute=lambda run: _compute(run, settings, storage, events, semantic_ids),
    )


def histories_of(events: pa.Table, max_events: int) -> pa.Table:
    """Group one shard's events into histories; an exact repeat of an event counts once.

    Args:
        events: user_id, timestamp int64, tie int32, item_index int32 (-1: unknown item).
        max_events: most recent events kept per user.

    Returns:
        `schemas.sequences` rows sorted by user_id.
    """
    events = events.sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending"), ("tie", "ascending")]
    ).combine_chunks()
    user_id = events.column("user_id").combine_chunks()
    item_index = events.column("item_index").to_numpy()
    timestamp = events.column("timestamp").to_numpy()
    new_user = _differs_from_previous(user_id)
    known = item_index >= 0
    repeat = np.zeros(len(item_index), bool)
    repeat[1:] = (
        ~new_user[1:] & (item_index[1:] == item_index[:-1]) & (timestamp[1:] == timestamp[:-1]) & known[1:]
    )

    user = np.cumsum(new_user) - 1
    keep = known & ~repeat
    users = user_id.filter(pa.array(new_user))
    # Place of each kept event counted from its user's newest, 0-based.
    lengths = np.bincount(user[keep], minlength=len(users))
    from_end = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(keep.sum())
    recent = from_end < max_events
    history = item_index[keep][recent]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_events))]).astype(np.int32)
    return pa.table(
        [
            users,
            pa.array(stable_hash(users)),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(history, pa.int32())),
        ],
        schema=schemas.sequences(users.type),
    )


def prepare_events(
    batch: pa.Table, events: EventsSettings, sequences: SequencesSettings, items: pa.Table
) -> pa.Table:
    """Events of one block, ready for the shuffle: shard, user_id, timestamp, tie, item_index.

    Args:
        batch: rows of the input.
        events: which columns and kinds count.
        sequences: number of shards and the cap per user.
        items: item_id and tie of every registered item, in the order of item_index.
    """
    rows = wanted_rows(batch, events)
    rows = rows.filter(is_complete(rows))
    item_id = rows.column("item_id").cast(items.column("item_id").type)
    item_index = pc.fill_null(pc.index_in(item_id, value_set=items.column("item_id")), -1)
    rows = rows.drop_columns(["item_id"]).append_column("item_index", item_index.cast(pa.int32()))
    known = pc.greater_equal(rows.column("item_index"), 0)
    # One row keeps a user alive whose items are all unknown; more would only cost.
    users = pc.unique(rows.filter(pc.invert(known)).column("user_id"))
    markers = pa.table(
        {
            "user_id": users,
            "timestamp": pa.repeat(pa.scalar(0, pa.int64()), len(users)),
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
    rows = rows.group_by(rows.column_names, use_threads=False).aggregate([])
    rows = rows.sort_by([("user_id", "ascending"), ("timestamp", "ascending")]).combine_chunks()
    new_user = _differs_from_previous(rows.column("user_id").combine_chunks())
    lengths = np.diff(np.append(np.flatnonzero(new_user), rows.num_rows))
    ends = np.repeat(np.cumsum(lengths), lengths)
    timestamp = rows.column("timestamp").to_numpy()
    oldest_kept = np.maximum(ends - max_events, ends - np.repeat(lengths, lengths))
    return rows.filter(pa.array(timestamp >= timestamp[oldest_kept]))


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
    shuffled = read_events(files, settings.events).map_batches(
        lambda batch: prepare_events(batch, settings.events, settings.sequences, ray.get(items)),
        batch_size=None,
        batch_format="pyarrow",
    )
    entries = write_partitions(
        shuffled, _Finish(run, settings.sequences.max_events), num_shards=settings.sequences.num_shards
    )
    users = sum(entry.rows for entry in entries)
    facts = {
        name: sum(int(entry.facts[name]) for entry in entries)
        for name in ("events", "users_without_history", "examples_leave_one_out", "examples_none")
    }
    entries.append(_write_popularity(run, entries, storage, int(semantic_ids.metadata["items"])))
    return entries, {
        "summary": f"{users:,} users, {facts['events']:,} of {events.metadata['events']:,} events kept",
        "users": users,
        "user_id_type": events.metadata["user_id_type"],
        **facts,
    }


def _item_table(storage: Storage, semantic_ids: Manifest, ties: str, seed: int) -> pa.Table:
    """item_id and tie (int32 rank that decides between equal timestamps), in the order of item_index."""
    item_id = load_semantic_ids(storage, semantic_ids).item_id
    if isinstance(item_id, pa.ChunkedArray):
        item_id = item_id.combine_chunks()
    if ties == "item_id":
        order = pc.sort_indices(item_id).to_numpy()
    else:
        order = np.argsort(stable_hash(item_id) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64), kind="stable")
    tie = np.empty(len(order), np.int32)
    tie[order] = np.arange(len(order), dtype=np.int32)
    return pa.table({"item_id": item_id, "tie": tie})


class _Finish:
    """Group and write one shard of users."""

    def __init__(self, run: Run, max_events: int) -> None:
        self._run, self._max_events = run, max_events

    def __call__(self, rows: pa.Table, shard: int) -> FileEntry:
        table = histories_of(rows, self._max_events)
        lengths = pc.list_value_length(table.column("history"))
        facts = {
            "events": pc.sum(lengths).as_py(),
            "users_without_history": pc.sum(pc.equal(lengths, 0)).as_py(),
        }
        for holdout, held_out in (("leave_one_out", HELD_OUT), ("none", 0)):
            facts[f"examples_{holdout}"] = num_examples(lengths.to_numpy(), held_out)
        return self._run.write_table(shard_name(shard), table, facts=facts)


def _write_popularity(run: Run, shards: Sequence[FileEntry], storage: Storage, num_items: int) -> FileEntry:
    """Count item popularity in a few tasks, each over many shards, and keep the top of the list."""

    def count(part: Sequence[FileEntry]) -> np.ndarray:
        total = np.zeros((2, num_items), np.int64)
        for entry in part:
            history = run.read_table(entry, columns=["history"]).column("history").combine_chunks()
            lengths = pc.list_value_length(history).to_numpy()
            items = history.flatten().to_numpy()
            place = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            seen = place < np.repeat(training_lengths(lengths, HELD_OUT), lengths)
            total += np.stack(
                [np.bincount(items, minlength=num_items), np.bincount(items[seen], minlength=num_items)]
            )
        return total

    def finish(*parts: np.ndarray) -> FileEntry:
        events, training_events = np.sum(parts, axis=0)
        top = np.argsort(-events, kind="stable")[:NUM_POPULAR]
        training_top = np.argsort(-training_events, kind="stable")[:NUM_POPULAR]
        kept = np.concatenate([top, np.setdiff1d(training_top, top)]).astype(np.int32)
        columns = [kept, events[kept], training_events[kept]]
        table = pa.table([pa.array(column) for column in columns], schema=schemas.popularity())
        return run.write_table("popularity.parquet", table)

    num_tasks = min(8, len(shards))
    parts = [ray.remote(count).remote(list(shards[task::num_tasks])) for task in range(num_tasks)]
    with plain_errors():
        entry: FileEntry = ray.get(ray.remote(finish).remote(*parts))
    return entry
