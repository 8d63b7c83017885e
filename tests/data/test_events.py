"""Events: which rows count, what their timestamps mean, and when an input is refused."""

import re
from datetime import UTC, date, datetime
from fractions import Fraction

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiger_ray.data.events import (
    add_counts,
    is_complete,
    require_tie,
    require_usable,
    ticks_at,
    timestamp_unit,
    wanted_rows,
)
from tiger_ray.errors import DataError
from tiger_ray.settings.events import EventsSettings

SECOND_2026 = int(datetime(2026, 11, 23, tzinfo=UTC).timestamp())


def events_settings(**changed):
    return EventsSettings(uri="/events", **changed)


def rows(table, **changed):
    return wanted_rows(pa.table(table), events_settings(**changed)).to_pylist()


def test_columns_are_renamed_and_all_others_left_behind():
    table = {"who": ["u"], "what": [7], "when": [3], "price": [1.5]}
    assert rows(table, user_id="who", item_id="what", timestamp="when") == [
        {"user_id": "u", "item_id": 7, "timestamp": 3}
    ]


def test_only_wanted_kinds_of_event_count_and_a_null_kind_is_not_wanted():
    table = {
        "user_id": list("abcd"),
        "item_id": list("wxyz"),
        "timestamp": [1, 2, 3, 4],
        "kind": pa.array(["buy", "view", None, "cart"]).dictionary_encode(),
    }
    kept = rows(table, event_type="kind", event_types=("buy", "cart"))
    assert [row["user_id"] for row in kept] == ["a", "d"]


def test_without_kinds_every_row_counts_nulls_too():
    table = {"user_id": ["u", None], "item_id": ["i", "j"], "timestamp": pa.array([None, 2], pa.int64())}
    assert rows(table) == [
        {"user_id": "u", "item_id": "i", "timestamp": None},
        {"user_id": None, "item_id": "j", "timestamp": 2},
    ]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_timestamp_keeps_the_ticks_of_its_own_unit(unit):
    ticks = pa.array([1_700_000_000, None], pa.int64()).cast(pa.timestamp(unit, "UTC"))
    table = {"user_id": ["u", "u"], "item_id": ["i", "j"], "timestamp": ticks}
    assert [row["timestamp"] for row in rows(table)] == [1_700_000_000, None]


@pytest.mark.parametrize("type", [pa.date32(), pa.date64()], ids=str)
def test_a_date_counts_milliseconds_from_midnight(type):
    table = {"user_id": ["u"], "item_id": ["i"], "timestamp": pa.array([date(1970, 1, 3)], type)}
    assert [row["timestamp"] for row in rows(table)] == [2 * 86_400_000]


def test_ids_behind_a_dictionary_are_read_as_their_values():
    table = pa.table(
        {
            "user_id": pa.array(["u", "v", "u"]).dictionary_encode(),
            "item_id": pa.array([5, 2**62, 5]).dictionary_encode(),
            "timestamp": [1, 2, 3],
        }
    )
    plain = wanted_rows(table, events_settings())
    assert (plain.schema.field("user_id").type, plain.schema.field("item_id").type) == (
        pa.string(),
        pa.int64(),
    )
    assert plain.column("item_id").to_pylist() == [5, 2**62, 5]


def test_a_row_is_complete_if_nothing_of_it_is_null():
    table = pa.table(
        {
            "user_id": ["u", None, "u", "u"],
            "item_id": ["i", "i", None, "i"],
            "timestamp": pa.array([1, 1, 1, None], pa.int64()),
        }
    )
    assert is_complete(table).to_pylist() == [True, False, False, False]
    placed = table.append_column("order", pa.array([None, 1, 1, 1], pa.int64()))
    assert is_complete(placed).to_pylist() == [False] * 4


def test_the_column_that_decides_ties_is_read_as_order():
    table = {"user_id": ["u"], "item_id": ["i"], "timestamp": [3], "place": pa.array([7], pa.int8())}
    assert rows(table, ties="column", tie="place") == [
        {"user_id": "u", "item_id": "i", "timestamp": 3, "order": 7}
    ]
    assert rows(table) == [{"user_id": "u", "item_id": "i", "timestamp": 3}]


@pytest.mark.parametrize("type", [pa.float64(), pa.string(), pa.uint64(), pa.null()], ids=str)
def test_a_tie_column_that_holds_no_integers_is_refused_with_its_rows(type):
    chosen = events_settings(ties="column", tie="place")
    with pytest.raises(
        DataError,
        match=rf"column 'place' of /events \(1,234 rows\) is {type}; events\.tie must name a column of integers",
    ):
        require_tie(pa.schema([("place", type)]), chosen, 1234)
    for good in (pa.int8(), pa.uint32(), pa.int64()):
        require_tie(pa.schema([("place", good)]), chosen, 1234)
    require_tie(pa.schema([("place", type)]), events_settings(), 1234)


