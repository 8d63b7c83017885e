"""One Ray cluster, one planted world and one undisturbed night for the kill tests."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nights import ARTIFACTS, SETTINGS, Night, free_ports, ray_node, wait_for_nodes
from tiger_ray.synthetic import world as synthetic


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """GCS address of a one-node cluster that outlives the drivers, as a cluster of `ray job submit` does."""
    port, dashboard, client = free_ports(3)
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        words = ("--head", "--port", str(port), "--num-cpus", "2", "--dashboard-port", str(dashboard))
        # The state API, which Ray Train asks, must not look for another cluster on this machine.
        environment = {"RAY_ADDRESS": address}
        with ray_node(folder, *words, "--ray-client-server-port", str(client), environment=environment):
            wait_for_nodes(f"http://127.0.0.1:{dashboard}", 1, [folder])
            yield address


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the data of 120 items and 300 users."""
    folder = tmp_path_factory.mktemp("world")
    synthetic.write(
        str(folder),
        synthetic.World.build(120, 7),
        num_users=300,
        seed=7,
        min_events=6,
        max_events=20,
        num_files=1,
    )
    return folder


@pytest.fixture(scope="session")
def settings_file(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("settings") / "night.yaml"
    file.write_text(SETTINGS.format(data=small_world))
    return file


@pytest.fixture
def start_night(settings_file: Path, ray_address: str) -> Iterator[Callable[..., Night]]:
    """Starts nights, and ends those that a failed test left running."""
    nights: list[Night] = []

    def start(root: Path, *words: str, **how: Any) -> Night:
        nights.append(Night(settings_file, root, *words, address=ray_address, **how))
        return nights[-1]

    yield start
    for night in nights:
        night.kill()


@pytest.fixture(scope="session")
def undisturbed(settings_file: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a night that nobody disturbed."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    night = Night(settings_file, root, address=ray_address)
    try:
        night.succeed()
    finally:
        night.kill()
    return root


@pytest.fixture
def root_before(undisturbed: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Another root, which holds the undisturbed night up to an artifact, and that artifact's claim."""

    def copy(artifact: str) -> Path:
        root = tmp_path / "root"
        for each in ARTIFACTS[: ARTIFACTS.index(artifact)]:
            shutil.copytree(undisturbed / each, root / each)
        for each in ARTIFACTS[ARTIFACTS.index(artifact) :]:
            # A claim names the run of these inputs; the recommendations name the run of their model.
            shutil.copytree(undisturbed / each / "_claims", root / each / "_claims")
        return root

    return copy
