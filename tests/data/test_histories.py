"""Every holdout cuts histories where a plain loop over users does, and training sees nothing of what it hides."""

import tempfile
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from itertools import islice

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.data.events import ticks_at
from tiger_ray.data.histories import (
    columns_for,
    cuts_of,
    popularity_of,
    prepare_events,
    seen_events,
)
from tiger_ray.published.sequences import load_validation, open_examples
from tiger_ray.settings.events import EventsSettings
from tiger_ray.settings.sequences import SequencesSettings
from tiger_ray.stages.sequences import _moments, _WriteShard
from tiger_ray.training.examples import BATCHES_PER_GROUP

NUM_ITEMS = 40
ITEMS = pa.table({"item_id": pa.array(range(NUM_ITEMS)), "tie": pa.array(range(NUM_ITEMS), pa.int64())})
START = datetime(2014, 1, 1, tzinfo=UTC)


def moments(validation_at, test_at):
    """Settings of two moments, in seconds after START."""
    moment = lambda seconds: START + timedelta(seconds=seconds)
    return {"validation_from": moment(validation_at), "test_from": moment(test_at)}


def sequences_of(events, max_events, folder, **chosen):
    """(user, item, seconds after START) -> a sequences artifact of two shards, popularity among it."""
    users, items, times = zip(*events, strict=True)
    start = ticks_at(START, "s")
    table = pa.table(
        {
            "user_id": users,
            "item_id": pa.array(items, pa.int64()),
            "timestamp": [start + time for time in times],
        }
    )
    chosen = SequencesSettings(num_shards=2, max_events=max_events, **chosen)
    rows = prepare_events(table, EventsSettings(uri="/e", ties="item_id"), chosen, ITEMS)
    storage = Storage(folder)
    run = storage.begin("sequences", "0" * 64)
    finish = _WriteShard(run, max_events, _moments(chosen, "s"))
    entries = []
    for shard in range(2):
        mine = rows.filter(pa.compute.equal(rows.column("shard"), shard)).drop_columns(["shard"])
        if mine.num_rows:
            entries.append(finish(mine, shard))
    return storage, run.as_manifest(entries)


def shards_of(storage, sequences, columns=None):
    return [storage.read_table(sequences, entry, columns) for entry in sequences.files]


def loop_histories(events, max_events):
    """user -> (second, item) of each event that is kept, oldest first."""
    by_user = defaultdict(set)
    for user, item, time in events:
        by_user[user].add((time, item))
    return {user: sorted(seen)[-max_events:] for user, seen in by_user.items()}


def loop_cuts(history, holdout, validation_at=None, test_at=None):
    """(events seen, place of the validation target, place of the test target) of one user, by the definition."""
    if holdout == "none":
        return len(history), -1, -1
    if holdout == "leave_one_out":
        if len(history) < 3:
            return len(history), -1, -1
        return len(history) - 2, len(history) - 2, len(history) - 1

    def first(start, end):
        found = [place for place, (time, _) in enumerate(history) if start <= time < end]
        return found[0] if found and found[0] > 0 else -1

    seen = sum(time < validation_at for time, _ in history)
    return seen, first(validation_at, test_at), first(test_at, 10**9)


event = st.tuples(st.sampled_from("aaabcd"), st.integers(0, NUM_ITEMS - 1), st.integers(0, 9))
repeated = st.tuples(event, st.integers(1, 3)).map(lambda pair: [pair[0]] * pair[1])
events = st.lists(repeated, min_size=1, max_size=30).map(
    lambda parts: [one for part in parts for one in part]
)
two_moments = st.tuples(st.integers(0, 10), st.integers(1, 5)).map(lambda pair: (pair[0], sum(pair)))


