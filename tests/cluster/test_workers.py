"""A worker that fails is started again as often as the settings allow, and one that was told why it cannot go on is not."""

import logging
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.workers import Work, Worker, run_workers, silence_ray_train
from tiger_ray.errors import DataError, TigerError
from tiger_ray.settings.training import TrainingSettings

pytestmark = pytest.mark.ray


def make_work() -> Work:
    """Notes that it was here, and ends as it is told."""

    # a function in a function, for the workers cannot import this module
    def work(arguments: dict[str, Any], worker: Worker) -> None:
        folder = Path(arguments["folder"])
        (folder / f"{worker.rank}-of-{worker.world_size}-{secrets.token_hex(4)}").touch()
        how = arguments["ends"][len(list(folder.iterdir())) - 1 if worker.world_size == 1 else 0]
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error":
            raise ValueError("of another kind")
        if how == "ours":
            raise DataError("the log is empty")

    return work


class Workers:
    """Runs the work with at most two restarts, and counts how often it was begun."""

    def __init__(self, folder: Path) -> None:
        self.seen = folder / "seen"
        self.seen.mkdir()
        self._run = Storage(str(folder / "root")).begin("model", "0" * 64)

    def run(self, *ends: str, num_workers: int = 1) -> None:
        settings = TrainingSettings(num_workers=num_workers, max_failures=2)
        arguments = {"folder": str(self.seen), "ends": ends}
        run_workers(make_work(), arguments, run=self._run, date="2026-11-25", settings=settings)

    @property
    def begun(self) -> int:
        return len(list(self.seen.iterdir()))


@pytest.fixture
def workers(local_ray: None, tmp_path: Path) -> Workers:
    return Workers(tmp_path)


def test_one_worker_is_started_again_after_a_kill_and_an_error(workers: Workers) -> None:
    workers.run("killed", "error", "well")
    assert workers.begun == 3


def test_a_worker_that_fails_too_often_ends_the_job_and_says_how(workers: Workers) -> None:
    with pytest.raises(TigerError, match=r"max_failures is 2\); last error: [\s\S]*of another kind"):
        workers.run("killed", "killed", "error", "well")
    assert workers.begun == 3


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_of_ours_is_raised_as_itself_and_at_once(workers: Workers, num_workers: int) -> None:
    with pytest.raises(DataError, match=r"^the log is empty$"):
        workers.run("ours", num_workers=num_workers)
    assert 1 <= workers.begun <= num_workers


def test_only_the_log_of_ray_train_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    ray_train = logging.getLogger("ray.train")
    level = ray_train.level
    try:
        silence_ray_train()
        logging.getLogger("ray.train.v2._internal.util").critical("a traceback")
        logging.getLogger("application").error("of the application")
    finally:
        ray_train.setLevel(level)
    assert [record.message for record in caplog.records] == ["of the application"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c_ends_the_job_while_workers_run_and_after_they_have(num_workers: int, tmp_path: Path) -> None:
    interrupted = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_JOB, str(num_workers), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    out, err = interrupted.communicate(timeout=300)
    assert out.splitlines()[-2:] == ["first interrupted", "second interrupted"], (out, err)
    assert interrupted.returncode == 0


INTERRUPTED_JOB = """
import signal, sys, threading, time, os
from pathlib import Path
import ray
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.connect import connect
from tiger_ray.cluster.workers import run_workers
from tiger_ray.settings.ray import RaySettings
from tiger_ray.settings.training import TrainingSettings

# A shell ignores SIGINT in what it starts in the background, and a child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

num_workers, folder = int(sys.argv[1]), Path(sys.argv[2])

def interrupt_when(is_time):
    def wait():
        while not is_time():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=wait, daemon=True).start()

def work(arguments, worker):
    (folder / f"{arguments['name']}-{worker.rank}").touch()
    time.sleep(arguments["seconds"])

def run(name, seconds):
    settings = TrainingSettings(num_workers=num_workers)
    run_workers(
        work, {"name": name, "folder": str(folder), "seconds": seconds},
        run=Storage(str(folder / "root")).begin("model", name * 64), date="2026-11-25", settings=settings,
    )

connect(RaySettings(num_cpus=2))
run("0", 0)
interrupt_when(lambda: len(list(folder.glob("1-*"))) == num_workers)
try:
    run("1", 600)
except KeyboardInterrupt:
    print("first interrupted", flush=True)
try:
    interrupt_when(lambda: True)
    time.sleep(60)
except KeyboardInterrupt:
    print("second interrupted", flush=True)
ray.shutdown()
"""
