"""Training that loses its worker or its driver goes on from the last checkpoint, to the same model."""

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import safetensors

from tests.nights import ARTIFACTS, DATE, Night, actors, contents, free_ports, ray_node, until, wait_for_nodes
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.training.checkpoints import STATE_FILE

pytestmark = pytest.mark.cluster


NUM_STEPS = 120
LONG = (f"--training.num_steps={NUM_STEPS}",)
WORKER = re.compile(r"\((?:model|RayTrainWorker) pid=(\d+)\)")
RESUMED = re.compile(r"training resumes at step ([\d,]+)")


def model(root: Path) -> Manifest:
    return Storage(str(root)).resolve("model", DATE)


def curve(root: Path) -> dict[str, Any]:
    return json.loads(Storage(str(root)).read_file(model(root), "curve.json"))


def has_checkpoint(root: Path, step: int) -> bool:
    """Is a checkpoint of this step or a later one on storage?"""
    states = root.glob(f"model/_runs/*/checkpoint-{DATE}/{STATE_FILE}")
    return any(
        json.loads(safetensors.safe_open(state, "pt").metadata()["progress"])["step"] >= step
        for state in states
    )


def resumed_at(output: str) -> list[int]:
    return [int(step.replace(",", "")) for step in RESUMED.findall(output)]


@pytest.fixture(scope="module")
def long_run(
    undisturbed: Path, settings_file: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Root of a training that nobody disturbed, by one worker."""
    root = tmp_path_factory.mktemp("long") / "root"
    for artifact in ARTIFACTS[: ARTIFACTS.index("model")]:
        shutil.copytree(undisturbed / artifact, root / artifact)
    night = Night(settings_file, root, *LONG, address=ray_address, job="train_model")
    try:
        assert not resumed_at(night.succeed())
    finally:
        night.kill()
    return root


def test_a_killed_training_worker_is_replaced_and_the_model_is_the_same(
    start_night: Callable[..., Night], long_run: Path, root_before: Callable[[str], Path]
) -> None:
    root = root_before("model")
    night = start_night(root, *LONG, job="train_model")
    until(lambda: has_checkpoint(root, 30) and WORKER.search(night.output), "a worker's line and checkpoint")
    found = WORKER.search(night.output)
    assert found
    os.kill(int(found[1]), signal.SIGKILL)
    output = night.succeed()

    (step,) = resumed_at(output)
    assert 0 < step < NUM_STEPS, "the worker was killed in mid-run"
    assert len(set(WORKER.findall(output))) == 2, "two worker processes took part"
    assert contents(model(root)) == contents(model(long_run))


def test_a_killed_driver_of_training_resumes_at_the_last_checkpoint_and_the_model_is_the_same(
    start_night: Callable[..., Night], long_run: Path, root_before: Callable[[str], Path]
) -> None:
    root = root_before("model")
    night = start_night(root, *LONG, job="train_model")
    until(lambda: has_checkpoint(root, 30), "checkpoint of step 30")
    night.kill()
    assert Storage(str(root)).published("model", DATE) is None
    (step,) = resumed_at(start_night(root, *LONG, job="train_model").succeed())

    assert 30 <= step < NUM_STEPS
    assert contents(model(root)) == contents(model(long_run))


@pytest.mark.timeout(600)
def test_training_whose_node_is_killed_goes_on_on_another_and_the_model_is_the_same(
    settings_file: Path, long_run: Path, root_before: Callable[[str], Path]
) -> None:
    root = root_before("model")
    port, dashboard_port, client = free_ports(3)
    address, dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"
    environment = {"RAY_ADDRESS": address}
    with ExitStack() as nodes, ExitStack() as lost:
        head, first, second = (
            Path(nodes.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
            for _ in range(3)
        )
        # No CPU beside the driver, so that the worker has to be on the other node.
        words = ("--head", "--port", str(port), "--dashboard-port", str(dashboard_port), "--num-cpus", "0")
        client_port = ("--ray-client-server-port", str(client))
        nodes.enter_context(ray_node(head, *words, *client_port, environment=environment))
        wait_for_nodes(dashboard, 1, [head])
        words = ("--address", address, "--num-cpus", "1")
        lost.enter_context(ray_node(first, *words, environment=environment))
        wait_for_nodes(dashboard, 2, [head, first])
        night = Night(settings_file, root, *LONG, address=address, job="train_model")
        try:
            until(lambda: has_checkpoint(root, 10), "checkpoint of step 10")
            lost.close()  # SIGKILL of its raylet and of everything that runs there
            assert not resumed_at(night.output)
            nodes.enter_context(ray_node(second, *words, environment=environment))
            output = night.succeed()
        finally:
            night.kill()

    (step,) = resumed_at(output)
    assert 10 <= step < NUM_STEPS
    assert contents(model(root)) == contents(model(long_run))


def assert_same_curve(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same global batches give the same curve, but for the order in which floats are added."""
    assert [point["step"] for point in one["points"]] == [point["step"] for point in other["points"]]
    for name, tolerance in (("loss", {"rel": 1e-3}), ("ndcg@10", {"abs": 0.01})):
        values = [point[name] for point in other["points"]]
        assert [point[name] for point in one["points"]] == pytest.approx(values, **tolerance), name


def test_two_workers_see_the_loss_of_one_with_the_same_global_batch(
    start_night: Callable[..., Night], undisturbed: Path, root_before: Callable[[str], Path]
) -> None:
    root = root_before("model")
    output = start_night(root, "--training.num_workers=2", job="train_model").succeed()

    assert "workers: 2" in output
    two = curve(root)
    assert [point["step"] for point in two["points"]] == [10, 20, 30, 40]
    assert_same_curve(two, curve(undisturbed))
    assert two["points"][-1]["loss"] < 0.9 * two["points"][0]["loss"]


def test_two_workers_of_which_one_and_then_the_driver_is_killed_are_followed_by_one_alone(
    start_night: Callable[..., Night],
    long_run: Path,
    root_before: Callable[[str], Path],
    ray_address: str,
) -> None:
    root = root_before("model")
    night = start_night(root, *LONG, "--training.num_workers=2", job="train_model")
    until(lambda: has_checkpoint(root, 10) and WORKER.search(night.output), "a worker's line and checkpoint")
    found = WORKER.search(night.output)
    assert found
    (second,) = (pid for pid in actors(ray_address, "RayTrainWorker") if pid != int(found[1]))
    os.kill(second, signal.SIGKILL)
    (step,) = until(lambda: resumed_at(night.output), "a new group of workers")
    until(lambda: has_checkpoint(root, step + 10), "its checkpoint")
    night.kill()
    assert night.output.count("workers: 2") == 2

    output = start_night(root, *LONG, "--training.num_workers=1", job="train_model").succeed()
    assert "workers: 1" in output
    (last,) = resumed_at(output)
    assert step < last < NUM_STEPS
    assert_same_curve(curve(root), curve(long_run))