@given(events, st.integers(3, 8), two_moments)
@settings(max_examples=25, deadline=None)
def test_every_holdout_cuts_every_history_where_a_plain_loop_does(events, max_events, at):
    with tempfile.TemporaryDirectory() as folder:
        storage, sequences = sequences_of(events, max_events, folder, **moments(*at))
        tables = shards_of(storage, sequences)
    expected = loop_histories(events, max_events)
    assert sum(table.num_rows for table in tables) == len(expected)
    for table, entry in zip(tables, sequences.files, strict=True):
        assert table.schema == schemas.sequences(pa.string(), has_moments=True)
        histories = [expected[user] for user in table.column("user_id").to_pylist()]
        assert table.column("history").to_pylist() == [[item for _, item in each] for each in histories]
        for holdout in ("leave_one_out", "time", "none"):
            cuts = cuts_of(table, holdout)
            found = list(zip(cuts.seen_B, cuts.validation_at_B, cuts.test_at_B, strict=True))
            wanted = [loop_cuts(history, holdout, *at) for history in histories]
            assert found == wanted, holdout
            examples = sum(max(seen - 1, 0) for seen, _, _ in wanted)
            assert cuts.num_examples == entry.facts[f"examples_{holdout}"] == examples
            if holdout != "none":
                assert entry.facts[f"validation_users_{holdout}"] == sum(place >= 0 for _, place, _ in wanted)
                assert entry.facts[f"test_users_{holdout}"] == sum(place >= 0 for _, _, place in wanted)


@given(events, st.integers(3, 8), two_moments)
@settings(max_examples=25, deadline=None)
def test_popularity_counts_what_each_holdout_lets_training_see(events, max_events, at):
    names = ["leave_one_out", "none", "time"]
    with tempfile.TemporaryDirectory() as folder:
        storage, sequences = sequences_of(events, max_events, folder, **moments(*at))
        counts = sum(seen_events(table, NUM_ITEMS, names) for table in shards_of(storage, sequences))
    table = popularity_of(dict(zip(names, counts, strict=True)))
    assert table.schema == schemas.popularity(has_moments=True)
    for holdout, column in zip(names, ("training_events", "events", "training_events_time"), strict=True):
        expected = Counter()
        for history in loop_histories(events, max_events).values():
            expected.update(item for _, item in history[: loop_cuts(history, holdout, *at)[0]])
        found = zip(table.column("item_index").to_pylist(), table.column(column).to_pylist(), strict=True)
        assert {item: count for item, count in found if count} == expected


def test_the_most_popular_items_of_every_holdout_are_kept(monkeypatch):
    monkeypatch.setattr("tiger_ray.data.histories.NUM_POPULAR", 1)
    counts = {"leave_one_out": [0, 3, 0, 0], "none": [9, 8, 7, 6], "time": [0, 0, 0, 2]}
    table = popularity_of({name: pa.array(count).to_numpy() for name, count in counts.items()})
    assert table.to_pydict() == {
        "item_index": [0, 1, 3],
        "events": [9, 8, 6],
        "training_events": [0, 3, 0],
        "training_events_time": [0, 0, 2],
    }


@given(events, st.integers(3, 8), two_moments)
@settings(max_examples=25, deadline=None)
def test_no_event_of_the_validation_or_test_period_is_in_a_training_example(events, max_events, at):
    # The item says when it happened: hidden ones are odd.
    events = [(user, item - item % 2 + (time >= at[0]), time) for user, item, time in events]
    with tempfile.TemporaryDirectory() as folder:
        written = sequences_of(events, max_events, folder, **moments(*at))
        examples = open_examples(*written, holdout="time", max_history=9, events_in_memory=10**6, seed=0)
        shown = Counter()
        if len(examples):
            for step in islice(examples.batches(len(examples)), BATCHES_PER_GROUP):
                for batch in step:
                    assert (batch.item_E % 2 == 0).all()
                    assert (batch.target_B % 2 == 0).all()
                    shown.update(batch.target_B.tolist())
    expected = Counter()
    for history in loop_histories(events, max_events).values():
        expected.update([item for _, item in history if item % 2 == 0][1:])
    assert shown == Counter({item: BATCHES_PER_GROUP * count for item, count in expected.items()})


