"""Storage on a folder and on an S3 server: what is published is what is read, and errors say what to do."""

import dataclasses
import json
import os
import pickle
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from tiger_ray.artifacts import local, s3
from tiger_ray.artifacts import storage as storage_module
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.artifacts.store import InputFile, NoAnswer, TryAgain
from tiger_ray.core.hashing import fingerprint
from tiger_ray.data import inputs
from tiger_ray.data.inputs import input_filesystem, list_inputs, read_input_schema, require_unchanged
from tiger_ray.errors import ArtifactError, DataError, PublishError, SettingsError, StorageError

MONDAY, TUESDAY = "2026-11-23", "2026-11-24"
NIGHT, OTHER = fingerprint({"seed": 1}), fingerprint({"seed": 2})
TABLE = pa.table({"item_id": ["a", "b", "c"], "price": [1.0, None, 3.0]})


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "folder" else request.getfixturevalue("s3_root")


@pytest.fixture
def storage(root: str) -> Storage:
    return Storage(root, commit_deadline_s=2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"), commit_deadline_s=0.0)


def publish(
    storage: Storage, date: str = MONDAY, night: str = NIGHT, table: pa.Table = TABLE, replace: bool = False
) -> Manifest:
    run = storage.begin("catalog", night)
    files = [run.write_table("part-0.parquet", table), run.write_file("facts.json", b'{"a": 1}')]
    return finish(storage, run, files, date, replace)


def finish(storage: Storage, run: Run, files: list[FileEntry], date: str, replace: bool = False) -> Manifest:
    content: dict[str, Any] = {
        "settings": {"seed": 1},
        "inputs": {"events": "e" * 64},
        "metadata": {"num_items": 3},
    }
    return storage.publish(run, date=date, files=files, replace=replace, **content)


@lru_cache
def client(endpoint: str) -> Any:
    return boto3.session.Session().client("s3", endpoint_url=endpoint)


def all_objects(root: str) -> dict[str, bytes]:
    """Every object below the root, by a client that knows nothing of tiger_ray."""
    if not root.startswith("s3://"):
        files = [path for path in Path(root).rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    bucket, prefix = root.removeprefix("s3://").split("/", 1)
    s3 = client(os.environ["AWS_ENDPOINT_URL"])
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
    return {
        key.removeprefix(f"{prefix}/"): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys
    }


def put_object(root: str, key: str, data: bytes) -> None:
    if not root.startswith("s3://"):
        path = Path(root, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    else:
        bucket, prefix = root.removeprefix("s3://").split("/", 1)
        client(os.environ["AWS_ENDPOINT_URL"]).put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data)


# Publishing and reading


def test_what_is_published_is_what_is_read(storage: Storage) -> None:
    manifest = publish(storage)
    assert storage.resolve("catalog") == storage.resolve("catalog", MONDAY) == manifest
    assert storage.read_table(manifest, "part-0.parquet") == TABLE
    columns = ["price", "item_id"]
    assert storage.read_table(manifest, manifest.files[1], columns) == TABLE.select(columns)
    assert storage.read_file(manifest, "facts.json") == b'{"a": 1}'
    assert (manifest.rows, manifest.date, manifest.inputs) == (3, MONDAY, {"events": "e" * 64})
    assert manifest.software["tiger-ray"]


def test_only_the_objects_of_the_layout_exist_after_publishing(storage: Storage) -> None:
    manifest = publish(storage)
    run = f"catalog/_runs/{manifest.run_id}"
    assert set(all_objects(storage.root)) == {
        f"catalog/_claims/{NIGHT}.json",
        *(f"catalog/{entry.path}" for entry in manifest.files),
        f"{run}/_done/part-0.parquet.json",
        f"{run}/_done/facts.json.json",
        f"{run}/_manifest.json",
        f"catalog/date={MONDAY}/_manifest.json",
        "catalog/latest.json",
    }


def test_nothing_is_visible_before_publishing(storage: Storage) -> None:
    run = storage.begin("catalog", NIGHT)
    run.write_table("part-0.parquet", TABLE)
    assert storage.published("catalog", MONDAY) is None
    assert storage.completed("catalog", NIGHT) is None
    with pytest.raises(ArtifactError, match=f"no catalog is published for {MONDAY} under .*Run the stage"):
        storage.resolve("catalog", MONDAY)
    with pytest.raises(ArtifactError, match="no catalog is published under"):
        storage.resolve("catalog")


def test_a_missing_date_names_the_latest_one(folder: Storage) -> None:
    publish(folder, MONDAY)
    with pytest.raises(ArtifactError, match=f"for {TUESDAY} .*the latest is of {MONDAY}"):
        folder.resolve("catalog", TUESDAY)


def test_a_second_job_continues_the_run_of_the_first(storage: Storage) -> None:
    first, second = storage.begin("catalog", NIGHT), storage.begin("catalog", NIGHT)
    assert first.run_id == second.run_id
    assert first.attempt != second.attempt
    done = first.write_table("part-0.parquet", TABLE)
    assert second.finished() == {"part-0.parquet": done}
    # The second job computed something else, say on another GPU: the first result stands, for both.
    assert second.write_table("part-0.parquet", TABLE.slice(1)) == done
    assert finish(storage, second, [done], MONDAY).files == (done,)
    assert finish(storage, first, [done], MONDAY).files == (done,)


def test_a_late_retry_with_other_bytes_does_not_touch_the_finished_file(storage: Storage) -> None:
    run = storage.begin("catalog", NIGHT)
    done = run.write_file("shard.bin", b"first")
    before = all_objects(storage.root)
    assert run.write_file("shard.bin", b"later") == done
    assert before.items() <= all_objects(storage.root).items()
    assert storage.read_file(finish(storage, run, [done], MONDAY), "shard.bin") == b"first"


def test_what_a_killed_writer_left_behind_is_not_taken_for_a_finished_file(folder: Storage) -> None:
    run = folder.begin("catalog", NIGHT)
    done = run.write_file("a.bin", b"a")
    for name in (".b.bin.json.0123.tmp", ".a.bin.json.lock"):
        Path(folder.root, f"catalog/_runs/{run.run_id}/_done", name).write_bytes(b'{"pa')
    assert run.finished() == {"a.bin": done}


def test_counts_of_a_file_survive_a_restart_but_do_not_change_the_digest(folder: Storage) -> None:
    entry = folder.begin("catalog", NIGHT).write_table("part-0.parquet", TABLE, facts={"skipped": 7})
    assert folder.begin("catalog", NIGHT).finished()["part-0.parquet"].facts == {"skipped": 7}
    with_facts = folder.begin("catalog", NIGHT).as_manifest([entry])
    without = folder.begin("catalog", NIGHT).as_manifest([entry.model_copy(update={"facts": {}})])
    assert with_facts.digest == without.digest


def test_publishing_the_same_fingerprint_again_changes_nothing(storage: Storage) -> None:
    first = publish(storage)
    before = all_objects(storage.root)
    assert publish(storage) == first
    assert publish(storage, replace=True) == first
    after = all_objects(storage.root)
    assert {key: data for key, data in after.items() if key in before} == before


def test_another_fingerprint_is_refused_with_the_remedy(storage: Storage) -> None:
    first = publish(storage)
    before = all_objects(storage.root)
    with pytest.raises(PublishError) as caught:
        publish(storage, night=OTHER)
    for word in (
        first.run_id,
        NIGHT[:12],
        OTHER[:12],
        MONDAY,
        "nothing was changed",
        "--storage.replace true",
    ):
        assert word in str(caught.value)
    assert before.items() <= all_objects(storage.root).items()
    assert storage.resolve("catalog") == first


def test_replace_puts_the_new_run_in_place_and_keeps_the_files_of_the_old_one(storage: Storage) -> None:
    old = publish(storage)
    new = publish(storage, night=OTHER, table=TABLE.slice(1), replace=True)
    assert storage.resolve("catalog") == new != old
    assert storage.read_table(old, "part-0.parquet") == TABLE
    assert storage.read_table(new, "part-0.parquet") == TABLE.slice(1)


def test_a_complete_run_is_published_for_another_date_without_new_data(storage: Storage) -> None:
    monday = publish(storage)
    before = set(all_objects(storage.root))
    complete = storage.completed("catalog", NIGHT)
    assert complete is not None
    assert complete.date == ""
    tuesday = storage.publish_again(complete, TUESDAY)
    assert set(all_objects(storage.root)) - before == {f"catalog/date={TUESDAY}/_manifest.json"}
    assert (tuesday.run_id, tuesday.files, tuesday.digest) == (monday.run_id, monday.files, monday.digest)
    assert storage.resolve("catalog") == tuesday


def test_latest_moves_to_newer_dates_only(folder: Storage) -> None:
    tuesday = publish(folder, TUESDAY)
    publish(folder, MONDAY)
    assert folder.resolve("catalog") == tuesday


def test_latest_points_where_it_is_told_and_names_the_date_before(storage: Storage) -> None:
    monday, tuesday = publish(storage, MONDAY), publish(storage, TUESDAY)
    objects = set(all_objects(storage.root))
    assert storage.point_latest("catalog", MONDAY) == TUESDAY
    assert storage.resolve("catalog") == monday
    assert storage.point_latest("catalog", TUESDAY) == MONDAY
    assert storage.point_latest("catalog", TUESDAY) == TUESDAY
    assert storage.resolve("catalog") == tuesday
    assert set(all_objects(storage.root)) == objects


def test_latest_never_points_to_what_is_not_there(storage: Storage) -> None:
    publish(storage, MONDAY)
    with pytest.raises(ArtifactError, match=f"no catalog is published for {TUESDAY}"):
        storage.point_latest("catalog", TUESDAY)
    assert storage.resolve("catalog").date == MONDAY


def test_the_clock_of_the_store_is_this_machine_s(storage: Storage) -> None:
    assert abs(storage.clock_offset_s()) < 30
    assert abs(storage.clock_offset_s(lambda: time.time() + 3600) - 3600) < 30


def test_latest_is_repaired_by_publishing_again_after_a_crash(folder: Storage) -> None:
    manifest = publish(folder)
    Path(folder.root, "catalog/latest.json").unlink()
    folder.publish_again(manifest, MONDAY)
    assert folder.resolve("catalog") == manifest


def test_crash_points_lie_where_the_design_says(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    record: Callable[[str], Any] = lambda name: seen.update({name: set(all_objects(folder.root))})
    monkeypatch.setattr(storage_module, "crash_point", record)
    manifest = publish(folder)
    names = [f"catalog/_runs/{manifest.run_id}/_manifest.json", f"catalog/date={MONDAY}/_manifest.json"]
    assert list(seen) == ["catalog.computed", "catalog.published"]
    assert {f"catalog/{entry.path}" for entry in manifest.files} <= seen["catalog.computed"]
    assert not seen["catalog.computed"] & {*names, "catalog/latest.json"}
    assert set(names) <= seen["catalog.published"]
    assert "catalog/latest.json" not in seen["catalog.published"]


# Content


def test_equal_tables_give_equal_bytes_however_they_are_chunked(folder: Storage) -> None:
    table = pa.table({"text": [str(n) * 100 for n in range(10_000)]})
    # Several pages long: chunks would move their boundaries.
    chunked = pa.concat_tables([table.slice(0, 3), table.slice(3, 4_000), table.slice(4_003)])
    one = folder.begin("catalog", NIGHT).write_table("a.parquet", table)
    two = folder.begin("catalog", OTHER).write_table("a.parquet", chunked)
    assert (one.sha256, one.bytes) == (two.sha256, two.bytes)


@pytest.mark.parametrize("num_rows", [0, 1, 6, 7])
def test_row_groups_are_read_back_as_one_table(folder: Storage, num_rows: int) -> None:
    table = pa.table(
        {"n": pa.array(range(num_rows), pa.int64()), "words": [[f"{n}", "x"] for n in range(num_rows)]}
    )
    table = table.set_column(1, "words", table.column("words").cast(pa.list_(pa.string())))
    run = folder.begin("catalog", "0" * 64)
    entry = run.write_table("shard-00000.parquet", table, group_rows=3)
    assert pq.ParquetFile(pa.BufferReader(run.read_file(entry))).num_row_groups == -(-num_rows // 3)
    assert run.read_table(entry).equals(table)
    assert run.read_table(entry, ["words"]).equals(table.select(["words"]))


def test_files_are_plain_parquet_for_everybody(folder: Storage) -> None:
    entry = publish(folder).file("part-0.parquet")
    file = pq.ParquetFile(Path(folder.root, "catalog", entry.path))
    assert file.read() == TABLE
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_digest_is_of_content_not_of_run_date_or_path(folder: Storage) -> None:
    first, second = publish(folder, MONDAY, NIGHT), publish(folder, TUESDAY, OTHER)
    assert first.files[0].path != second.files[0].path
    assert first.digest == second.digest
    for change in ({"metadata": {"num_items": 4}}, {"files": first.files[:1]}):
        assert first.model_copy(update=change).digest != first.digest


def test_fingerprint_ignores_the_order_of_keys_only() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})
    assert len(NIGHT) == 64


# Damage


def test_a_missing_cut_or_altered_file_is_refused_by_name(storage: Storage) -> None:
    manifest = publish(storage)
    entry = manifest.file("part-0.parquet")
    good = all_objects(storage.root)[f"catalog/{entry.path}"]
    flipped = bytes([good[0] ^ 1]) + good[1:]
    for data, problem in ((good[:-1], "bytes, its manifest says"), (flipped, "has SHA-256")):
        put_object(storage.root, f"catalog/{entry.path}", data)
        with pytest.raises(ArtifactError, match=problem) as caught:
            storage.read_table(manifest, entry)
        assert entry.path in str(caught.value)
    gone = entry.model_copy(update={"path": entry.path.replace("part-0", "part-1")})
    with pytest.raises(ArtifactError, match=r"part-1\.parquet is missing.*--storage\.replace true"):
        storage.read_table(manifest, gone)


def test_a_file_that_is_no_parquet_and_an_absent_column_are_artifact_errors(storage: Storage) -> None:
    manifest = publish(storage)
    with pytest.raises(ArtifactError, match=r"facts\.json is not readable as Parquet"):
        storage.read_table(manifest, "facts.json")
    with pytest.raises(ArtifactError, match="has no column 'prize', only item_id, price"):
        storage.read_table(manifest, "part-0.parquet", ["prize"])
    with pytest.raises(ArtifactError, match=r"no file 'x'; it has 2: facts\.json, part-0\.parquet"):
        manifest.file("x")


def test_lost_files_of_a_complete_run_are_computed_again(folder: Storage) -> None:
    lost = publish(folder).file("part-0.parquet")
    Path(folder.root, "catalog", lost.path).unlink()
    assert folder.completed("catalog", NIGHT) is None
    assert list(folder.begin("catalog", NIGHT).finished()) == ["facts.json"]
    repaired = publish(folder, replace=True)
    assert folder.read_table(folder.resolve("catalog"), "part-0.parquet") == TABLE
    assert folder.completed("catalog", NIGHT) == repaired.model_copy(update={"date": ""})


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../other/_runs/x",
        f"_runs/{'0' * 32}/../../../x",
        f"_runs/{'0' * 32}/..",
        f"_runs/{'0' * 32}/a//b",
        f"_runs/{'0' * 32}/%2e%2e/x y",
        "_runs/x/part.parquet",
        "file:///etc/passwd",
        f"_runs/{'0' * 32}/a\n",
    ],
)
def test_a_manifest_that_points_outside_its_run_is_refused(folder: Storage, path: str) -> None:
    publish(folder)
    file = Path(folder.root, f"catalog/date={MONDAY}/_manifest.json")
    content = json.loads(file.read_bytes())
    content["files"][0]["path"] = path
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"is not a manifest: files\.0\.path"):
        folder.resolve("catalog", MONDAY)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format_version": 2, "new_field": 1}, "format version 2, and this tiger_ray reads none above 1"),
        ({"artifact": "events"}, "holds the manifest of events"),
        ({"date": TUESDAY}, f"holds the manifest of catalog of {TUESDAY}"),
        ({"surprise": 1}, "is not a manifest: surprise"),
        ({"files": "all"}, "is not a manifest: files"),
    ],
)
def test_a_manifest_of_another_version_place_or_shape_is_refused(
    folder: Storage, change: dict[str, Any], problem: str
) -> None:
    publish(folder)
    file = Path(folder.root, f"catalog/date={MONDAY}/_manifest.json")
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    with pytest.raises(ArtifactError, match=problem):
        folder.resolve("catalog", MONDAY)


