"""Histories equal those of a plain loop over all events, however the events are cut into blocks."""

from collections import defaultdict
from itertools import permutations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.artifacts import schemas
from tiger_ray.core.hashing import shard_of, stable_hash
from tiger_ray.data.histories import (
    cuts_of,
    decided_by_tie,
    histories_of,
    item_table_of,
    prepare_events,
)
from tiger_ray.settings.events import EventsSettings
from tiger_ray.settings.sequences import SequencesSettings

ITEMS = ["i0", "i1", "i2", "i3", "i4"]
TIES = [3, 0, 4, 1, 2]


def item_table(ids=ITEMS, ties=TIES, type=None):
    return pa.table({"item_id": pa.array(ids, type), "tie": pa.array(ties, pa.int64())})


def event_table(events, user_type=None, item_type=None):
    """Events of three values, or of four: the last is the place in the log."""
    users, items, times, *placed = zip(*events, strict=True) if events else ((), (), (), ())
    columns = {
        "user_id": pa.array(users, user_type or pa.string()),
        "item_id": pa.array(items, item_type or pa.string()),
        "timestamp": pa.array(times, pa.int64()),
    }
    if placed:
        columns["place"] = pa.array(placed[0], pa.int32())
    return pa.table(columns)


PLAIN = EventsSettings(uri="/e", ties="item_id")
BY_HASH = EventsSettings(uri="/e")
BY_PLACE = EventsSettings(uri="/e", ties="column", tie="place")


def histories(blocks, max_events, num_shards=2, items=None, settings=PLAIN, **types):
    """user_id -> history as item_index, through `prepare_events` per block and `histories_of` per shard."""
    chosen = SequencesSettings(num_shards=num_shards, max_events=max_events)
    prepared = pa.concat_tables(
        prepare_events(event_table(block, **types), settings, chosen, items or item_table())
        for block in blocks
    )
    found = {}
    for shard in range(num_shards):
        rows = prepared.filter(pa.compute.equal(prepared.column("shard"), shard)).drop_columns(["shard"])
        if rows.num_rows:
            table, _ = histories_of(rows, max_events)
            assert table.column("user_id").to_pylist() == sorted(table.column("user_id").to_pylist())
            assert (shard_of(stable_hash(table.column("user_id")), num_shards) == shard).all()
            found |= zip(
                table.column("user_id").to_pylist(), table.column("history").to_pylist(), strict=True
            )
    return found


def loop_histories(events, max_events, ids=ITEMS, ties=TIES):
    """The same by the definition: order by time then tie, drop exact repeats and unknown items, keep the end; and every
    user that an event names."""
    by_user = defaultdict(set)
    for user, item, time in events:
        if user is None:
            continue
        counts = item in ids and time is not None
        by_user[user] |= {(time, ties[ids.index(item)], ids.index(item))} if counts else set()
    return {user: [index for _, _, index in sorted(seen)][-max_events:] for user, seen in by_user.items()}


users = st.sampled_from(["u", "u", "ü", "", None])  # one of them busy, so that the cap cuts
event = st.tuples(users, st.sampled_from([*ITEMS, *ITEMS, "gone", None]), st.integers(-3, 6) | st.none())
repeated = st.tuples(event, st.integers(1, 6)).map(lambda pair: [pair[0]] * pair[1])
events = st.lists(repeated, max_size=25).map(lambda lists: [event for part in lists for event in part])


@given(events, st.lists(st.integers(0, 40), max_size=4), st.integers(3, 6), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_histories_equal_a_plain_loop_wherever_the_blocks_are_cut(events, cuts, max_events, num_shards):
    edges = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    blocks = [events[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    assert histories(blocks, max_events, num_shards) == loop_histories(events, max_events)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, -(2**63), 2**63 - 1]),
            st.sampled_from([2**53, 2**53 + 1, 7]),
            st.integers(0, 3),
        ),
        max_size=20,
    )
)
@settings(max_examples=40, deadline=None)
def test_int64_ids_are_told_apart_to_the_last_bit(events):
    ids = [2**53, 2**53 + 1]
    found = histories(
        [events], 5, items=item_table(ids, [0, 1], pa.int64()), user_type=pa.int64(), item_type=pa.int64()
    )
    assert found == loop_histories(events, 5, ids, [0, 1])


def test_events_of_one_moment_are_ordered_by_tie_not_by_arrival():
    block = [("u", item, 5) for item in ITEMS]
    by_tie = np.argsort(TIES).tolist()
    assert histories([block], 9) == histories([block[::-1]], 9) == {"u": by_tie}


def hash_tie(user, index):
    """What orders an item among a user's events of one moment and place, by plain integers."""
    key = (TIES[index] ^ int(stable_hash(pa.array([user]))[0])) + 0x9E3779B97F4A7C15
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key %= 2**64
        key = (key ^ key >> shift) * factor
    key %= 2**64
    key ^= key >> 31
    return key - 2**64 if key >= 2**63 else key


placed_event = st.tuples(  # few different ones, so that most are repeats but for the place
    st.sampled_from(["u", "u", "v", None]),
    st.sampled_from(["i0", "i1", "i4", "gone"]),
    st.integers(0, 1),
    st.integers(0, 9) | st.none(),
)


