"""Training that loses its worker or its driver goes on from the last checkpoint, to the same model."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from nights import ARTIFACTS, DATE, Night, contents, until

from tiger_ray.storage import Manifest, Storage

NUM_STEPS = 120
LONG = (f"--training.num_steps={NUM_STEPS}",)
WORKER = re.compile(r"\(RayTrainWorker pid=(\d+)\)")
RESUMED = re.compile(r"training resumes at step ([\d,]+)")


def model(root: Path) -> Manifest:
    return Storage(str(root)).resolve("model", DATE)


def curve(root: Path) -> list[dict[str, float]]:
    return json.loads(Storage(str(root)).read_file(model(root), "curve.json"))


def has_checkpoint(root: Path, step: int) -> bool:
    """Is a checkpoint of this step or a later one there, and noted by Ray Train?"""
    records = root.glob("model/_runs/*/ray_train/*/checkpoint_manager_snapshot.json")
    return any(
        int(each) >= step for record in records for each in re.findall(r'"step\W+(\d+)', record.read_text())
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


def test_two_workers_see_the_loss_of_one_with_the_same_global_batch(
    start_night: Callable[..., Night], undisturbed: Path, root_before: Callable[[str], Path]
) -> None:
    root = root_before("model")
    output = start_night(root, "--training.num_workers=2", job="train_model").succeed()

    assert "workers: 2" in output
    one, two = curve(undisturbed), curve(root)
    assert [point["step"] for point in two] == [point["step"] for point in one] == [10, 20, 30, 40]
    assert [point["loss"] for point in two] == pytest.approx([point["loss"] for point in one], rel=1e-3)
    assert two[-1]["loss"] < 0.9 * two[0]["loss"]
