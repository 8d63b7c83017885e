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
    def task() -> int:
        time.sleep(1.0)
        return os.getpid()

    first = set(ray.get([task.remote() for _ in range(4)]))
    assert len(first) == 4
    time.sleep(4.0)
    assert set(ray.get([task.remote() for _ in range(4)])) == first