@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"run_id": "../x"}', b"null"])
def test_damaged_small_files_are_artifact_errors(folder: Storage, damage: bytes) -> None:
    publish(folder)
    for name, read in {
        f"date={MONDAY}/_manifest.json": lambda: folder.published("catalog", MONDAY),
        "latest.json": lambda: folder.resolve("catalog"),
        f"_claims/{NIGHT}.json": lambda: folder.begin("catalog", NIGHT),
    }.items():
        Path(folder.root, "catalog", name).write_bytes(damage)
        with pytest.raises(ArtifactError):
            read()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "_manifest.json", "a b", "é"])
def test_names_that_are_no_plain_file_names_are_refused(folder: Storage, name: str) -> None:
    run = folder.begin("catalog", NIGHT)
    for use in (
        lambda name: run.write_beside(name, {"a.bin": b""}),
        lambda name: run.write_beside("beside", {name: b""}),
        lambda name: run.write_file(name, b""),
        lambda name: folder.begin(name, NIGHT),
    ):
        with pytest.raises(ArtifactError, match="must be letters, digits"):
            use(name)
    with pytest.raises(SettingsError, match="date must be a day"):
        folder.published("catalog", name)


@pytest.mark.parametrize("date", ["yesterday", "2026-02-30", "20261123", "2026-11-23/.."])
def test_a_date_that_is_no_day_is_an_error_of_the_settings_and_not_of_the_artifact(
    folder: Storage, date: str
) -> None:
    with pytest.raises(SettingsError, match=f"date must be a day like 2026-11-23, not {date!r}") as refused:
        folder.resolve("evaluation", date)
    assert refused.value.exit_code == 2


