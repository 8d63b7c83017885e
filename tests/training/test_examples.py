"""Every example once per epoch in a random order, whether in memory or streamed, from any step, for any workers."""

import math
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.published.sequences import open_examples
from tiger_ray.training import examples as examples_module
from tiger_ray.training.examples import BATCHES_PER_GROUP, Examples, permutation_at

# The order


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_an_order_is_a_permutation_and_any_part_of_it_can_be_computed_alone(size, key):
    whole = permutation_at(np.arange(size), size, tuple(key))
    assert sorted(whole.tolist()) == list(range(size))
    some = np.arange(size)[::-3]
    assert np.array_equal(permutation_at(some, size, tuple(key)), whole[some])


@pytest.mark.parametrize("size", [2**31, 10**10 + 7, 2**62])
def test_an_order_of_billions_stays_in_range_and_repeats_nothing(size):
    place = np.concatenate([np.arange(5000), np.arange(size - 5000, size)])
    value = permutation_at(place, size, (1, 2, 3))
    assert value.min() >= 0
    assert value.max() < size
    assert len(set(value.tolist())) == len(place)
    assert value.mean() / size == pytest.approx(0.5, abs=0.02)


def test_every_key_has_an_order_of_its_own():
    keys = [(seed, 0, epoch, window) for seed in range(4) for epoch in range(5) for window in range(5)]
    orders = {tuple(permutation_at(np.arange(500), 500, key).tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_every_value_of_a_short_order_is_as_frequent_at_every_place():
    size, keys = 6, 1200
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permutation_at(np.arange(size), size, (key,))] += 1
    assert abs(surprise(counts, (size - 1) ** 2)) < 5


def surprise(counts, freedom):
    """How many standard deviations the chi-square of equally probable cells is off; below 0: too even."""
    expected = counts.sum() / counts.size
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def surprises(value):
    """The same for several things that a random order does not show."""
    size, place = len(value), np.arange(len(value))
    side = math.isqrt(size - 1) + 1
    blocks = np.zeros((16, 16))
    np.add.at(blocks, (place * 16 // size, value * 16 // size), 1)
    found = {
        "rank correlation": np.corrcoef(place, value)[0, 1] * math.sqrt(size),
        "neighbours": np.corrcoef(value[1:], value[:-1])[0, 1] * math.sqrt(size),
        "blocks": surprise(blocks, 15 * 15),
    }
    for apart in (1, 2, side - 1, side, side + 1):
        steps = (value[apart:] - value[:-apart]) % size
        found[f"steps of {apart}"] = surprise(np.bincount(steps * 64 // size, minlength=64), 63)
    return {name: abs(value) for name, value in found.items()}


SIZES = [997, 10_000, 10_007, 16_384]


@pytest.mark.parametrize("size", SIZES)
def test_an_order_looks_random(size):
    for key in range(20):
        found = surprises(permutation_at(np.arange(size), size, (key, 0, 3)))
        assert max(found.values()) < 6, found
    assert max(surprises(np.random.default_rng(0).permutation(size)).values()) < 6


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_check_for_randomness_finds_an_order_of_too_few_rounds(monkeypatch, rounds):
    monkeypatch.setattr(examples_module, "NUM_ROUNDS", rounds)
    for size in SIZES[1:]:
        assert all(
            max(surprises(permutation_at(np.arange(size), size, (key,))).values()) > 20 for key in range(5)
        )


def test_the_check_for_randomness_finds_an_affine_order():
    assert max(surprises((np.arange(10_007) * 4567 + 13) % 10_007).values()) > 20


# Examples


def examples_of(histories, max_history=4, seed=0):
    """Examples of users whose events are all visible."""
    lengths = np.array([len(history) for history in histories], np.int64)
    items = np.array([item for history in histories for item in history], np.int32)
    return Examples.of(items, lengths, hashes(len(histories)), max_history=max_history, seed=seed)


def hashes(users):
    return np.arange(users, dtype=np.uint64) * np.uint64(7919)


def shown(batch):
    """(user hash, history items, next item) of each example of a batch."""
    assert [column.dtype for column in batch] == [np.int32, np.int64, np.uint64, np.int32]
    assert len(batch.item_E) == batch.lengths_B.sum()
    end = np.cumsum(batch.lengths_B)
    return [
        (int(user), tuple(batch.item_E[last - length : last].tolist()), int(target))
        for user, last, length, target in zip(
            batch.user_hash_B, end, batch.lengths_B, batch.target_B, strict=True
        )
    ]


def steps(examples, number, batch_size, **chosen):
    """Examples of each of the first `number` steps of one worker."""
    found = islice(examples.batches(batch_size, **chosen), number)
    return [[example for batch in step for example in shown(batch)] for step in found]


def loop_examples(histories, max_history=4, held_out=0):
    """The same by the definition: each visible event but a user's first, with the items before it."""
    found = []
    for user, history in enumerate(histories):
        seen = history[:-held_out] if held_out and len(history) > held_out else history
        found += [
            (7919 * user, tuple(seen[max(0, place - max_history) : place]), seen[place])
            for place in range(1, len(seen))
        ]
    return found


def assert_row_of_epochs(drawn, expected):
    """Each example has been drawn as often as there were epochs, or once more if one is under way."""
    counts, full = Counter(drawn), len(drawn) // len(expected)
    wanted = Counter(expected)
    assert counts.keys() <= wanted.keys()
    for example, number in wanted.items():
        assert full * number <= counts[example] <= (full + 1) * number


many_histories = st.lists(st.lists(st.integers(0, 11), max_size=7), min_size=1, max_size=12).filter(
    lambda histories: any(len(history) > 1 for history in histories)
)


@given(many_histories, st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_each_epoch_shows_every_event_but_the_first_once_with_the_items_before_it(
    histories, max_history, batch_size, seed
):
    examples = examples_of(histories, max_history, seed)
    expected = loop_examples(histories, max_history)
    assert len(examples) == len(expected)
    drawn = steps(examples, 2 * BATCHES_PER_GROUP, batch_size)
    assert {len(step) for step in drawn} == {batch_size}
    # Batches of a group are shuffled, so whole groups are compared: full epochs, and a part of the next.
    for groups in (1, 2):
        row = [example for step in drawn[: groups * BATCHES_PER_GROUP] for example in step]
        assert_row_of_epochs(row, expected)


def test_a_group_that_is_an_epoch_holds_each_example_exactly_once():
    histories = [list(range(1 + n % 9)) for n in range(160)]
    expected = loop_examples(histories)
    batch_size, rest = divmod(len(expected), BATCHES_PER_GROUP)
    assert rest != 0
    histories += [[0, 1]] * (BATCHES_PER_GROUP - rest)
    examples, expected = examples_of(histories), loop_examples(histories)
    for group in range(3):
        drawn = steps(examples, BATCHES_PER_GROUP, batch_size + 1, start=group * BATCHES_PER_GROUP)
        assert Counter(example for step in drawn for example in step) == Counter(expected)


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    # Of equal length, so that a batch of 40 is an epoch in its order.
    orders = [tuple(step) for seed in (0, 1) for step in steps(examples_of([[0, 1]] * 40, seed=seed), 80, 40)]
    assert all(len(set(order)) == 40 for order in orders)
    assert len(set(orders)) == 160


def test_a_batch_holds_histories_of_about_one_length_and_batches_come_in_no_order_of_length():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 12, rng.integers(2, 30)).tolist() for _ in range(200)]
    drawn = steps(examples_of(histories, 20), 64, 16)
    lengths = np.array([[len(history) for _, history, _ in step] for step in drawn])
    assert np.ptp(lengths, axis=1).mean() < 1.5
    assert abs(np.corrcoef(np.arange(64), lengths.mean(axis=1))[0, 1]) < 0.5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_workers_share_out_the_global_batch_of_one_worker(world_size):
    histories = [list(range(n % 7)) for n in range(40)]
    alone = steps(examples_of(histories), 70, 8, start=60)
    shares = [
        steps(examples_of(histories), 70, 8, start=60, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert Counter(whole) == Counter(example for part in parts for example in part)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        for part in parts:
            assert part == sorted(part, key=lambda example: len(example[1]))


def test_a_worker_beyond_the_global_batch_gets_no_example_but_every_step():
    examples = examples_of([[0, 1, 2], [3, 4]])
    assert list(islice(examples.batches(2, rank=2, world_size=3, batch_tokens=50), 3)) == [[], [], []]
    assert list(islice(examples.batches(2, rank=2, world_size=3), 3)) == [[], [], []]


@pytest.mark.parametrize("user_token", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 40, 64, 100_000])
def test_a_step_is_cut_into_the_fewest_batches_within_the_token_budget(batch_tokens, user_token):
    histories = [list(range(n % 23)) for n in range(200)]
    whole = steps(examples_of(histories, 20), 64, 24)
    cut = examples_of(histories, 20).batches(
        24, batch_tokens=batch_tokens, id_length=3, user_token=user_token
    )

    def tokens(lengths):
        return sum(max(lengths) * 3 + 3 + user_token for _ in lengths)

    for expected, step in zip(whole, islice(cut, 64), strict=True):
        assert [example for batch in step for example in shown(batch)] == expected
        batches = [batch.lengths_B.tolist() for batch in step]
        assert all(tokens(lengths) <= batch_tokens or len(lengths) == 1 for lengths in batches)
        for lengths, after in zip(batches, batches[1:], strict=False):
            assert tokens([*lengths, after[0]]) > batch_tokens


@pytest.mark.parametrize("histories", [[[]], [[1], [2], []]], ids=["no event", "one event each"])
def test_histories_of_one_item_give_no_example_and_no_batch(histories):
    examples = examples_of(histories)
    assert len(examples) == 0
    with pytest.raises(DataError, match="no training example: no history has two events"):
        examples.batches(4)


# Artifacts


RNG = np.random.default_rng(5)
HISTORIES = [RNG.integers(0, 500, n % 11).tolist() for n in range(300)]
NUM_SHARDS = 12
EVENTS = sum(map(len, HISTORIES))


@pytest.fixture
def written(tmp_path):
    """A storage, and the manifest of user shards with every history."""

    def write(histories=HISTORIES, num_shards=NUM_SHARDS):
        storage = Storage(str(tmp_path / "root"))
        run = storage.begin("sequences", "0" * 64)
        entries = []
        for shard in range(num_shards):
            users = list(range(shard, len(histories), num_shards))
            mine = [histories[user] for user in users]
            facts = {
                "events": sum(map(len, mine)),
                "examples_leave_one_out": len(loop_examples(mine, held_out=2)),
                "examples_none": len(loop_examples(mine)),
            }
            table = pa.table(
                [[str(user) for user in users], hashes(len(histories))[users], pa.array(mine)],
                schema=schemas.sequences(pa.string()),
            )
            entries.append(run.write_table(f"shard-{shard:05d}.parquet", table, facts=facts))
        popularity = run.write_table("popularity.parquet", pa.table({"item_index": [1]}))
        return storage, run.as_manifest([*entries, popularity])

    return write


def path_of(storage, manifest, name):
    return Path(storage.uri(f"{manifest.artifact}/{manifest.file(name).path}"))


def opened(written, events_in_memory=EVENTS, holdout="none", seed=3):
    return open_examples(
        *written, holdout=holdout, max_history=4, events_in_memory=events_in_memory, seed=seed
    )


STREAMED = EVENTS // 2
"""Events in memory, so that an epoch has four windows or so."""


@pytest.mark.parametrize("events_in_memory", [EVENTS, STREAMED], ids=["in memory", "streamed"])
@pytest.mark.parametrize(("holdout", "held_out"), [("none", 0), ("leave_one_out", 2)])
def test_each_epoch_of_an_artifact_shows_each_visible_example_once(
    written, events_in_memory, holdout, held_out
):
    examples = opened(written(), events_in_memory, holdout)
    expected = loop_examples(HISTORIES, held_out=held_out)
    assert len(examples) == len(expected)
    assert examples.streamed == (events_in_memory < EVENTS)
    # Groups of 64 of the row, so that every place of it but the last few can be told.
    groups = [
        [example for step in steps(examples, BATCHES_PER_GROUP, 1, start=start) for example in step]
        for start in range(0, 3 * len(expected), BATCHES_PER_GROUP)
    ]
    row = []
    for group in groups:
        row += group
        assert_row_of_epochs(row, expected)


def test_windows_of_an_epoch_hold_every_shard_once_in_an_order_of_the_epochs_own(written):
    examples = opened(written(), STREAMED)
    packings = [examples._pack(epoch) for epoch in range(20)]
    for windows in packings:
        assert sorted(np.concatenate(windows).tolist()) == list(range(NUM_SHARDS))
        assert all(examples._events_S[window].sum() <= STREAMED // 2 for window in windows)
        for window, after in zip(windows, windows[1:], strict=False):
            assert examples._events_S[[*window, after[0]]].sum() > STREAMED // 2
    assert len({tuple(np.concatenate(windows).tolist()) for windows in packings}) == 20
    keys = [window.key for window in islice(examples._windows(0), 100)]
    assert len(set(keys)) == 100
    # Shards meet other ones in every epoch, else a window would be a small data set of its own.
    together = {frozenset(window.tolist()) for windows in packings for window in windows}
    assert len(together) > 40


@pytest.mark.parametrize("events_in_memory", [EVENTS, STREAMED], ids=["in memory", "streamed"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_from_a_step_on_are_those_of_a_run_that_got_there(written, events_in_memory, batch_size):
    artifact = written()
    epoch = len(opened(artifact)) // batch_size
    whole = steps(opened(artifact, events_in_memory), 2 * epoch + 80, batch_size)
    for start in [0, 1, 63, 64, 65, epoch // 3, epoch - 1, epoch, epoch + 1, 2 * epoch]:
        resumed = steps(opened(artifact, events_in_memory), 80, batch_size, start=start)
        assert resumed == whole[start : start + 80], start


@pytest.mark.parametrize("world_size", [2, 5])
def test_workers_share_out_the_global_batch_when_streaming_too(written, world_size):
    artifact = written()
    alone = steps(opened(artifact, STREAMED), 300, 7)
    shares = [
        steps(opened(artifact, STREAMED), 300, 7, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert Counter(whole) == Counter(example for part in parts for example in part)


def watched(examples):
    """Keep what each reading was for and which thread did it, and a weak reference to what it gave."""
    read, readings, given = examples._read, [], []

    def reading(shards):
        readings.append((shards.tolist(), threading.current_thread()))
        histories = read(shards)
        given.append(weakref.ref(histories))
        return histories

    examples._read = reading
    return readings, given


@pytest.mark.parametrize("batch_size", [2, 40], ids=["groups within windows", "groups over many windows"])
def test_at_most_two_windows_are_in_memory_and_a_thread_reads_the_next(written, batch_size, monkeypatch):
    examples = opened(written(), STREAMED)
    readings, given = watched(examples)
    in_memory = []

    class Counting(ThreadPoolExecutor):
        def submit(self, *work):
            in_memory.append(1 + sum(histories() is not None for histories in given))
            return super().submit(*work)

    monkeypatch.setattr(examples_module, "ThreadPoolExecutor", Counting)
    for _ in islice(examples.batches(batch_size), 1000):
        pass
    assert len(readings) > 6
    assert max(in_memory) == 2
    assert all(thread is not threading.main_thread() for _, thread in readings)
    epochs = [shards for epoch in range(200) for shards in examples._pack(epoch)]
    assert [shards for shards, _ in readings] == [shards.tolist() for shards in epochs[: len(readings)]]


def test_a_resumed_run_reads_only_from_its_window_on(written):
    examples = opened(written(), STREAMED)
    windows = examples._pack(0)
    sizes = [int(examples._examples_S[window].sum()) for window in windows]
    readings, _ = watched(examples)
    start = (sizes[0] + sizes[1] + BATCHES_PER_GROUP - 1) // BATCHES_PER_GROUP * BATCHES_PER_GROUP
    assert start < sum(sizes[:3])
    batches = examples.batches(1, start=start)
    next(batches)
    batches.close()
    assert [shards for shards, _ in readings] == [windows[2].tolist(), windows[3].tolist()]


def test_histories_that_fit_are_read_once_and_not_before_the_first_batch(written):
    examples = opened(written())
    readings, _ = watched(examples)
    batches = examples.batches(4)
    assert not readings
    for _ in islice(batches, 2000):
        pass
    next(examples.batches(4, start=77))
    assert [shards for shards, _ in readings] == [list(range(NUM_SHARDS))]


def test_the_reading_thread_ends_with_the_batches(written):
    batches = opened(written(), STREAMED).batches(4)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("histories")]


def test_an_error_of_the_reading_thread_reaches_whoever_wants_the_window(written):
    storage, manifest = written()
    examples = opened((storage, manifest), STREAMED)
    path_of(storage, manifest, "shard-00004.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"shard-00004\.parquet is missing, though the manifest names it"):
        for _ in islice(examples.batches(4), len(examples)):
            pass


def test_a_shard_that_does_not_fit_is_named_with_both_remedies(written):
    artifact = written([*HISTORIES[:60], [1] * 400], num_shards=3)
    assert opened(artifact, 685).streamed is False  # all events
    with pytest.raises(
        DataError,
        match=r"shard-00000\.parquet of sequences \(run \w+\) has 497 events, but only 342 can be in memory.*"
        r"training\.events_in_memory 684; .*sequences\.num_shards.*raise training\.events_in_memory to 685",
    ):
        opened(artifact, 684)


def test_a_shard_without_examples_is_never_read(written):
    histories = [[] if user % 3 == 1 else history for user, history in enumerate(HISTORIES)]
    artifact = written(histories, num_shards=3)
    examples = opened(artifact)
    path_of(*artifact, "shard-00001.parquet").unlink()
    drawn = [example for step in steps(examples, BATCHES_PER_GROUP, 40) for example in step]
    assert_row_of_epochs(drawn, loop_examples(histories))


def test_an_artifact_without_examples_says_so(written):
    examples = opened(written([[1], [], [2]], num_shards=2))
    assert len(examples) == 0
    with pytest.raises(DataError, match="no training example"):
        examples.batches(1)
