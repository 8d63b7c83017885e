"""The Ray of a job is set up for stages that come one after the other."""

import os
import time

import pytest
import ray

from tiger_ray.cluster import connect
from tiger_ray.config import RaySettings


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