# Processes and secrets


def test_a_pickled_run_writes_from_another_process(storage: Storage) -> None:
    run = storage.begin("catalog", NIGHT)
    run.write_file("a.bin", b"a")  # the connection is open, and must not travel
    copy = pickle.loads(pickle.dumps(run))
    assert copy == run
    assert "store" not in vars(copy.storage)
    copy.write_file("b.bin", b"b")
    assert list(run.finished()) == ["a.bin", "b.bin"]


def test_credentials_appear_in_no_pickle_manifest_address_or_error(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "CANARY" + secrets.token_hex(8)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(variable, f"{canary}-{variable.lower()}")
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{canary}:{canary}@{address}")
    s3.s3_client.cache_clear()
    storage = Storage(s3_root, commit_deadline_s=1.0)
    run = storage.begin("catalog", NIGHT)
    manifest = publish(storage)
    filesystem, _ = input_filesystem(s3_root)
    texts = [pickle.dumps(thing) for thing in (storage, run, filesystem)]
    texts += [manifest.model_dump_json().encode(), repr(storage).encode()]
    texts += all_objects_with(address, s3_root)
    for fail in (
        lambda: Storage("s3://no-such-bucket-of-ours/x").check(),
        lambda: Storage(f"s3://{canary}:{canary}@bucket/x"),
        lambda: publish(storage, night=OTHER),
        lambda: storage.resolve("catalog", TUESDAY),
    ):
        with pytest.raises((StorageError, SettingsError, PublishError, ArtifactError)) as caught:
            fail()
        texts += [str(caught.value).encode(), repr(caught.value).encode()]
        assert caught.value.__cause__ is None
    assert len(texts) > 15
    assert not [text for text in texts if canary.encode() in text]


def all_objects_with(address: str, root: str) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        return list(all_objects(root).values())


def test_a_file_beside_is_replaced_by_any_attempt_and_never_published(storage: Storage) -> None:
    run = storage.begin("model", NIGHT)
    assert run.read_beside("checkpoint", "state.bin") is None
    run.write_beside("checkpoint", {"state.bin": b"first"})
    later = storage.begin("model", NIGHT)
    assert later.read_beside("checkpoint", "state.bin") == b"first"
    later.write_beside("checkpoint", {"state.bin": b"second, longer"})
    assert run.read_beside("checkpoint", "state.bin") == b"second, longer"
    assert storage.begin("model", OTHER).read_beside("checkpoint", "state.bin") is None
    assert run.finished() == {}


def test_a_relative_root_means_the_same_folder_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("nights")
    monkeypatch.chdir("/")
    assert storage.root == str(tmp_path / "nights")
    assert Storage(f"file://{tmp_path}/nights/").root == storage.root


@pytest.mark.parametrize(
    ("root", "problem"),
    [
        ("gs://bucket/x", "gs:// is not supported: use a folder or s3://bucket/prefix"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://key:secret@bucket/x", "must not hold credentials"),
        ("s3://bucket/x?endpoint_override=localhost:9000", "s3://bucket/x must end there"),
    ],
)
def test_a_root_that_cannot_work_is_a_settings_error(root: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        Storage(root)
    assert "secret@" not in str(caught.value)


# The check before the night


def test_check_passes_and_leaves_nothing_behind(storage: Storage) -> None:
    storage.check()
    assert all_objects(storage.root) == {}


def test_check_refuses_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/root.*part of the path is a file"):
        Storage(str(tmp_path / "file/root")).check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_refuses_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied; grant this user access"):
        Storage(str(tmp_path)).check()


def test_check_names_a_missing_bucket(s3_endpoint: str) -> None:
    with pytest.raises(StorageError, match=r"Bucket no-such-bucket-of-ours does not exist at 127\.0\.0\.1"):
        Storage("s3://no-such-bucket-of-ours/x").check()


def test_check_names_an_endpoint_that_refuses(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_CHECK_DEADLINE_S", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"Check AWS_ENDPOINT_URL .* reaches 127\.0\.0\.1:9"):
        Storage(s3_root).check()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL must be like https://host"):
        Storage(s3_root).check()


def test_check_refuses_a_store_that_ignores_conditions(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrite(store: Any, key: str, data: bytes, etag: str | None) -> None:
        if ignored == "If-None-Match" or etag is not None:
            store.put(key, data)
        else:
            conditional(store, key, data, etag)

    conditional = local.LocalStore.put_if
    monkeypatch.setattr(local.LocalStore, "put_if", overwrite)
    for ignored in ("If-None-Match", "If-Match"):
        with pytest.raises(StorageError, match=rf"ignores conditional writes.*in spite of {ignored}\b"):
            folder.check()
    assert all_objects(folder.root) == {}


class Refusal(BaseHTTPRequestHandler):
    """Gives every request the same error."""

    status, code, headers_sent = 500, "", {}

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"<Error><Code>{self.code}</Code><Message>Said by the store</Message></Error>".encode()
        self.send_response_only(self.status)
        for name, value in {"Content-Length": str(len(body)), **self.headers_sent}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def refusing_endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def failing_store(refusing_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Storage]:
    """Storage on an S3 server that gives every request the error asked for."""

    def fail(status: int, code: str, **headers: str) -> Storage:
        monkeypatch.setattr(Refusal, "status", status)
        monkeypatch.setattr(Refusal, "code", code)
        monkeypatch.setattr(Refusal, "headers_sent", headers)
        return Storage("s3://bucket/x", commit_deadline_s=0.0)

    monkeypatch.setattr(storage_module, "_CHECK_DEADLINE_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing_endpoint)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(variable, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return fail


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "AccessDenied", "Said by the store. Grant these credentials s3:GetObject on bucket bucket "),
        (403, "SignatureDoesNotMatch", "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", "renew them and run again; the night continues where it stopped"),
        (400, "AuthorizationHeaderMalformed", "Set AWS_REGION to the region of bucket bucket"),
        (501, "NotImplemented", "lacks conditional writes"),
    ],
)
def test_check_says_what_to_change(
    failing_store: Callable[..., Storage], status: int, code: str, remedy: str
) -> None:
    with pytest.raises(StorageError) as caught:
        failing_store(status, code).check()
    assert remedy in str(caught.value)
    assert not isinstance(caught.value, TryAgain)


def test_a_credential_that_the_store_repeats_is_not_passed_on(
    failing_store: Callable[..., Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "Said by the store")
    with pytest.raises(StorageError, match=r"InvalidAccessKeyId\. <AWS_ACCESS_KEY_ID>\. Check AWS"):
        failing_store(403, "InvalidAccessKeyId").check()


def test_check_says_by_how_much_the_clock_is_off(failing_store: Callable[..., Storage]) -> None:
    storage = failing_store(403, "RequestTimeTooSkewed", Date="Mon, 23 Nov 2020 00:00:00 GMT")
    with pytest.raises(
        StorageError, match=r"clock of this machine is off by \+\d{7} minutes: correct the clock"
    ):
        storage.check()


@pytest.mark.parametrize(
    ("status", "code"),
    [(409, "ConditionalRequestConflict"), (503, "SlowDown"), (500, "InternalError"), (400, "RequestTimeout")],
)
def test_conflicts_throttling_and_server_errors_may_be_tried_again(
    failing_store: Callable[..., Storage], status: int, code: str
) -> None:
    store = failing_store(status, code).store
    for request in (
        lambda: store.get("key"),
        lambda: store.put_if("key", b"", None),
        lambda: store.find("key"),
    ):
        with pytest.raises(NoAnswer, match=code):
            request()


def test_a_refused_bulk_write_or_read_says_which_permission_is_missing(
    failing_store: Callable[..., Storage],
) -> None:
    store = failing_store(403, "AccessDenied").store
    with pytest.raises(StorageError, match="Grant these credentials s3:PutObject"):
        store.put("key", b"data")
    with pytest.raises(StorageError, match="Grant these credentials s3:GetObject"):
        store.read("key", lambda source: source.read())


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        (
            "AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Couldn't connect to server",
            True,
        ),
        ("AWS Error SLOW_DOWN during UploadPart operation: Please reduce your request rate.", True),
        ("AWS Error UNKNOWN (HTTP status 503) during PutObject operation: No response body.", True),
        (
            "AWS Error UNKNOWN (HTTP status 400) during PutObject operation: Unable to parse ExceptionName",
            False,
        ),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body.", False),
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: It does not exist", False),
    ],
)
def test_what_pyarrow_reports_is_told_apart_into_passing_and_lasting_faults(text: str, passing: bool) -> None:
    store = s3.S3Store("bucket", "x", 1.0)
    with pytest.raises(StorageError) as caught, store._errors("PutObject", "key"):
        raise OSError(f"When writing key 'key' in bucket 'bucket': {text}")
    assert isinstance(caught.value, NoAnswer) == passing
    assert "s3://bucket/x/key" in str(caught.value)


# The user's own data


def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def test_inputs_are_found_whatever_their_names(root: str) -> None:
    names = [
        "a b.parquet",
        "c+d.parquet",
        "e%20f.parquet",
        "ß雪.parquet",
        "day=1/x.parquet",
        "day=2/x.parquet",
    ]
    for name in names:
        put_object(root, f"events/{name}", parquet_bytes())
    files = list_inputs(f"{root}/events/")
    filesystem, path = input_filesystem(f"{root}/events")
    assert [file.path.removeprefix(f"{path}/") for file in files] == sorted(names)
    assert all(pq.read_table(file.path, filesystem=filesystem, partitioning=None) == TABLE for file in files)
    assert all(file.bytes == len(parquet_bytes()) for file in files)


def test_inputs_pass_over_markers_hidden_names_other_kinds_and_neighbours(root: str) -> None:
    keys = [
        "events/_SUCCESS",
        "events/.x.parquet",
        "events/_tmp/x.parquet",
        "events/x.parquet.crc",
        "events/x.csv",
    ]
    for key in [*keys, "events2/x.parquet", "events/good.parquet"]:
        put_object(root, key, parquet_bytes())
    if root.startswith("s3://"):
        put_object(root, "events/", b"")
        put_object(root, "events/sub/", b"")
    assert [file.path.rsplit("/", 1)[-1] for file in list_inputs(f"{root}/events")] == ["good.parquet"]
    assert len(list_inputs(f"{root}/events/good.parquet")) == 1
    assert len(list_inputs(f"{root}/events/_SUCCESS")) == 1  # named on purpose


def test_inputs_change_their_version_when_they_are_written_again(root: str) -> None:
    put_object(root, "items.parquet", parquet_bytes())
    (before,) = list_inputs(f"{root}/items.parquet")
    put_object(root, "items.parquet", parquet_bytes()[:-1] + b"x")
    (after,) = list_inputs(f"{root}/items.parquet")
    assert before.path == after.path
    assert before.version != after.version


def test_inputs_that_came_went_or_changed_while_they_were_read_are_refused(root: str) -> None:
    for name in ("a", "b"):
        put_object(root, f"events/{name}.parquet", parquet_bytes())
    files = list_inputs(f"{root}/events")
    require_unchanged(f"{root}/events", files)
    put_object(root, "events/c.parquet", parquet_bytes())
    with pytest.raises(
        DataError, match=r"events changed while it was read: .*events/c\.parquet, 1 of 3 files\. Noth"
    ):
        require_unchanged(f"{root}/events", files)
    files = list_inputs(f"{root}/events")
    gone = dataclasses.replace(files[0], path=files[0].path.replace("a.parquet", "d.parquet"))
    with pytest.raises(
        DataError, match=r"events changed while it was read: .*events/d\.parquet, 1 of 3 files"
    ):
        require_unchanged(f"{root}/events", [*files, gone])
    put_object(root, "events/b.parquet", parquet_bytes()[:-1] + b"x")
    with pytest.raises(
        DataError, match=r"events changed while it was read: .*events/b\.parquet, 1 of 3 files"
    ):
        require_unchanged(f"{root}/events", files)


def test_no_inputs_or_empty_ones_are_data_errors(root: str) -> None:
    put_object(root, "events/table.csv", b"x")
    with pytest.raises(
        DataError, match=r"no \.parquet file at .*/events; other files are there, such as 'table.csv'"
    ):
        list_inputs(f"{root}/events")
    with pytest.raises(DataError, match=r"no \.parquet file at .*/nowhere\. Correct the uri"):
        list_inputs(f"{root}/nowhere")
    put_object(root, "events/empty.parquet", b"")
    with pytest.raises(DataError, match=r"events/empty\.parquet has 0 bytes"):
        list_inputs(f"{root}/events")


def test_inputs_in_a_missing_bucket_are_a_storage_error(s3_endpoint: str) -> None:
    with pytest.raises(StorageError, match="Bucket no-such-bucket-of-ours does not exist"):
        list_inputs("s3://no-such-bucket-of-ours/events")


def test_inputs_behind_links_are_found_and_links_to_nothing_refused(tmp_path: Path) -> None:
    for key in ("events/a.parquet", "other_disk/b.parquet", "third/c.parquet"):
        put_object(str(tmp_path), key, parquet_bytes())
    (tmp_path / "events" / "day=2").symlink_to(tmp_path / "other_disk")
    (tmp_path / "events" / "c.parquet").symlink_to(tmp_path / "third" / "c.parquet")
    uri = str(tmp_path / "events")
    below = [file.path.removeprefix(f"{uri}/") for file in list_inputs(uri)]
    assert below == ["a.parquet", "c.parquet", "day=2/b.parquet"]
    (before,) = list_inputs(f"{uri}/c.parquet")
    put_object(str(tmp_path), "third/c.parquet", parquet_bytes() + b"x")
    assert list_inputs(f"{uri}/c.parquet") != [before]
    # under two names, behind a hidden name, in a circle, and hidden ones to nothing, as editors leave them
    (tmp_path / "events" / "latest").symlink_to("day=2")
    (tmp_path / "events" / "_current").symlink_to("day=2")
    (tmp_path / "other_disk" / "back").symlink_to(tmp_path / "events")
    (tmp_path / "events" / ".lock").symlink_to("nowhere")
    assert [file.path.removeprefix(f"{uri}/") for file in list_inputs(uri)] == below
    (tmp_path / "events" / "_runs" / "17").mkdir(parents=True)
    (tmp_path / "events" / "_runs" / "17" / "d.parquet").write_bytes(parquet_bytes())
    (tmp_path / "events" / "of_run").symlink_to("_runs/17")
    found = [file.path.removeprefix(f"{uri}/") for file in list_inputs(uri)]
    assert found == [*below, "of_run/d.parquet"]
    for name in ("day=3", "e.parquet"):
        (tmp_path / "events" / name).symlink_to("nowhere")
        with pytest.raises(DataError, match=rf"/events/{name} is a broken symlink; repair it or remove it"):
            list_inputs(uri)
        (tmp_path / "events" / name).unlink()


@pytest.mark.parametrize(
    ("status", "code", "said"), [(503, "SlowDown", "HTTP status 503"), (403, "AccessDenied", "s3:GetObject")]
)
def test_a_footer_that_the_store_refuses_is_no_bad_file(
    failing_store: Callable[..., Storage], monkeypatch: pytest.MonkeyPatch, status: int, code: str, said: str
) -> None:
    monkeypatch.setattr(inputs, "_INPUT_DEADLINE_S", 0.0)
    failing_store(status, code)
    with pytest.raises(StorageError, match=said):
        read_input_schema([InputFile("bucket/x/a.parquet", 9, "1")], "s3://bucket/x", {})


def test_more_than_a_thousand_inputs_are_all_found(tmp_path: Path, s3_root: str) -> None:
    (tmp_path / "many").mkdir()
    for n in range(1001):
        put_object(str(tmp_path), f"many/{n}.parquet", b"x")
    assert len(list_inputs(str(tmp_path / "many"))) == 1001