@given(events, st.integers(3, 8), two_moments, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_validation_asks_for_the_first_event_of_its_period_given_all_before(events, max_events, at, workers):
    expected = []
    for history in loop_histories(events, max_events).values():
        _, place, _ = loop_cuts(history, "time", *at)
        if place >= 0:
            items = [item for _, item in history]
            expected.append((items[:place], items[place]))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        written = sequences_of(events, max_events, folder, **moments(*at))
        for rank in range(workers):
            part = load_validation(
                *written, 10**6, lambda *_: None, holdout="time", rank=rank, world_size=workers
            )
            ends = part.histories.lengths_B.cumsum()
            found += [
                (part.histories.item_index_E[end - length : end].tolist(), int(target))
                for end, length, target in zip(ends, part.histories.lengths_B, part.target_B, strict=True)
            ]
    assert sorted(found) == sorted(expected)


def test_an_event_at_the_moment_itself_is_of_the_period_that_begins(tmp_path):
    events = [("a", item, time) for item, time in enumerate([0, 4, 5, 7, 8, 9])]
    (table,) = shards_of(*sequences_of(events, 9, str(tmp_path), **moments(5, 8)))
    cuts = cuts_of(table, "time")
    assert (cuts.seen_B.tolist(), cuts.validation_at_B.tolist(), cuts.test_at_B.tolist()) == ([2], [2], [4])


def test_the_cap_takes_the_oldest_events_and_with_them_those_who_have_no_other_before(tmp_path):
    events = [("a", item, item) for item in range(6)]
    (table,) = shards_of(*sequences_of(events, 3, str(tmp_path), **moments(2, 4)))
    assert table.column("history").to_pylist() == [[3, 4, 5]]
    cuts = cuts_of(table, "time")
    assert (cuts.seen_B.tolist(), cuts.validation_at_B.tolist(), cuts.test_at_B.tolist()) == ([0], [-1], [1])


@pytest.mark.parametrize(
    ("holdout", "seen", "validation_at", "test_at"),
    [
        ("leave_one_out", [0, 1, 2, 1, 2, 8], [-1, -1, -1, 1, 2, 8], [-1, -1, -1, 2, 3, 9]),
        ("none", [0, 1, 2, 3, 4, 10], [-1] * 6, [-1] * 6),
    ],
)
def test_leave_one_out_hides_the_last_two_events_unless_the_user_is_too_short(
    holdout, seen, validation_at, test_at
):
    table = pa.table({"history": [list(range(length)) for length in (0, 1, 2, 3, 4, 10)]})
    assert columns_for(holdout) == table.column_names
    cuts = cuts_of(table, holdout)
    assert cuts.seen_B.tolist() == seen
    assert cuts.validation_at_B.tolist() == validation_at
    assert cuts.test_at_B.tolist() == test_at
    assert all(column.dtype == "int64" for column in (cuts.seen_B, cuts.validation_at_B, cuts.test_at_B))


def test_examples_are_the_seen_events_but_the_first():
    table = pa.table({"history": [list(range(length)) for length in (0, 1, 2, 3, 4, 9)]})
    assert cuts_of(table, "none").num_examples == 0 + 0 + 1 + 2 + 3 + 8
    # Two events: too few to hide any. Three: one is left, and predicts nothing. Four: one example.
    assert cuts_of(table, "leave_one_out").num_examples == 0 + 0 + 1 + 0 + 1 + 6


def test_without_moments_an_artifact_is_what_it_was(tmp_path):
    storage, sequences = sequences_of([("a", 1, 1), ("b", 2, 2)], 3, str(tmp_path))
    for table, entry in zip(shards_of(storage, sequences), sequences.files, strict=True):
        assert table.schema == schemas.sequences(pa.string())
        assert set(entry.facts) == {
            "events",
            "users_without_history",
            "examples_leave_one_out",
            "examples_none",
            "validation_users_leave_one_out",
            "test_users_leave_one_out",
            "validation_tied_leave_one_out",
            "test_tied_leave_one_out",
        }
