"""The Ray of a job is set up for stages that come one after the other."""

import os
import secrets
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from tests.worlds import TUESDAY, Night, run, tiny_settings
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.connect import connect
from tiger_ray.cluster.shards import ShardWorker, map_shards
from tiger_ray.errors import ArtifactError, TigerError
from tiger_ray.settings.ray import RaySettings
from tiger_ray.stages.evaluation import STAGE as EVALUATION_STAGE

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("local_ray")
def test_a_process_that_has_been_idle_for_seconds_is_used_again() -> None:
    """Ray ends it after a second if nobody says otherwise, as soon as there are more of them than CPUs."""
    connect(RaySettings())

    @ray.remote(num_cpus=0)  # so that all of them need a process at once
    def age() -> float:
        """Seconds since this process began."""
        time.sleep(1.0)
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            began = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return float(uptime.read().split()[0]) - began

    ray.get([age.remote() for _ in range(4)])
    time.sleep(4.0)
    assert min(ray.get([age.remote() for _ in range(4)])) > 5.0


@pytest.mark.timeout(120, func_only=True)
def test_a_worker_may_take_every_cpu_there_is(night: Night, night_root: str) -> None:
    """Nothing that its stage still needs may wait for a CPU."""
    data = night.settings.catalog.uri.removesuffix("/catalog")
    sections = {"decoding": {"cpus_per_worker": 2}, "evaluation": {"max_users": 50}}
    settings = tiny_settings(night_root, data, TUESDAY, **sections)
    inputs = (night[name] for name in ("model", "semantic_ids", "sequences", "catalog"))
    assert run(EVALUATION_STAGE, settings, Storage(night_root), *inputs).status == "computed"


@pytest.mark.usefixtures("local_ray")
def test_what_a_worker_cannot_load_is_said_once_and_as_it_is(tmp_path: Path) -> None:
    def fail(run: Run, attempts: str) -> ShardWorker:
        Path(attempts, secrets.token_hex(8)).touch()
        raise ArtifactError("model.safetensors is damaged")

    connect(RaySettings())
    storage = Storage(str(tmp_path / "root"))
    run = storage.begin("recommendations", "0" * 64)
    shards = [run.write_table(f"shard-{n:05d}.parquet", pa.table({"n": [n]})) for n in range(2)]
    (tmp_path / "attempts").mkdir()
    with pytest.raises(ArtifactError, match=r"^model\.safetensors is damaged"):
        map_shards(
            storage.begin("evaluation", "1" * 64),
            fail,
            {"attempts": str(tmp_path / "attempts")},
            shards=shards,
            num_workers=1,
            num_cpus=1,
            use_gpu=False,
        )
    assert len(list((tmp_path / "attempts").iterdir())) == 1


def test_a_cluster_that_does_not_answer_is_an_error_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: object) -> None:
        raise ConnectionError("ray.init tried three times")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(
        TigerError, match=r"no Ray cluster answers at 10\.0\.0\.9:6379: ray\.init .*ray\.address"
    ):
        connect(RaySettings(address="10.0.0.9:6379"))
