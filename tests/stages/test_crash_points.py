"""A driver that dies at any boundary of any stage costs a repetition of the command, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nights import ARTIFACTS, DATE, Night, contents, published
from tiger_ray.artifacts.faults import BOUNDARIES

pytestmark = pytest.mark.cluster


BETWEEN = {
    "embeddings": ["shard"],
    "semantic_ids": ["encoded", "appended"],
    "evaluation": ["shard"],
    "recommendations": ["shard"],
}
"""Crash points of a stage between its beginning and the moment all is computed."""
POINTS = [f"{ARTIFACTS[0]}.{BOUNDARIES[0]}"] + [
    f"{artifact}.{point}" for artifact in ARTIFACTS for point in (*BETWEEN.get(artifact, []), *BOUNDARIES[1:])
]
"""All in order. A later stage begins as the one before it left storage when it was done."""


@pytest.mark.timeout(1400)
def test_a_night_killed_at_every_boundary_publishes_what_an_undisturbed_one_does(
    start_night: Callable[..., Night], undisturbed: Path, root_before: Callable[[str], Path]
) -> None:
    """One root, and the same command again and again: each run gets one crash point further."""
    root = root_before(ARTIFACTS[0])
    for point in POINTS:
        artifact, _, boundary = point.partition(".")
        start_night(root, crash_at=point).die()
        is_published = (root / artifact / f"date={DATE}" / "_manifest.json").exists()
        assert is_published == (boundary in ("published", "done")), point
    output = start_night(root).succeed()

    assert output.count("(skipped: already published)") == len(ARTIFACTS)
    expected, found = published(undisturbed), published(root)
    for artifact in ARTIFACTS:
        assert contents(found[artifact]) == contents(expected[artifact]), artifact
        assert found[artifact].metadata == expected[artifact].metadata, artifact
        assert found[artifact].digest == expected[artifact].digest, artifact
