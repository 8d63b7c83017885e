"""Training that cannot go on says why at once and keeps its last good checkpoint; refusals that pass cost nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
import yaml
from worlds import TUESDAY, Night, published_dates, tiny_settings

from tiger_ray.checkpoints import STATE_FILE
from tiger_ray.storage import Storage

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
    """Runs `jobs/train_model.py` on the night's histories, for another date, under a root of its own."""

    night: Night
    root: str
    folder: Path

    def run(self, **changed: Any) -> subprocess.CompletedProcess[str]:
        data = self.night.settings.catalog.uri.removesuffix("/catalog")
        settings = tiny_settings(
            self.root,
            data,
            TUESDAY,
            training=STEPS | changed.pop("training", {}),
            storage={"root": self.root, "commit_deadline_s": 4.0},
            **changed,
        )
        config = self.folder / "night.yaml"
        config.write_text(yaml.safe_dump(settings.resolved()))
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


def after_checkpoints(count: int, answer: Callable[[str], tuple[int, str] | None]) -> Callable[..., Any]:
    """Refuse writes below the run's folders once that many checkpoints are written."""
    written: list[str] = []

    def answers(method: str, path: str) -> tuple[int, str] | None:
        if method != "PUT" or f"/checkpoint-{TUESDAY}/" not in path:
            return None
        if len(written) >= count:
            return answer(path)
        written.append(path)
        return None

    return answers


def tracebacks(done: subprocess.CompletedProcess[str]) -> list[str]:
    """But for those of a process of Ray Train that looks for its cluster and finds those of other tests too."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if "Traceback" in line and "PlacementGroupCleaner" not in line]


def test_a_storage_that_refuses_for_good_ends_training_clearly_and_the_same_command_goes_on(
    training: Training, s3_faults: Any
) -> None:
    s3_faults.answers = after_checkpoints(2, lambda path: (403, "AccessDenied"))
    refused = training.run()
    assert refused.returncode == 6, refused.stderr
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "StorageError: training stopped, for its checkpoint of step 30 could not be written."
    )
    assert f"PutObject of {training.root}/model/_runs/" in last
    assert "AccessDenied" in last
    assert "Grant these credentials s3:PutObject" in last
    assert last.endswith("The same command goes on from its checkpoint of step 20")
    assert not tracebacks(refused)
    assert refused.stdout.count("training begins") == 1
    assert "training resumes" not in refused.stdout
    (state,) = training.checkpoints()
    assert state["step"] == 20
    assert not training.is_published

    # The store never recovers from its trouble of another kind: it gives no definite answer.
    s3_faults.answers = after_checkpoints(1, lambda path: (503, "SlowDown"))
    silent = training.run()
    assert silent.returncode == 6, silent.stderr
    assert "training resumes at step 20" in silent.stdout
    last = silent.stderr.strip().splitlines()[-1]
    assert "checkpoint of step 40 could not be written" in last
    assert "SlowDown" in last
    assert last.endswith("goes on from its checkpoint of step 30")
    (state,) = training.checkpoints()
    assert state["step"] == 30
    assert not training.is_published

    # It is well again for good, but for a few refusals.
    left = [(503, "SlowDown")] * 8
    s3_faults.answers = after_checkpoints(0, lambda path: left.pop() if left else None)
    done = training.run()
    assert done.returncode == 0, done.stderr
    assert not left
    assert "training resumes at step 30" in done.stdout
    assert training.is_published
    storage = Storage(training.root)
    curve = json.loads(storage.read_file(storage.resolve("model", TUESDAY), "curve.json"))
    assert [point["step"] for point in curve["points"]] == [10, 20, 30, 40]
    assert curve["points"][:3] == state["curve"]


def test_a_loss_that_is_not_finite_ends_the_job_at_once_and_names_the_step(training: Training) -> None:
    ended = training.run(
        training={
            "optimizer": "adamw",
            "learning_rate": 1e30,
            "warmup_steps": 0,
            "checkpoint_every_steps": 1,
            "max_failures": 3,
        }
    )
    assert ended.returncode == 6, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("TigerError: ")
    assert "was not a finite number" in last
    assert "training.learning_rate" in last
    step = int(last.partition(" step ")[2].split(";")[0].split(",")[0])
    assert not tracebacks(ended)
    assert ended.stdout.count("training begins") == 1
    assert "training resumes" not in ended.stdout, "it would come to the same step again"
    (state,) = training.checkpoints()
    assert state["step"] == step - 1 >= 1
    assert not training.is_published


def test_a_checkpoint_of_another_model_is_refused(training: Training, s3_faults: Any) -> None:
    s3_faults.answers = after_checkpoints(1, lambda path: (403, "AccessDenied"))
    assert training.run().returncode == 6
    s3_faults.answers = lambda method, path: None
    store = Storage(training.root).store
    (key,) = (file.path for file in store.find("model") if f"/checkpoint-{TUESDAY}/" in file.path)
    tensors = safetensors.torch.load(store.read(key, lambda source: source.read()))
    tensors["model.shared.weight"] = tensors["model.shared.weight"][:, :16].contiguous()
    (state,) = training.checkpoints()
    store.put(key, safetensors.torch.save(tensors, metadata={"progress": json.dumps(state)}))

    refused = training.run()
    assert refused.returncode == 3, refused.stderr
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("ArtifactError: checkpoint tensor shared.weight has shape")
    assert last.endswith(f"To begin again, remove {training.root}/{key}")
    assert not tracebacks(refused)
    assert not training.is_published
