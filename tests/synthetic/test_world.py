"""The planted world keeps its law, and the oracle is the best answer to it."""

import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tiger_ray.data.inputs import list_inputs
from tiger_ray.errors import ArtifactError, DataError, SettingsError, StorageError
from tiger_ray.synthetic.world import CATALOG_SCHEMA, DEFAULT_SHARES, EVENTS_SCHEMA, World, write


@pytest.fixture(scope="module")
def world() -> World:
    return World.build(800, seed=7)


@pytest.fixture(scope="module")
def events(world: World) -> pa.Table:
    return world.events(4000, seed=7)


def last_steps(world: World, events: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The last item but one and the last of each user, by a plain loop."""
    index = {item_id: i for i, item_id in enumerate(world.item_ids().to_pylist())}
    history: dict[str, list[int]] = {}
    for row in sorted(events.to_pylist(), key=lambda row: row["timestamp"]):
        history.setdefault(row["user_id"], []).append(index[row["item_id"]])
    last, after = zip(*(items[-2:] for items in history.values()), strict=True)
    return np.array(last), np.array(after)


def transition_counts(world: World, events: pa.Table) -> np.ndarray:
    frame = pd.DataFrame(
        {
            "user": pc.dictionary_encode(events["user_id"]).combine_chunks().indices.to_numpy(),
            "item": events["item_id"].to_pandas().str.removeprefix("B").astype(int),
        }
    )
    following = frame.groupby("user")["item"].shift(-1)
    counts = np.zeros((world.num_items, world.num_items))
    np.add.at(counts, (frame["item"][following.notna()], following.dropna().astype(int)), 1)
    return counts


def planted_law(world: World) -> np.ndarray:
    law = np.full((world.num_items, world.num_items), world.noise / (world.num_items - 1))
    np.fill_diagonal(law, 0.0)
    for column, share in enumerate(world.shares.values()):
        law[np.arange(world.num_items), world.successor_NM[:, column]] += share
    return law


# The catalog


def test_catalog_has_the_promised_columns_and_no_name_twice(world):
    catalog = world.catalog()
    assert catalog.schema == CATALOG_SCHEMA
    assert catalog.num_rows == 800
    for column in catalog.columns:
        assert column.null_count == 0
    for name in ("item_id", "title"):
        assert pc.count_distinct(catalog[name]).as_py() == 800
    assert catalog["item_id"][42].as_py() == "B00042"


def test_titles_stay_distinct_when_the_short_names_run_out():
    catalog = World.build(200_000, seed=1).catalog()
    assert pc.count_distinct(catalog["title"]).as_py() == 200_000
    assert pc.count_distinct(catalog["brand"]).as_py() == 10_000


def test_text_tells_series_volume_author_and_genre(world):
    frame = world.catalog().to_pandas()
    frame["series"] = frame["title"].str.replace(r", Book .*", "", regex=True)
    frame["volume"] = frame["title"].str.extract(r", Book (\d+): ")[0].astype(int)
    frame["genre"] = [path[-1] for path in frame["category"]]
    assert (frame.groupby("series")["volume"].apply(sorted).map(tuple) == tuple(range(1, 11))).all()
    assert (frame.groupby("brand")["series"].nunique() == 2).all()
    assert (frame.groupby("brand")["genre"].nunique() == 1).all()
    assert frame["genre"].nunique() == 10


def test_every_move_does_to_the_titles_what_its_name_says(world):
    frame = world.catalog().to_pandas()
    series = frame["title"].str.replace(r", Book .*", "", regex=True).to_numpy()
    volume = frame["title"].str.extract(r", Book (\d+): ")[0].astype(int).to_numpy()
    author = frame["brand"].to_numpy()
    genre = np.array([path[-1] for path in frame["category"]])
    to = {move: world.successor_NM[:, column] for column, move in enumerate(world.shares)}

    inner = volume < 10
    assert (series[to["next_volume"]] == series)[inner].all()
    assert (volume[to["next_volume"]] == volume + 1)[inner].all()
    assert (series[to["next_volume"]] != series)[~inner].all()
    assert (author[to["next_volume"]] == author)[~inner].all()
    assert (volume[to["next_volume"]] == 1)[~inner].all()
    assert (author[to["other_series"]] == author).all()
    assert (series[to["other_series"]] != series).all()
    assert (volume[to["other_series"]] == volume).all()
    for move in ("next_author", "new_start"):
        assert (author[to[move]] != author).all()
        assert (genre[to[move]] == genre).all()
    assert (author[to["next_author"]] == author[to["new_start"]]).all()
    assert (volume[to["next_author"]] == volume).all()
    assert (volume[to["new_start"]] == 1).all()
    assert (series[to["previous_volume"]] == series).all()
    assert (volume[to["previous_volume"]] == np.where(volume == 1, 10, volume - 1)).all()


@pytest.mark.parametrize("num_items", [40, 60, 100, 800, 1000])
def test_moves_lead_to_distinct_other_items(num_items):
    world = World.build(num_items, seed=3)
    with_self = np.column_stack([np.arange(num_items), world.successor_NM])
    assert all(len(set(row)) == 1 + len(DEFAULT_SHARES) for row in with_self.tolist())


# The events


def test_events_are_in_the_catalog_and_strictly_later_per_user_and_never_repeat_at_once(world, events):
    assert events.schema == EVENTS_SCHEMA
    assert pc.all(pc.is_in(events["item_id"], value_set=world.item_ids())).as_py()
    frame = events.to_pandas()
    assert frame["timestamp"].is_monotonic_increasing
    by_user = frame.groupby("user_id")
    assert (by_user["timestamp"].diff().dropna() > np.timedelta64(0)).all()
    assert (frame["item_id"] != by_user["item_id"].shift()).all()
    lengths = by_user.size()
    assert len(lengths) == 4000
    assert lengths.min() == 6
    assert lengths.max() == 20
    assert lengths.mean() == pytest.approx(13, abs=0.3)


def test_same_seed_same_world_and_other_seed_another():
    one, again, other = World.build(200, seed=1), World.build(200, seed=1), World.build(200, seed=2)
    assert one.catalog().equals(again.catalog())
    assert one.events(50, seed=5).equals(again.events(50, seed=5))
    assert one.digest() == again.digest() != other.digest()
    assert not one.catalog()["title"].equals(other.catalog()["title"])
    assert not one.events(50, seed=5).equals(one.events(50, seed=6))


def test_items_are_nearly_equally_frequent_but_first_volumes_stand_out(world):
    events = world.events(10_000, seed=3)
    counts = np.bincount(world.item_indices(events["item_id"]), minlength=800)
    volume = world.catalog()["title"].to_pandas().str.extract(r", Book (\d+): ")[0].astype(int)
    by_volume = pd.Series(counts / counts.mean()).groupby(volume)
    assert by_volume.mean().idxmax() == 1
    assert 1.5 < by_volume.mean()[1] < 2.5
    assert by_volume.mean().min() > 0.6
    assert (by_volume.std() < 0.2).all()


def test_frequencies_of_what_follows_are_the_planted_law():
    world = World.build(100, seed=4, unavailable_share=0.0)
    counts = transition_counts(world, world.events(20_000, seed=9, min_events=20, max_events=20))
    off = ~np.eye(100, dtype=bool)
    expected = (planted_law(world) * counts.sum(axis=1, keepdims=True))[off]
    assert np.diagonal(counts).sum() == 0
    # chi-square with 100 x 98 degrees of freedom: mean 9800, standard deviation 140
    chi_square = ((counts[off] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 9800) < 5 * 140


# The oracle


def test_without_noise_and_with_one_move_the_oracle_is_always_right():
    world = World.build(200, seed=1, shares={"next_volume": 1.0}, unavailable_share=0.0)
    events = world.events(300, seed=1)
    assert world.noise == 0.0
    assert world.oracle_recall(events, 1) == 1.0
    assert world.expected_recall(np.arange(200), 1) == 1.0


def test_pure_noise_leaves_the_oracle_no_better_than_chance():
    world = World.build(100, seed=1, shares={}, unavailable_share=0.0)
    assert world.expected_recall(np.arange(100), 10) == pytest.approx(10 / 99)
    assert world.oracle_recall(world.events(5000, seed=1), 10) == pytest.approx(10 / 99, abs=0.02)


def test_oracle_top_equals_sorting_the_whole_law():
    world = World.build(60, seed=2, unavailable_share=0.3)
    law = planted_law(world)
    np.fill_diagonal(law, -1.0)
    law[:, ~world.available_N] = -1.0
    ranking = np.argsort(-law, axis=1, kind="stable")
    for k in (1, 3, 10, 41):
        assert (world.oracle_top(np.arange(60), k) == ranking[:, :k]).all()
        recall = np.take_along_axis(law, ranking[:, :k], axis=1).sum(axis=1).mean()
        assert world.expected_recall(np.arange(60), k) == pytest.approx(recall)


def test_oracle_recall_equals_a_loop_over_users(world, events):
    last, after = last_steps(world, events)
    hits = [item in top for item, top in zip(after, world.oracle_top(last, 10).tolist(), strict=True)]
    assert world.oracle_recall(events, 10) == np.mean(hits)
    in_pieces = pa.concat_tables([events[20_000:], events[:20_000]])  # neither row order nor chunks matter
    assert world.oracle_recall(in_pieces, 10) == np.mean(hits)
    assert world.popularity_recall(in_pieces, 10) == world.popularity_recall(events, 10)


def test_oracle_reaches_its_expected_recall_of_nine_tenths_and_popularity_almost_nothing(world, events):
    expected = world.expected_recall(last_steps(world, events)[0], 10)
    assert 0.87 < expected < 0.92
    assert world.oracle_recall(events, 10) == pytest.approx(expected, abs=4 * np.sqrt(0.1 * 0.9 / 4000))
    assert world.popularity_recall(events, 10) < 0.05


def test_popularity_recall_counts_earlier_events_of_available_items_only():
    world = World.build(40, seed=1, unavailable_share=0.5)
    can, cannot = np.flatnonzero(world.available_N), np.flatnonzero(~world.available_N)
    ids = world.item_ids().to_pylist()
    rows = [("a", cannot[0]), ("b", cannot[0]), ("c", can[7]), ("a", can[7]), ("b", can[3]), ("c", can[3])]
    rows.append(("d", can[9]))  # one event: no last event to predict, but one that counts
    events = pa.table(
        {
            "user_id": [user for user, _ in rows],
            "item_id": [ids[item] for _, item in rows],
            "timestamp": pa.array(range(7), pa.timestamp("us")),
        }
    )
    # can[7] comes first of the available items seen before; two of the three users end with can[3].
    assert world.popularity_recall(events, 1) == pytest.approx(1 / 3)


def test_no_ranking_learned_from_many_events_beats_the_oracle():
    world = World.build(100, seed=5, unavailable_share=0.0)
    counts = transition_counts(world, world.events(10_000, seed=1, min_events=20, max_events=20))
    learned = np.argsort(-counts, axis=1)[:, :10]
    fresh = world.events(10_000, seed=2, min_events=2, max_events=3)
    last, after = last_steps(world, fresh)
    learned_recall = (learned[last] == after[:, None]).any(axis=1).mean()
    assert (np.sort(learned[:, :5]) == np.sort(world.oracle_top(np.arange(100), 5))).all()
    assert world.oracle_recall(fresh, 10) > learned_recall - 0.01  # they differ in noise items only
    assert world.oracle_recall(fresh, 10) > world.popularity_recall(fresh, 10) + 0.5


def test_unavailable_items_are_read_but_never_ranked(world, events):
    unavailable = np.flatnonzero(~world.available_N)
    assert len(unavailable) == 16
    assert (world.catalog()["available"].to_numpy() == world.available_N).all()
    assert not np.isin(world.oracle_top(np.arange(800), 10), unavailable).any()
    assert np.isin(world.item_indices(events["item_id"]), unavailable).any()


# On disk


def test_what_was_written_is_the_world_in_parts_and_can_be_rebuilt(world, events, tmp_path):
    written = write(str(tmp_path), world, num_users=4000, seed=7, num_files=3)
    assert sorted(path.name for path in (tmp_path / "events").iterdir()) == [
        f"part-0000{part}.parquet" for part in range(3)
    ]
    assert pq.read_table(tmp_path / "events").equals(events)
    assert pq.read_table(tmp_path / "catalog").equals(world.catalog())
    again = World.read(str(tmp_path))
    assert again.digest() == world.digest()
    assert written.num_events == events.num_rows
    assert written.oracle_recall == again.oracle_recall(events, 10)
    assert written.popularity_recall == again.popularity_recall(events, 10)


def test_writing_again_leaves_no_part_of_the_earlier_world(tmp_path):
    world = World.build(100, seed=1)
    write(str(tmp_path), world, num_users=20, seed=1, num_files=5)
    write(str(tmp_path), world, num_users=10, seed=2, num_files=2)
    assert pq.read_table(tmp_path / "events").equals(world.events(10, seed=2))


def test_a_world_is_written_to_the_endpoint_of_the_variables_that_the_job_reads(s3_root, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    world = World.build(40, seed=1)
    write(f"{s3_root}/data", world, num_users=10, seed=1, num_files=2)
    assert World.read(f"{s3_root}/data").digest() == world.digest()
    assert [file.path.rsplit("/", 1)[1] for file in list_inputs(f"{s3_root}/data/events")] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]


def test_a_catalog_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "mine.parquet").write_bytes(b"precious")
    with pytest.raises(StorageError, match=r"no plant\.json.*choose another folder"):
        write(str(tmp_path), World.build(100, seed=1), num_users=10, seed=1)
    assert (tmp_path / "catalog" / "mine.parquet").read_bytes() == b"precious"


def test_a_plant_that_cannot_be_rebuilt_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no plant\.json"):
        World.read(str(tmp_path))
    write(str(tmp_path), World.build(100, seed=1), num_users=10, seed=1)
    plant = json.loads((tmp_path / "plant.json").read_text())
    (tmp_path / "plant.json").write_text(json.dumps(plant | {"seed": 2}))
    with pytest.raises(ArtifactError, match="cannot be rebuilt"):
        World.read(str(tmp_path))


# Refusals


@pytest.mark.parametrize("num_items", [0, 20, 810, 100_000_000])
def test_sizes_that_cannot_be_planted_are_refused(num_items):
    with pytest.raises(SettingsError, match=f"num_items is {num_items}, but must be a multiple of 20"):
        World.build(num_items, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": {"sideways": 0.5}}, "unknown moves"),
        ({"shares": {"next_volume": 0.9, "new_start": 0.2}}, "add up to 1 at most"),
        ({"shares": {"next_volume": -0.1}}, "add up to 1 at most"),
        ({"unavailable_share": 0.9}, "unavailable_share is 0.9"),
    ],
)
def test_laws_that_are_no_probabilities_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        World.build(100, seed=1, **arguments)


def test_events_out_of_range_and_items_of_another_world_are_refused(world):
    with pytest.raises(SettingsError, match="min_events=1"):
        world.events(10, seed=1, min_events=1)
    with pytest.raises(SettingsError, match="k is 800"):
        world.oracle_top(np.array([0]), 800)
    with pytest.raises(DataError, match="'B00999' among them"):
        world.item_indices(pa.array(["B00001", "B00999"]))
    with pytest.raises(DataError, match="no user has two events"):
        world.oracle_recall(world.events(10, seed=1)[:1], 10)
