"""A job that is killed while it scores users goes on with the shards that are missing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.nights import Night, contents, published, until, wait_for_orphans

pytestmark = pytest.mark.cluster


SHARDS = 4
KEPT = re.compile(r"recommendations: (\d) of 4 shards are there already, (\d) to do")


def shards_on_disk(root: Path) -> dict[Path, int]:
    """Data files that a `_done` record names, with their times of change in ns."""
    top = root / "recommendations"
    files = [top / json.loads(record.read_bytes())["path"] for record in top.glob("_runs/*/_done/*.json")]
    return {file: file.stat().st_mtime_ns for file in files}


def assert_only_the_missing_shards_are_scored(
    start_night: Callable[..., Night], root: Path, undisturbed: Path, *words: str
) -> None:
    before = shards_on_disk(root)
    assert 1 <= len(before) < SHARDS, f"{len(before)} shards were done when the driver died"

    output = start_night(root, *words).succeed()

    found = KEPT.search(output)
    assert found, output
    kept = int(found[1])
    assert kept == len(before)
    assert kept + int(found[2]) == SHARDS
    after = shards_on_disk(root)
    assert len(after) == SHARDS
    assert before.items() <= after.items(), "a finished shard was written again"

    mine, theirs = (published(each)["recommendations"] for each in (root, undisturbed))
    assert contents(mine) == contents(theirs)
    for name, sha256 in contents(theirs).items():
        (file,) = (each for each in after if each.name == name)
        (other,) = undisturbed.glob(f"recommendations/_runs/*/*-{sha256[:16]}/{name}")
        assert file.read_bytes() == other.read_bytes()
    users = [row for file in after for row in pq.read_table(file).column("user_id").to_pylist()]
    assert len(users) == len(set(users)) == 300


def killed_between_shards(
    root_before: Callable[[str], Path], address: str, kill: Callable[[Path], None]
) -> Path:
    """A root whose scoring `kill` cut off.

    On a busy machine all shards may be done when the driver or its actors die; then it is tried again.
    """
    for _ in range(5):
        root = root_before("recommendations")
        kill(root)
        wait_for_orphans(address)
        if len(shards_on_disk(root)) < SHARDS:
            return root
        shutil.rmtree(root)
    raise AssertionError("five times all shards were done when the driver died")


def test_a_driver_killed_after_its_first_shard_scores_only_the_rest(
    start_night: Callable[..., Night],
    undisturbed: Path,
    root_before: Callable[[str], Path],
    ray_address: str,
) -> None:
    root = killed_between_shards(
        root_before, ray_address, lambda root: start_night(root, crash_at="recommendations.shard").die()
    )
    assert_only_the_missing_shards_are_scored(start_night, root, undisturbed)


def test_a_driver_killed_from_outside_between_two_shards_scores_only_the_rest(
    start_night: Callable[..., Night],
    undisturbed: Path,
    root_before: Callable[[str], Path],
    ray_address: str,
) -> None:
    def kill(root: Path) -> None:
        night = start_night(root)
        until(lambda: len(shards_on_disk(root)) >= 2, "two finished shards")
        night.kill()

    root = killed_between_shards(root_before, ray_address, kill)
    assert_only_the_missing_shards_are_scored(start_night, root, undisturbed)
