"""`tiger-ray storage`: what is listed, which damage is named, and where `latest.json` points after a rollback."""

from pathlib import Path

import pyarrow as pa
import pytest

from tests.worlds import MONDAY, TUESDAY, WEDNESDAY, publish
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cli.main import main


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Recommendations of two nights, and a catalog of one that both published."""
    storage = Storage(str(tmp_path / "root"))
    for date, users in ((MONDAY, ["a", "b"]), (TUESDAY, ["a", "b", "c"])):
        publish(storage, "recommendations", {"shard-00000.parquet": pa.table({"u": users})}, {}, date=date)
        publish(storage, "catalog", {"items.bin": b"twelve bytes"}, {}, date=date)
    return storage


def file_of(storage: Storage, artifact: str, date: str) -> Path:
    (entry,) = storage.resolve(artifact, date).files
    return Path(storage.root) / artifact / entry.path


def run(storage: Storage, *words: str) -> int:
    return main(["storage", *words, "--storage.root", storage.root])


def test_ls_counts_dates_runs_and_bytes(storage, capsys):
    (Path(storage.root) / "notes").mkdir()
    (Path(storage.root) / "notes" / "mine.txt").write_text("not an artifact")
    assert run(storage, "ls") == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    catalog, recommendations = (line.split() for line in lines)
    assert catalog[:5] == ["catalog", "2", MONDAY, TUESDAY, "1"]
    assert recommendations[:5] == ["recommendations", "2", MONDAY, TUESDAY, "2"]
    files = [file for file in (Path(storage.root) / "catalog").rglob("*") if file.is_file()]
    assert catalog[5] == str(len(files))
    total = sum(file.stat().st_size for file in files)
    assert float(catalog[6]) == pytest.approx(total / 1000, rel=0.01)
    assert catalog[7] == "kB"


def test_ls_of_an_empty_root_says_what_to_do_and_exits_3(tmp_path, capsys):
    assert main(["storage", "ls", "--storage.root", str(tmp_path)]) == 3
    assert "correct storage.root, or run a night first" in capsys.readouterr().err


def test_verify_counts_each_file_once_though_two_dates_share_it(storage, capsys):
    assert run(storage, "verify") == 0
    assert capsys.readouterr().out.startswith("3 files, ")
    assert run(storage, "verify", "catalog") == 0
    assert capsys.readouterr().out.startswith(
        "1 files, 12 B, of 2 published manifests of 1 artifacts are whole"
    )


def test_verify_names_every_missing_and_every_short_file_and_exits_3(storage, capsys):
    missing, short = file_of(storage, "catalog", MONDAY), file_of(storage, "recommendations", TUESDAY)
    missing.unlink()
    short.write_bytes(b"short")
    assert run(storage, "verify") == 3
    said = capsys.readouterr().err
    assert f"{missing} is missing" in said
    assert f"{short} has 5 bytes" in said
    assert "2 of 3 published files" in said


def test_only_digests_find_a_changed_byte(storage, capsys):
    changed = file_of(storage, "catalog", MONDAY)
    changed.write_bytes(b"Twelve bytes")
    assert run(storage, "verify") == 0
    assert run(storage, "verify", "--digests") == 3
    assert f"{changed} has SHA-256" in capsys.readouterr().err


def test_verify_names_a_damaged_manifest(storage, capsys):
    manifest = Path(storage.root) / "catalog" / f"date={TUESDAY}" / "_manifest.json"
    manifest.write_text("{}")
    assert run(storage, "verify") == 3
    assert f"{manifest} is not a manifest" in capsys.readouterr().err


def test_an_unknown_artifact_is_refused_with_those_that_are_there(storage, capsys):
    assert run(storage, "verify", "catalogue") == 3
    assert "no artifact 'catalogue' lies below" in capsys.readouterr().err


def test_rollback_moves_the_latest_back_and_deletes_nothing(storage, capsys):
    before = sorted(Path(storage.root).rglob("*.parquet"))
    assert run(storage, "rollback", MONDAY) == 0
    assert (
        f"the latest recommendations is that of {MONDAY} now (before: {TUESDAY})" in capsys.readouterr().out
    )
    assert storage.resolve("recommendations").date == MONDAY
    assert storage.resolve("recommendations", TUESDAY).rows == 3
    assert storage.resolve("catalog").date == TUESDAY
    assert sorted(Path(storage.root).rglob("*.parquet")) == before
    assert run(storage, "rollback", TUESDAY, "--artifact", "catalog") == 0
    assert storage.resolve("catalog").date == TUESDAY


def test_the_next_night_becomes_the_latest_after_a_rollback(storage):
    run(storage, "rollback", MONDAY)
    publish(storage, "recommendations", {"s.bin": b"wednesday"}, {}, date=WEDNESDAY)
    assert storage.resolve("recommendations").date == WEDNESDAY


def test_rollback_refuses_a_night_that_is_not_published_or_not_whole(storage, capsys):
    assert run(storage, "rollback", "2026-01-01") == 3
    assert f"no recommendations is published for 2026-01-01 under {storage.root}" in capsys.readouterr().err
    file_of(storage, "recommendations", MONDAY).unlink()
    assert run(storage, "rollback", MONDAY) == 3
    assert "latest.json was not moved" in capsys.readouterr().err
    assert storage.resolve("recommendations").date == TUESDAY
