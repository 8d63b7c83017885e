"""Histories of users from events, and where a holdout cuts each history; without Ray.

B users of a shard, N values of a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.schemas import MOMENTS
from tiger_ray.core.hashing import shard_of, splitmix64, stable_hash
from tiger_ray.data.events import is_complete, wanted_rows
from tiger_ray.settings.events import EventsSettings
from tiger_ray.settings.sequences import SequencesSettings

HELD_OUT = 2
"""Events of a user that leave-one-out hides from training: validation target, then test target."""


POPULARITY_COLUMNS = {"leave_one_out": "training_events", "none": "events", "time": "training_events_time"}
"""Holdout -> the column of popularity.parquet that counts the events which training may see."""


@dataclass(frozen=True)
class Cuts:
    """Where a holdout cuts each history.

    >>> users = pa.table({"history": pa.array([[5, 6, 7, 8], [9]])})
    >>> cuts = cuts_of(users, "leave_one_out")
    >>> cuts.seen_B.tolist(), cuts.validation_at_B.tolist(), cuts.test_at_B.tolist()
    ([2, 1], [2, -1], [3, -1])
    """

    seen_B: npt.NDArray[np.int64]
    """Number of oldest events that training may see."""
    validation_at_B: npt.NDArray[np.int64]
    """Place of the validation target, at least 1; -1 for a user without a validation target."""
    test_at_B: npt.NDArray[np.int64]
    """Place of the test target, at least 1; -1 for a user without a test target."""

    @property
    def num_examples(self) -> int:
        """Training examples: every event that training may see, except each user's first."""
        return int(np.maximum(self.seen_B - 1, 0).sum())


def user_shards(manifest: Manifest) -> list[FileEntry]:
    """The files of a sequences artifact that hold users."""
    return [entry for entry in manifest.files if entry.name.startswith("shard-")]


def holdouts(has_moments: bool) -> list[str]:
    """The holdouts that can cut a sequences artifact, with or without the moments of the time split."""
    return [name for name in POPULARITY_COLUMNS if has_moments or name != "time"]


def columns_for(holdout: str) -> list[str]:
    """Columns of a user shard that `cuts_of` reads."""
    return ["history", *(MOMENTS if holdout == "time" else ())]


def cuts_of(users: pa.Table, holdout: str) -> Cuts:
    """Where a holdout cuts the histories of some users.

    `leave_one_out` hides each user's last two events: the validation target and the test target. Users with
    fewer than three events are not evaluated, and training sees all their events. `time` hides every event
    from `sequences.validation_from` on. Its targets are the first event of the validation period and the
    first event of the test period. The history of a target is every earlier event, so a test history holds
    events of the validation period. `none` hides nothing, and no user is evaluated.

    Args:
        users: the columns of `columns_for`, one row per user.
        holdout: `training.holdout`.

    Source: paper section 4 (leave-one-out); the rule for short users and the time split are ours.
    """
    length_B = pc.list_value_length(users.column("history")).to_numpy().astype(np.int64)
    nowhere_B = np.full(len(length_B), -1)
    if holdout == "none":
        return Cuts(length_B, nowhere_B, nowhere_B)
    if holdout == "time":
        before_validation_B, before_test_B = (
            users.column(name).to_numpy().astype(np.int64) for name in MOMENTS
        )
        return Cuts(
            before_validation_B,
            _first_of_period(before_validation_B, before_test_B),
            _first_of_period(before_test_B, length_B),
        )
    evaluated_B = length_B > HELD_OUT
    return Cuts(
        np.where(evaluated_B, length_B - HELD_OUT, length_B),
        np.where(evaluated_B, length_B - HELD_OUT, -1),
        np.where(evaluated_B, length_B - 1, -1),
    )


def _first_of_period(start_B: npt.NDArray[np.int64], end_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of the first event of a period; -1 if the period is empty, or if no event comes before it."""
    return np.where((start_B > 0) & (start_B < end_B), start_B, -1)


NUM_POPULAR = 100_000
"""Number of most popular items kept for fallback lists and the popularity baseline.

Items may be unavailable on a later night, so this is far more than a list is long.
"""


def histories_of(
    events: pa.Table, max_events: int, moments: tuple[int, int] | None = None
) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
    """Group one shard's events into histories; a repeated event counts once.

    A repeat has the user, item and timestamp of another event. With a column `order`, the first of the
    repeats counts.

    Args:
        events: user_id, timestamp int64, tie int64, item_index int32 (-1: unknown item), and perhaps order
            int64. Events with equal timestamps are sorted by order, then by tie.
        max_events: most recent events kept per user.
        moments: first tick of the validation period and of the test period; None without a time split.

    Returns:
        `schemas.sequences` rows sorted by user_id; and (E,) bool for the events of all histories, one after the
        other: true where only `tie` orders the event and the event before it in the history.
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
        # Sort by `order` only now: repeats must be adjacent above. The sort is stable: ties keep their order.
        order = events.column("order").to_numpy()[keep]
        place = np.lexsort((order, timestamp, user))
        item_index, order = item_index[place], order[place]
    # Place of each kept event counted from its user's newest, 0-based.
    lengths = np.bincount(user, minlength=len(users))
    from_end = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(user))
    recent = from_end < max_events
    history = item_index[recent]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_events))]).astype(np.int32)
    before = [
        np.bincount(user[recent & (timestamp < moment)], minlength=len(users)) for moment in moments or ()
    ]
    # The sort above moves events within one timestamp only, so `user` and `timestamp` still fit `item_index`.
    moment = [user, timestamp, *([order] if has_order else [])]
    tied = np.zeros(len(user), bool)
    tied[1:] = np.logical_and.reduce([key[1:] == key[:-1] for key in moment])
    tied = tied[recent]
    tied[offsets[:-1][np.diff(offsets) > 0]] = False  # the event before may be older than `max_events` allows
    table = pa.table(
        [
            users,
            pa.array(stable_hash(users)),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(history, pa.int32())),
            *(pa.array(count, pa.int32()) for count in before),
        ],
        schema=schemas.sequences(users.type, has_moments=moments is not None),
    )
    return table, tied


