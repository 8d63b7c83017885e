"""Training that cannot go on says why at once and keeps its last good checkpoint; refusals that pass cost nothing."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
import yaml

from tests.worlds import TUESDAY, Night, published_dates, run, tiny_settings
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import ArtifactError, StorageError
from tiger_ray.settings.settings import Settings
from tiger_ray.stages import model as training_stage
from tiger_ray.training.checkpoints import STATE_FILE

pytestmark = pytest.mark.ray


REPOSITORY = Path(__file__).parents[2]
STEPS = {
    "num_steps": 40,
    "global_batch_size": 32,
    "checkpoint_every_steps": 10,
    "log_every_steps": 10,
    "validation_users": 0,
}


@dataclass
class Training:
    """Trains on the night's histories, for another date, under a root of its own."""

    night: Night
    root: str
    folder: Path

    def settings(self, **changed: Any) -> Settings:
        data = self.night.settings.catalog.uri.removesuffix("/catalog")
        return tiny_settings(
            self.root,
            data,
            TUESDAY,
            training=STEPS | changed.pop("training", {}),
            storage={"root": self.root, "commit_deadline_s": 4.0},
            **changed,
        )

    def run(self) -> Manifest:
        inputs = (self.night["sequences"], self.night["semantic_ids"])
        settings = self.settings()
        storage = Storage(self.root, commit_deadline_s=settings.storage.commit_deadline_s)
        return run(training_stage.STAGE, settings, storage, *inputs).manifest

    def run_job(self, **changed: Any) -> subprocess.CompletedProcess[str]:
        config = self.folder / "night.yaml"
        config.write_text(yaml.safe_dump(self.settings(**changed).resolved()))
        return subprocess.run(
            [sys.executable, "jobs/train_model.py", "--config", str(config)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
            env={
                **os.environ,
                "RAY_AUTH_MODE": "disabled",
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            },
        )

    def checkpoints(self) -> list[dict[str, Any]]:
        """What the checkpoints on storage say of themselves; all of their weights are numbers."""
        store, found = Storage(self.root).store, []
        for file in store.find("model"):
            if f"/checkpoint-{TUESDAY}/{STATE_FILE}" in f"/{file.path}":
                data = store.read(file.path, lambda source: source.read())
                assert all(tensor.isfinite().all() for tensor in safetensors.torch.load(data).values())
                header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
                found.append(json.loads(header["__metadata__"]["progress"]))
        return found

    @property
    def is_published(self) -> bool:
        return ("model", TUESDAY) in published_dates(Storage(self.root))


@pytest.fixture
def training(night: Night, night_root: str, tmp_path: Path) -> Training:
    storage = Storage(night_root)
    for artifact in ("sequences", "semantic_ids"):
        storage.publish_again(night[artifact], TUESDAY)
    return Training(night, night_root, tmp_path)


class Refusing:
    """Answers writes of checkpoints with an error, once so many were written."""

    def __init__(self, after: int, status: int, code: str, times: float = math.inf) -> None:
        self._after, self._answer, self._times = after, (status, code), times
        self.written = 0

    def __call__(self, method: str, path: str) -> tuple[int, str] | None:
        if method != "PUT" or f"/checkpoint-{TUESDAY}/" not in path:
            return None
        if self.written >= self._after and self._times > 0:
            self._times -= 1
            return self._answer
        self.written += 1
        return None


def last_lines(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """The last two lines of the job on stderr: the error, and how to go on. Lines of Ray's workers may follow."""
    lines = done.stderr.strip().splitlines()
    error, go_on = [line for line in lines if not re.match(r"(\x1b\[\d+m)?\(\w+ pid=", line)][-2:]
    return error, go_on


def test_refused_checkpoints_end_training_clearly_and_the_same_command_goes_on(
    training: Training, s3_faults: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    s3_faults.answers = Refusing(2, 403, "AccessDenied")
    with pytest.raises(StorageError) as refused:
        training.run()
    assert refused.value.exit_code == 6
    text = str(refused.value)
    assert text.startswith("training stopped, because its checkpoint of step 30 could not be written.")
    assert f"PutObject of {training.root}/model/_runs/" in text
    assert "AccessDenied" in text
    assert "Grant these credentials s3:PutObject" in text
    assert text.endswith("The same command goes on from its checkpoint of step 20")
    (state,) = training.checkpoints()
    assert state["step"] == 20
    assert not training.is_published

    # No definite answer, for longer than storage.commit_deadline_s. Begun again, it would be refused at step 20.
    s3_faults.answers = Refusing(1, 503, "SlowDown")
    with pytest.raises(
        StorageError, match=r"checkpoint of step 40 .*SlowDown.* goes on from its checkpoint of step 30"
    ):
        training.run()
    (state,) = training.checkpoints()
    assert state["step"] == 30
    assert not training.is_published

    # A checkpoint that is another model's.
    s3_faults.answers = lambda method, path: None
    store = Storage(training.root).store
    (key,) = (file.path for file in store.find("model") if f"/checkpoint-{TUESDAY}/" in file.path)
    good = store.read(key, lambda source: source.read())
    tensors = safetensors.torch.load(good)
    tensors["model.shared.weight"] = tensors["model.shared.weight"][:, :16].contiguous()
    store.put(key, safetensors.torch.save(tensors, metadata={"progress": json.dumps(state)}))
    with pytest.raises(ArtifactError, match=r"checkpoint tensor shared\.weight has shape") as foreign:
        training.run()
    assert str(foreign.value).endswith(f"To begin again, remove {training.root}/{key}")
    assert not training.is_published

    # All is well again, but for a few refusals that pass, and the file of TensorBoard.
    store.put(key, good)
    refusing = Refusing(0, 503, "SlowDown", times=3)
    s3_faults.answers = lambda method, path: (
        (403, "AccessDenied") if method == "PUT" and "/tensorboard/" in path else refusing(method, path)
    )
    model = training.run()
    assert refusing.written == 1, "only the checkpoint of step 40"
    said, give_up = "", time.monotonic() + 30  # what a worker prints may come after its work has ended
    while "TensorBoard's file of step 40 could not be written" not in said:
        assert time.monotonic() < give_up, said
        time.sleep(0.1)
        said += capfd.readouterr().out
    curve = json.loads(Storage(training.root).read_file(model, "curve.json"))
    assert [point["step"] for point in curve["points"]] == [10, 20, 30, 40]
    assert curve["points"][:3] == state["curve"]


def test_a_loss_that_is_not_finite_ends_the_job_at_once_and_names_the_step(training: Training) -> None:
    ended = training.run_job(
        training={
            "optimizer": "adamw",
            "learning_rate": 1e30,
            "warmup_steps": 0,
            "checkpoint_every_steps": 1,
            "max_failures": 3,
        }
    )
    assert ended.returncode == 6, ended.stderr
    error, go_on = last_lines(ended)
    assert error.startswith("TigerError: ")
    assert go_on.startswith("How to go on: ")
    assert "was not a finite number" in error
    assert "training.learning_rate" in error
    step = int(error.partition(" step ")[2].split(";")[0].split(",")[0])
    assert "Traceback" not in re.sub(r".*PlacementGroupCleaner.*", "", ended.stdout + ended.stderr)
    assert ended.stdout.count("training begins") == 1
    assert "training resumes" not in ended.stdout, "it would come to the same step again"
    (state,) = training.checkpoints()
    assert state["step"] == step - 1 >= 1
    assert not training.is_published