@given(st.lists(placed_event, max_size=30), st.lists(st.integers(0, 30), max_size=3), st.integers(3, 5))
@settings(max_examples=40, deadline=None)
def test_histories_with_ties_by_column_equal_a_plain_sort_wherever_the_blocks_are_cut(
    events, cuts, max_events
):
    first_place = {}
    for user, item, time, place in events:
        if user is not None and place is not None and item in ITEMS:
            event = (user, time, ITEMS.index(item))
            first_place[event] = min(place, first_place.get(event, place))
    expected = {user: [] for user, *_ in events if user is not None}
    for (user, time, index), place in first_place.items():
        expected[user].append((time, place, hash_tie(user, index), index))
    expected = {user: [index for *_, index in sorted(rows)][-max_events:] for user, rows in expected.items()}

    edges = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    blocks = [events[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    assert histories(blocks, max_events, settings=BY_PLACE) == expected


def test_a_tie_column_orders_equal_timestamps_only_and_the_hash_orders_what_is_equal_in_it():
    for user in ("u", "v", "w", "x"):
        places = {"i0": (2, 1), "i1": (1, 9), "i2": (2, 1), "i3": (2, 0), "i4": (3, -7)}
        block = [(user, item, *place) for item, place in places.items()]
        equal = sorted([0, 2], key=lambda index, user=user: hash_tie(user, index))
        assert histories([block], 9, settings=BY_PLACE) == {user: [1, 3, *equal, 4]}
        assert histories([block[::-1]], 9, settings=BY_PLACE) == {user: [1, 3, *equal, 4]}
    first = {min([0, 2], key=lambda index, user=user: hash_tie(user, index)) for user in "uvwxyz"}
    assert first == {0, 2}


def test_a_tie_column_decides_the_order_and_not_what_counts_as_a_repeat():
    twice = [("u", "i0", 5, 1), ("u", "i1", 5, 2), ("u", "i0", 5, 3)]
    assert histories([twice], 9, settings=BY_PLACE) == {"u": [0, 1]}
    assert histories([twice[1:], twice[:1]], 9, settings=BY_PLACE) == {"u": [0, 1]}
    assert histories([[*twice, ("u", "i2", 5, 4)]], 3, settings=BY_PLACE) == {"u": [0, 1, 2]}
    # Ten repeats of the newest push nothing out, wherever the blocks are cut.
    crowded = [("u", f"i{n}", n, 0) for n in range(3)] + [("u", "i3", 3, n) for n in range(10)]
    for blocks in ([crowded], [crowded[:6], crowded[6:]]):
        assert histories(blocks, 3, settings=BY_PLACE) == {"u": [1, 2, 3]}


NUM_NOISE_USERS, NUM_NOISE_ITEMS, BASKET = 1500, 120, 8


def noise_targets(settings, seed=0):
    """The last item of each user in a log that says nothing: random baskets, and every event at one moment."""
    draw = np.random.default_rng(5)
    basket_UB = np.argsort(draw.random((NUM_NOISE_USERS, NUM_NOISE_ITEMS)), axis=1)[:, :BASKET]
    ids = np.array([f"i{n:03}" for n in range(NUM_NOISE_ITEMS)])
    log = pa.table(
        {
            "user_id": np.repeat([f"u{n}" for n in range(NUM_NOISE_USERS)], BASKET),
            "item_id": ids[basket_UB.ravel()],
            "timestamp": np.full(basket_UB.size, 7),
        }
    )
    items = item_table_of(pa.array(ids), settings.ties, seed)
    rows = prepare_events(log, settings, SequencesSettings(num_shards=1), items)
    table, tied_E = histories_of(rows.drop_columns(["shard"]), 50)
    at_B = cuts_of(table, "leave_one_out").test_at_B
    assert decided_by_tie(at_B, np.full(NUM_NOISE_USERS, BASKET), tied_E).all()
    history_UB = table.column("history").combine_chunks().flatten().to_numpy().reshape(-1, BASKET)
    return history_UB[:, -1]


def recall_of_the_others_targets(target_U):
    """Recall@10 of the most frequent targets of half of the users for the other half."""
    seen, asked = np.split(target_U, 2)
    guess = np.argsort(-np.bincount(seen, minlength=NUM_NOISE_ITEMS), kind="stable")[:10]
    return np.isin(asked, guess).mean()


def test_on_noise_the_targets_of_other_users_say_nothing_by_default_and_much_if_item_ids_decide():
    chance = 10 / NUM_NOISE_ITEMS
    error = (chance * (1 - chance) / (NUM_NOISE_USERS / 2)) ** 0.5
    assert abs(recall_of_the_others_targets(noise_targets(BY_HASH)) - chance) < 4 * error
    # The largest of 8 of 120 ids is among the 10 largest ids with probability 1 - (110 over 8) / (120 over 8).
    assert abs(recall_of_the_others_targets(noise_targets(PLAIN)) - 0.51) < 0.08


def test_another_seed_orders_the_events_of_one_moment_anew():
    same = (noise_targets(BY_HASH, seed=0) == noise_targets(BY_HASH, seed=1)).mean()
    assert abs(same - 1 / BASKET) < 4 * (1 / BASKET * (1 - 1 / BASKET) / NUM_NOISE_USERS) ** 0.5


@given(events, st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=20, deadline=None)
def test_ties_by_hash_do_not_depend_on_blocks_or_order_of_arrival(events, cuts):
    edges = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    blocks = [events[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    items = item_table_of(pa.array(ITEMS), "hash", 0)
    found = histories(blocks, 4, items=items, settings=BY_HASH)
    assert found == histories([events[::-1]], 4, items=items, settings=BY_HASH)


distinct_event = st.tuples(st.sampled_from("uv"), st.sampled_from(ITEMS[:4]), st.integers(0, 3))


@given(st.sets(distinct_event, min_size=1, max_size=14), st.integers(3, 6), st.sampled_from([None, (1, 2)]))
@settings(max_examples=30, deadline=None)
def test_a_tie_decides_a_target_if_another_order_of_the_items_gives_another_target(log, max_events, moments):
    """The oracle tries every order of the four items."""
    split = SequencesSettings(num_shards=1, max_events=max_events)
    holdout = "time" if moments else "leave_one_out"
    seen = {"validation_at_B": defaultdict(set), "test_at_B": defaultdict(set)}
    said = {}
    for ties in permutations(range(4)):
        rows = prepare_events(event_table(sorted(log)), PLAIN, split, item_table(ITEMS[:4], ties))
        table, tied_E = histories_of(rows.drop_columns(["shard"]), max_events, moments)
        lists = table.column("history").to_pylist()
        cuts = cuts_of(table, holdout)
        for name, targets in seen.items():
            at_B = getattr(cuts, name)
            lengths_B = np.array([len(items) for items in lists])
            said[name] = decided_by_tie(at_B, lengths_B, tied_E).tolist()
            for user, (items, at) in enumerate(zip(lists, at_B.tolist(), strict=True)):
                targets[user].add(items[at] if at >= 0 else None)
    for name, targets in seen.items():
        assert said[name] == [len(targets[user]) > 1 for user in range(len(targets))]


def test_the_same_item_at_two_times_stays_twice_and_an_exact_repeat_goes():
    assert histories([[("u", "i0", 1), ("u", "i0", 2)], [("u", "i0", 1)]], 9) == {"u": [0, 0]}


def test_the_most_recent_events_are_kept_even_if_repeats_crowd_the_end():
    block = [("u", "i0", 1), ("u", "i1", 2), ("u", "i2", 3), *[("u", "i3", 4)] * 10]
    for blocks in ([block], [block[:4], block[4:]]):
        assert histories(blocks, 3) == {"u": [1, 2, 3]}


def test_the_cap_holds_over_all_blocks_together():
    blocks = [[("u", "i0", 1), ("u", "i1", 4)], [("u", "i2", 2), ("u", "i3", 3)], [("u", "i4", 0)]]
    assert histories(blocks, 3) == {"u": [2, 3, 1]}


def test_a_user_of_unknown_items_only_keeps_a_row_with_an_empty_history():
    assert histories([[("u", "gone", 1), ("u", "lost", 2), ("v", "i1", 1)]], 9) == {"u": [], "v": [1]}


def test_a_busy_user_does_not_travel_through_the_shuffle():
    block = [("bot", ITEMS[n % 5], n) for n in range(500)] + [("u", "i1", 1), ("bot", "gone", 1)] * 20
    block += [("bot", "i0", 499)] * 100
    prepared = prepare_events(
        event_table(block), EventsSettings(uri="/e"), SequencesSettings(max_events=10), item_table()
    )
    assert prepared.num_rows == 10 + 1 + 1  # the bot's last ten, its marker, and the user's one event


def test_rows_have_the_schema_of_the_artifact_and_the_hash_of_the_user():
    prepared = prepare_events(
        event_table([("b", "i1", 2), ("a", "i0", 1)], user_type=pa.large_string()),
        EventsSettings(uri="/e"),
        SequencesSettings(num_shards=1),
        item_table(),
    )
    table, _ = histories_of(prepared.drop_columns(["shard"]), 10)
    assert table.schema == schemas.sequences(pa.large_string())
    assert table.column("user_id").to_pylist() == ["a", "b"]
    assert table.column("user_hash").to_pylist() == stable_hash(pa.array(["a", "b"])).tolist()


def test_a_user_with_a_million_events_is_cut_before_the_shuffle():
    count = 1_000_000
    events = pa.table(
        {
            "user_id": pa.repeat("bot", count),
            "item_id": pa.repeat("a", count),
            "timestamp": pa.array(np.arange(count)[::-1].copy()),
        }
    )
    items = pa.table({"item_id": ["a"], "tie": pa.array([0], pa.int64())})
    settings = (
        EventsSettings(uri="unused", timestamp_unit="s"),
        SequencesSettings(num_shards=1, max_events=10),
    )

    prepared = prepare_events(events, *settings, items)

    assert sorted(prepared.column("timestamp").to_pylist()) == list(range(count - 10, count))