def decided_by_tie(
    target_at_B: npt.NDArray[np.int64], lengths_B: npt.NDArray[np.int64], tied_E: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """True for a user whose target would be another item if events of one moment came in another order, (B,) bool.

    Args:
        target_at_B: place of the target in the history, (B,) int64; -1 for a user without a target.
        lengths_B: events per history, (B,) int64; they sum to E.
        tied_E: of `histories_of`, (E,) bool; false for the first event of each history.
    """
    target_at_B, has_target_B = np.cumsum(lengths_B) - lengths_B + target_at_B, target_at_B >= 0
    # The event after a user's last event is the first of another user, or this end.
    tied_E = np.append(tied_E, False)
    decided_B = np.zeros(len(lengths_B), bool)
    decided_B[has_target_B] = tied_E[target_at_B[has_target_B]] | tied_E[target_at_B[has_target_B] + 1]
    return decided_B


def seen_events(users: pa.Table, num_items: int, holdouts: Sequence[str]) -> np.ndarray:
    """Events of each item that each holdout lets training see, (holdouts, items) int64.

    Args:
        users: rows of a user shard, with the columns of `columns_for` each holdout.
        num_items: number of registered items.
        holdouts: names of holdouts.
    """
    history = users.column("history").combine_chunks()
    lengths = pc.list_value_length(history).to_numpy()
    items = history.flatten().to_numpy()
    place = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    seen = (place < np.repeat(cuts_of(users, holdout).seen_B, lengths) for holdout in holdouts)
    return np.stack([np.bincount(items[some], minlength=num_items) for some in seen])


def popularity_of(counts: Mapping[str, np.ndarray]) -> pa.Table:
    """The most popular items by each of these counts, as rows of `schemas.popularity`.

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


def item_table_of(item_id: pa.Array, ties: str, seed: int) -> pa.Table:
    """item_id and tie of every registered item, as `prepare_events` reads them.

    Args:
        item_id: ids in the order of item_index.
        ties: section `events`.
        seed: of the hash.
    """
    if ties == "item_id":
        tie = np.empty(len(item_id), np.int64)
        tie[pc.sort_indices(item_id).to_numpy()] = np.arange(len(item_id))
    else:
        tie = splitmix64(stable_hash(item_id), seed).view(np.int64)
    return pa.table({"item_id": item_id, "tie": tie})


def prepare_events(
    batch: pa.Table, events: EventsSettings, sequences: SequencesSettings, items: pa.Table
) -> pa.Table:
    """Events of one block, ready for the shuffle: shard, user_id, timestamp, tie, item_index, and perhaps order.

    Args:
        batch: rows of the input.
        events: section `events`: columns, and kinds of events to keep.
        sequences: section `sequences`: number of shards, and the most events per user.
        items: item_id and tie (int64) of every registered item, in the order of item_index; tie is a rank
            where `events.ties` is `item_id`, else a hash of the item.
    """
    rows = wanted_rows(batch, events)
    complete = is_complete(rows)
    incomplete = rows.filter(pc.invert(complete)).column("user_id").drop_null()
    rows = rows.filter(complete)
    item_id = rows.column("item_id").cast(items.column("item_id").type)
    item_index = pc.fill_null(pc.index_in(item_id, value_set=items.column("item_id")), -1)
    rows = rows.drop_columns(["item_id"]).append_column("item_index", item_index.cast(pa.int32()))
    known = pc.greater_equal(rows.column("item_index"), 0)
    # One marker row per user keeps users whose items are all unknown or null.
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
    tie = items.column("tie").to_numpy()[index]
    user_hash = stable_hash(rows.column("user_id"))
    if events.ties != "item_id":
        # Mix the user in: an order of items that all users share could be learned from other users.
        tie = splitmix64(tie.view(np.uint64) ^ user_hash).view(np.int64)
    tie = np.where(index >= 0, tie, -1)
    shard = shard_of(user_hash, sequences.num_shards)
    return rows.append_column("tie", pa.array(tie)).append_column("shard", pa.array(shard))


def _most_recent(rows: pa.Table, max_events: int) -> pa.Table:
    """The last `max_events` of each user of this block, and all events with the timestamp of the oldest kept."""
    if rows.num_rows <= max_events:
        return rows
    # Remove repeats first: a repeat would push out an older event, and which event depends on the blocks.
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
    """True where a value starts a run of equal values, (N,) bool."""
    starts = np.ones(len(values), bool)
    if len(values) > 1:
        starts[1:] = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1)).to_numpy(
            zero_copy_only=False
        )
    return starts
