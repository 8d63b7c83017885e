"""Bad input ends with a message that says what to change, and publishes nothing."""

import gc
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from tests.worlds import MONDAY, published_dates, run, run_night, tiny_settings, write
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.connect import connect, require_room
from tiger_ray.errors import DataError, SettingsError, StorageError
from tiger_ray.settings.ray import RaySettings
from tiger_ray.stages import model, sequences

REPO = Path(__file__).parents[2]

ITEMS = [f"i{n}" for n in range(20)]
CATALOG = pa.table({"item_id": ITEMS, "title": [f"Title {n}" for n in range(20)]})
EVENTS = pa.table(
    {
        "user_id": [f"u{n % 5}" for n in range(40)],
        "item_id": [ITEMS[n % 20] for n in range(40)],
        "timestamp": pa.array([1_790_000_000 + n for n in range(40)]).cast(pa.timestamp("s")),
    }
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


class BadNight:
    """Runs the stages on tables of the test's own and looks at what was published."""

    def __init__(self, folder: Path, catalog_uri: str | None = None) -> None:
        self.root, self.data = str(folder / "root"), folder / "data"
        self.catalog_uri = catalog_uri or f"{self.data}/catalog"

    def write(self, catalog=CATALOG, events=EVENTS):
        write(f"{self.data}/catalog", catalog)
        write(f"{self.data}/events", events)
        return self

    def run(self, until="events", **changed):
        catalog = {"uri": self.catalog_uri, "text": ["title"], "category": None, "available": None}
        catalog |= changed.pop("catalog", {})
        changed = {"quantizer": {"level_sizes": [4, 4, 4]}, "catalog": catalog, **changed}
        return run_night(tiny_settings(self.root, str(self.data), **changed), until)

    def assert_refused(self, message, until="events", published=(), **changed):
        """The night ends with a DataError like `message`, and only `published` is there."""
        with pytest.raises(DataError, match=message):
            self.run(until, **changed)
        assert published_dates(Storage(self.root)) == {(artifact, MONDAY) for artifact in published}


@pytest.fixture
def bad(tmp_path):
    return BadNight(tmp_path)


@pytest.fixture(scope="module")
def good_catalog(local_ray, tmp_path_factory):
    """A night whose catalog is published."""
    folder = tmp_path_factory.mktemp("good")
    BadNight(folder).write().run("catalog")
    return folder


@pytest.fixture
def bad_events(good_catalog, tmp_path):
    """The same, for events of the test's own."""
    shutil.copytree(good_catalog / "root", tmp_path / "root")
    return BadNight(tmp_path, str(good_catalog / "data" / "catalog"))


def replaced(table, column, values, type=None):
    return table.set_column(table.schema.get_field_index(column), column, pa.array(values, type))


def test_an_empty_catalog(bad):
    bad.write(catalog=CATALOG[:0]).assert_refused(r"catalog holds 1 Parquet file\(s\) and 0 rows")


def test_an_empty_folder_and_no_folder(bad):
    (bad.data / "catalog").mkdir(parents=True)
    bad.assert_refused(r"no \.parquet file at .*catalog")
    bad.assert_refused(r"no \.parquet file at .*elsewhere", catalog={"uri": str(bad.data / "elsewhere")})


def test_a_folder_of_other_files(bad):
    (bad.data / "catalog").mkdir(parents=True)
    (bad.data / "catalog" / "items.csv").write_text("item_id,title\n")
    bad.assert_refused(r"no \.parquet file at .*; other files are there, such as 'items\.csv'")


def test_a_file_that_is_no_parquet(bad):
    bad.write()
    (bad.data / "catalog" / "part-00001.parquet").write_text("item_id,title\n1,2\n" * 10)
    bad.assert_refused(r"part-00001\.parquet is not a readable Parquet file \(180 bytes\)")


def latin1(column):
    """Strings as an export in Latin-1 holds them, which no reader of Parquet refuses."""
    return pa.array([value.encode("latin-1") for value in column.to_pylist()], pa.binary()).view(pa.string())


@pytest.mark.parametrize("column", ["item_id", "title"])
def test_text_of_the_catalog_that_is_not_utf8(bad, column):
    more = pa.table({"item_id": ["caf\u00e9"], "title": ["Caf\u00e9 & Co"]})
    more = more.set_column(more.schema.get_field_index(column), column, latin1(more.column(column)))
    write(f"{bad.data}/catalog", CATALOG, more)
    bad.assert_refused(
        rf"column '{column}' of .*part-00001\.parquet \(1 rows\) cannot be read: .*UTF8.*; write it again, as UTF-8"
    )


def test_ids_of_events_that_are_not_utf8(bad_events):
    users = [*EVENTS.column("user_id").to_pylist()[:-1], "caf\u00e9"]
    wrong = EVENTS.set_column(0, "user_id", latin1(pa.chunked_array([users])))
    bad_events.write(events=wrong).assert_refused(
        r"column 'user_id' of .*part-00000\.parquet \(40 rows\) cannot be read: .*UTF8", published=["catalog"]
    )


def test_a_damaged_page_names_its_file(bad_events):
    bad_events.write()
    write(f"{bad_events.data}/events", *[EVENTS] * 3)
    damaged = bad_events.data / "events" / "part-00001.parquet"
    content = bytearray(damaged.read_bytes())
    content[4:60] = os.urandom(56)  # the first pages; the footer is at the end
    damaged.write_bytes(content)
    bad_events.assert_refused(
        r"column '.*' of .*part-00001\.parquet \(40 rows\) cannot be read", published=["catalog"]
    )


def test_events_that_are_gone_when_the_histories_are_built(bad_events):
    bad_events.write()
    write(f"{bad_events.data}/events", EVENTS, EVENTS)
    night = bad_events.run("semantic_ids")
    for number, message in (
        (1, r"changed while it was read: .*events/part-00001\.parquet, 1 of 1 files"),
        (0, r"events/part-00000\.parquet is gone since .*events was listed"),
    ):
        (bad_events.data / "events" / f"part-0000{number}.parquet").unlink()
        with pytest.raises(DataError, match=message):
            run(sequences.STAGE, night.settings, night.storage, night["events"], night["semantic_ids"])


def test_dictionaries_of_any_width_are_read(bad):
    for number, (width, count) in enumerate([(pa.int8(), 3), (pa.int16(), 300)]):
        ids = pa.array([f"{number}-{n}" for n in range(count)])
        titles = pa.DictionaryArray.from_arrays(pa.array(range(count), width), ids)
        write(f"{bad.data}/catalog/{number}", pa.table({"item_id": titles, "title": titles}))
    rows = bad.run("catalog").rows("catalog").to_pylist()
    assert sorted(row["title"] for row in rows) == sorted(row["item_id"] for row in rows)
    assert len(rows) == 303


def test_a_file_of_zero_bytes(bad_events):
    bad_events.write()
    (bad_events.data / "events" / "part-00001.parquet").touch()
    bad_events.assert_refused(
        r"part-00001\.parquet has 0 bytes, so it is no Parquet file", published=["catalog"]
    )


@pytest.mark.parametrize(
    ("section", "changed", "message", "published"),
    [
        ("catalog", {"item_id": "item"}, r"no column 'item', which catalog\.item_id names; did you mean 'item_id'\?", ()),
        ("catalog", {"text": ["titel"]}, r"no column 'titel', which catalog\.text\[0\] names; did you mean 'title'\?", ()),
        ("events", {"user_id": "userid"}, r"no column 'userid', which events\.user_id names; did you mean 'user_id'\?", ["catalog"]),
        ("events", {"timestamp": "time"}, r"no column 'time', which events\.timestamp names; did you mean 'timestamp'\?", ["catalog"]),
    ],
    ids=["item id", "text", "user id", "timestamp"],
)  # fmt: skip
def test_a_missing_column_names_the_nearest_one(section, changed, message, published, request):
    night = request.getfixturevalue("bad_events" if section == "events" else "bad")
    night.write().assert_refused(message, published=published, **{section: changed})


def test_an_item_id_that_comes_twice(bad):
    twice = replaced(CATALOG, "item_id", [*ITEMS[:18], "i3", "i3"])
    bad.write(catalog=twice).assert_refused(
        r"2 rows of .*catalog repeat an item id of another row, among them i3; item ids must be unique"
    )


def test_an_item_without_an_id(bad):
    bad.write(catalog=replaced(CATALOG, "item_id", [*ITEMS[:19], None])).assert_refused(
        r"1 of 20 rows .* have a null 'item_id'; every item needs an id"
    )


def test_an_id_that_is_a_float(bad):
    bad.write(catalog=replaced(CATALOG, "item_id", np.arange(20.0))).assert_refused(
        r"'item_id' of .*catalog is double; an id must be string, large_string or int64"
    )


def test_item_ids_of_another_type_than_the_catalogs(bad_events):
    numbers = replaced(EVENTS, "item_id", [n % 20 for n in range(40)], pa.int64())
    bad_events.write(events=numbers).assert_refused(
        r"item ids are int64 in the events .*'item_id', 40 rows\) but string in the catalog; no event could be matched",
        published=["catalog"],
    )


def test_two_kinds_of_strings_are_one_type(bad_events):
    large = EVENTS.set_column(1, "item_id", EVENTS.column("item_id").cast(pa.large_string()))
    night = bad_events.write(events=large).run("sequences")
    assert night["events"].metadata["unknown"] == 0
    assert sum(map(len, night.rows("sequences", "shard-").column("history").to_pylist())) == 40


def test_too_many_items_without_text(bad):
    empty = replaced(CATALOG, "title", [None, "", " ", "&nbsp;", None] + ["t"] * 15)
    bad.write(catalog=empty).assert_refused(
        r"5 of 20 items of .* have no text in title; at most 20% may \(catalog\.max_empty_text_share\)"
    )


def test_items_without_text_up_to_the_share_stay_in_the_catalog(bad):
    few = replaced(CATALOG, "title", [None, "", " ", "&nbsp;"] + ["t"] * 16)
    night = bad.write(catalog=few).run("catalog")
    assert night["catalog"].metadata["empty_text"] == 4
    assert night.rows("catalog").num_rows == 20


def test_no_item_available(bad):
    none = CATALOG.append_column("stock", pa.array([False] * 19 + [None]))
    bad.write(catalog=none).assert_refused(
        r"none of the 20 items of .* is available \(stock is never true\)", catalog={"available": "stock"}
    )


def test_unknown_items_are_counted_up_to_the_share(bad_events):
    two = replaced(EVENTS, "item_id", ["gone-1", "gone-2", *EVENTS.column("item_id").to_pylist()[2:]])
    night = bad_events.write(events=two).run()
    assert night["events"].metadata["unknown"] == 2


def test_too_many_unknown_items(bad_events):
    three = replaced(EVENTS, "item_id", ["x", "y", "z", *EVENTS.column("item_id").to_pylist()[3:]])
    bad_events.write(events=three).assert_refused(
        r"3 of 40 events of .* name items that are not in the catalog, for example x, y, z; at most 5\.0% may",
        published=["catalog"],
    )


def test_too_many_nulls(bad_events):
    nulls = replaced(EVENTS, "user_id", [None, *EVENTS.column("user_id").to_pylist()[1:]])
    bad_events.write(events=nulls).assert_refused(
        r"1 of 40 events of .* have a null in 'user_id', 'item_id' or 'timestamp'; at most 1\.0% may",
        published=["catalog"],
    )


def test_an_integer_timestamp_of_undeclared_or_implausible_unit(bad_events):
    milliseconds = replaced(EVENTS, "timestamp", [1_790_000_000_000 + n for n in range(40)])
    bad_events.write(events=milliseconds)
    bad_events.assert_refused(
        r"'timestamp' of .* is int64, and its unit is not declared; set events\.timestamp_unit",
        published=["catalog"],
    )
    bad_events.assert_refused(
        r"run from 1790000000000 to 1790000000039, which in unit 's' is not between 1990 and 2100",
        published=["catalog"],
        events={"timestamp_unit": "s"},
    )
    night = bad_events.run(events={"timestamp_unit": "ms"})
    assert night["events"].metadata["timestamp_unit"] == "ms"


def test_no_event_of_the_wanted_kind(bad_events):
    kinds = EVENTS.append_column("kind", pa.array(["view"] * 40))
    bad_events.write(events=kinds).assert_refused(
        r"none of the 40 rows of .* is of a kind in events\.event_types \['buy'\] \(column 'kind'\)",
        published=["catalog"],
        events={"event_type": "kind", "event_types": ["buy"]},
    )


def with_vectors(rows):
    return CATALOG.append_column("v", pa.array(rows, pa.list_(pa.float32(), 2)))


OWN_VECTORS = {"catalog": {"vector": "v", "num_shards": 1}, "embeddings": {"encoder": "catalog"}}


def test_vectors_that_are_not_numbers_or_not_there(bad):
    bad.write(catalog=with_vectors([[float("nan")] * 2] * 20)).assert_refused(
        r"20 embeddings are not finite; first items: i0, i1, .* \(encoder catalog\)\. Correct the vectors",
        until="embeddings",
        published=["catalog", "events"],
        **OWN_VECTORS,
    )
    other = BadNight(bad.data.parent / "other")
    other.write(catalog=with_vectors([None] + [[1.0, 2.0]] * 19)).assert_refused(
        r"1 of 20 items of catalog file .* have no vector \(catalog\.vector\)",
        until="embeddings",
        published=["catalog", "events"],
        **OWN_VECTORS,
    )


def test_a_stage_that_failed_holds_no_cpu_when_the_next_one_begins(bad):
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(DataError, match="have no vector"):
            bad.write(catalog=with_vectors([None] * 20)).run("embeddings", **OWN_VECTORS)
        connect(RaySettings())
    finally:
        gc.enable()
    give_up = time.monotonic() + 60
    while (free := ray.available_resources().get("CPU")) != 2 and time.monotonic() < give_up:
        time.sleep(0.1)
    assert free == 2


def test_fewer_items_than_codewords(bad_events):
    bad_events.write().assert_refused(
        r"20 items have \d+ distinct embeddings to learn from, fewer than the 64 codewords .*level_sizes",
        until="quantizer",
        published=["catalog", "events", "embeddings"],
        quantizer={"level_sizes": [64, 4]},
    )


def test_a_vector_column_of_changing_length(bad):
    ragged = CATALOG.append_column("v", pa.array([[1.0, 2.0]] * 20, pa.list_(pa.float32())))
    bad.write(catalog=ragged).assert_refused(
        r"'v' of .* is list<.*>; catalog\.vector must be FixedSizeList<float>", catalog={"vector": "v"}
    )


def test_users_of_one_event_each_are_refused_before_a_worker_starts(bad_events, monkeypatch):
    monkeypatch.setattr(model, "run_workers", lambda *_, **__: pytest.fail("workers were started"))
    single = replaced(EVENTS, "user_id", [f"u{n}" for n in range(40)])
    bad_events.write(events=single).assert_refused(
        r"no training example: none of 40 users has two events that training may see "
        r"\(training\.holdout is 'leave_one_out'\)",
        until="model",
        published=["catalog", "events", "embeddings", "quantizer", "semantic_ids", "sequences"],
    )


@pytest.mark.parametrize(
    ("section", "wrong", "message"),
    [
        ("embeddings", {"use_gpu": True}, r"embeddings\.use_gpu .* ask for 1 GPU at once, .* has 0"),
        ("training", {"num_workers": 3}, r"training\.num_workers ask for 3 CPU at once, .* has 2"),
        ("quantizer", {"cpus_per_worker": 4}, r"quantizer\.cpus_per_worker .* ask for 4 CPU at once"),
        ("decoding", {"num_workers": 3}, None),
        ("embeddings", {"num_workers": 9, "cpus_per_worker": 2}, None),
    ],
)
def test_more_workers_than_this_machine_can_ever_hold(night, section, wrong, message):
    changed = getattr(night.settings, section).model_copy(update=wrong)
    refused = pytest.raises(SettingsError, match=message) if message else nullcontext()
    with refused:
        require_room(night.settings.ray, {section: changed})
    # a cluster may grow
    require_room(night.settings.ray.model_copy(update={"address": "10.0.0.1:6379"}), {section: changed})


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        Storage(str(tmp_path / "file" / "root")).check()


def test_a_bucket_that_does_not_exist(s3_endpoint):
    with pytest.raises(
        StorageError, match=r"Bucket no-such-bucket-here does not exist at 127\.0\.0\.1:\d+: create it"
    ):
        Storage("s3://no-such-bucket-here/prefix").check()


@pytest.fixture(scope="module")
def job_data(tmp_path_factory):
    night = BadNight(tmp_path_factory.mktemp("job"))
    night.write()
    return night.data


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--trainning.num_steps", "3"], 2, "SettingsError: unknown setting --trainning.num_steps; did you mean training.num_steps?"),
        (["--training.num_steps", "many"], 2, "training.num_steps: Input should be a valid integer"),
        (["--date", "yesterday"], 2, "date must be a day like 2026-11-23, not 'yesterday'"),
        (["--storage.root", "ftp://host/root"], 2, "SettingsError: ftp:// is not supported: use a folder or s3://bucket/prefix"),
        (["--embeddings.encoder", "sentence-transformers"], 2, "set embeddings.revision to a commit"),
        (["--catalog.item_id", "item"], 3, "DataError: "),
        (["--storage.root", "s3://no-such-bucket-here/p"], 6, "StorageError: "),
    ],
    ids=["unknown setting", "wrong type", "wrong date", "unknown store", "unpinned model", "missing column", "missing bucket"],
)  # fmt: skip
def test_a_job_ends_with_one_message_and_its_exit_code(words, code, message, job_data, tmp_path, s3_endpoint):
    root = tmp_path / "root"
    command = [
        sys.executable, "jobs/nightly.py", "--date", MONDAY,
        "--storage.root", str(root), "--catalog.uri", f"{job_data}/catalog", "--events.uri", f"{job_data}/events",
        *words,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"}
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(root.glob("*/date=*"))


def test_columns_nobody_asked_for_may_differ_and_a_folder_is_no_column(bad):
    for folder, table in {
        "title=x": pa.table({"item_id": ["i20"], "title": ["Another"], "price": pa.array([1], pa.int64())}),
        "title=y": pa.table({"price": ["cheap"], "title": ["More"], "item_id": ["i21"]}),
        "": CATALOG,
    }.items():
        write(f"{bad.data}/catalog/{folder}", table)
    night = bad.run("catalog")
    titles = {row["item_id"]: row["title"] for row in night.rows("catalog").to_pylist()}
    assert len(titles) == 22
    assert (titles["i20"], titles["i21"], titles["i0"]) == ("Another", "More", "Title 0")