@given(
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),
    st.sampled_from([("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)]),
)
def test_a_moment_begins_at_the_first_tick_that_is_not_before_it(moment, unit):
    since = moment - datetime(1970, 1, 1)
    seconds = Fraction(since.days * 86_400 + since.seconds) + Fraction(since.microseconds, 10**6)
    name, ticks_per_second = unit
    first = ticks_at(moment.replace(tzinfo=UTC), name)
    assert Fraction(first - 1, ticks_per_second) < seconds <= Fraction(first, ticks_per_second)


@pytest.mark.parametrize(
    ("type", "declared", "unit"),
    [
        (pa.timestamp("us"), None, "us"),
        (pa.timestamp("ns", "UTC"), "s", "ns"),  # the type knows better than the settings
        (pa.date32(), None, "ms"),
        (pa.date64(), None, "ms"),
        (pa.int64(), "s", "s"),
        (pa.int32(), "position", "position"),
    ],
    ids=str,
)
def test_the_unit_comes_from_the_type_or_is_declared(type, declared, unit):
    schema = pa.schema([("timestamp", type)])
    assert timestamp_unit(schema, events_settings(timestamp_unit=declared)) == unit


def test_an_integer_without_a_declared_unit_is_refused():
    with pytest.raises(
        DataError,
        match=r"'timestamp' of /events is int64, .*set events\.timestamp_unit to s, ms, us, ns or position",
    ):
        timestamp_unit(pa.schema([("timestamp", pa.int64())]), events_settings())


@pytest.mark.parametrize("type", [pa.float64(), pa.string(), pa.uint64(), pa.time32("s"), pa.null()], ids=str)
def test_a_timestamp_of_any_other_type_is_refused(type):
    with pytest.raises(
        DataError,
        match=rf"is {re.escape(str(type))}; events\.timestamp must name a column of timestamps, of dates",
    ):
        timestamp_unit(pa.schema([("timestamp", type)]), events_settings(timestamp_unit="s"))


def counts(**changed):
    good = {
        "events": 1000,
        "unwanted_kind": 0,
        "nulls": 0,
        "unknown": 0,
        "unknown_examples": [],
        "first": SECOND_2026,
        "last": SECOND_2026 + 86_400,
    }
    return good | changed


def test_events_exactly_at_the_limits_pass_and_one_more_does_not():
    limits = events_settings(max_null_share=0.01, max_unknown_share=0.05)
    require_usable(counts(nulls=10, unknown=49), "s", limits)
    for beyond in (counts(nulls=11, unknown=49), counts(nulls=10, unknown=50)):
        with pytest.raises(DataError, match=r"events\.max_(null|unknown)_share"):
            require_usable(beyond, "s", limits)
    require_usable(counts(nulls=1000, first=None, last=None), "s", events_settings(max_null_share=1.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"nulls": 11},
            r"11 of 1,000 events of /events have a null in 'user_id', 'item_id' or 'timestamp'; "
            r"at most 1\.0% may \(events\.max_null_share\)",
        ),
        (
            {"nulls": 10, "unknown": 50, "unknown_examples": ["x9", "y7"]},
            r"50 of 990 events of /events name items that are not in the catalog, for example x9, y7; "
            r"at most 5\.0% may \(events\.max_unknown_share\)",
        ),
    ],
    ids=["nulls", "unknown items"],
)
def test_too_many_bad_events_are_refused_with_numbers_and_setting(changed, message):
    with pytest.raises(DataError, match=message):
        require_usable(counts(**changed), "s", events_settings())


def test_a_null_in_the_tie_column_counts_as_one_in_any_other():
    with pytest.raises(
        DataError, match=r"have a null in 'user_id', 'item_id', 'timestamp' or 'place'; at most"
    ):
        require_usable(counts(nulls=11), "s", events_settings(ties="column", tie="place"))


def test_events_of_no_wanted_kind_are_refused():
    chosen = events_settings(event_type="kind", event_types=("buy",))
    with pytest.raises(
        DataError,
        match=r"none of the 70 rows of /events is of a kind in events\.event_types \['buy'\] \(column 'kind'\)",
    ):
        require_usable(counts(events=0, unwanted_kind=70, first=None, last=None), "s", chosen)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("s", 1000), ("ms", 1), ("us", 1), ("ns", 1), ("s", 10**6)],
    ids=["ms as s", "s as ms", "s as us", "s as ns", "us as s"],
)
def test_a_unit_that_cannot_be_right_is_refused(unit, factor):
    wrong = counts(first=SECOND_2026 * factor, last=SECOND_2026 * factor)
    with pytest.raises(
        DataError,
        match=rf"run from {wrong['first']} to {wrong['last']}, which in unit '{unit}' is not between 1990 and 2100; "
        r"check events\.timestamp_unit",
    ):
        require_usable(wrong, unit, events_settings())


def test_one_event_of_1970_is_enough_to_doubt_the_unit():
    with pytest.raises(DataError, match="run from 0 to"):
        require_usable(counts(first=0), "s", events_settings())


def test_positions_have_no_plausible_range_and_times_do():
    require_usable(counts(first=0, last=10**15), "position", events_settings())
    with pytest.raises(DataError, match="is not between 1990 and 2100"):
        require_usable(counts(first=0, last=10**15), "s", events_settings())


def test_counts_of_parts_add_up():
    parts = [
        counts(events=3, nulls=1, unknown=1, unknown_examples=["b"], first=5, last=9),
        counts(events=2, nulls=2, first=None, last=None),
        counts(events=4, unwanted_kind=6, unknown=2, unknown_examples=["a", "b"], first=2, last=3),
    ]
    assert add_counts(parts) == {
        "events": 9,
        "unwanted_kind": 6,
        "nulls": 3,
        "unknown": 3,
        "unknown_examples": ["a", "b"],
        "first": 2,
        "last": 9,
    }
