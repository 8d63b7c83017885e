"""The Ray of a job is set up for stages that come one after the other."""

import os
import time

import pytest
import ray
from worlds import TUESDAY, Night, tiny_settings

from tiger_ray import harness
from tiger_ray.cluster import connect
from tiger_ray.config import RaySettings
from tiger_ray.storage import Storage


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


@pytest.mark.timeout(120)
def test_a_worker_may_take_every_cpu_there_is(night: Night, night_root: str) -> None:
    """Nothing that its stage still needs may wait for a CPU."""
    data = night.settings.catalog.uri.removesuffix("/catalog")
    sections = {"decoding": {"cpus_per_worker": 2}, "evaluation": {"max_users": 50}}
    settings = tiny_settings(night_root, data, TUESDAY, **sections)
    inputs = (night[name] for name in ("model", "semantic_ids", "sequences", "catalog"))
    assert harness.evaluate(settings, Storage(night_root), *inputs).status == "computed"
