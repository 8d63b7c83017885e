"""Section `ray`: the cluster that a job joins or starts."""

from __future__ import annotations

from typing import Literal

from tiger_ray.settings.base import Count, Section, operational


class RaySettings(Section):
    """The Ray cluster a job runs on."""

    address: str | None = operational(None)
    """Address of a running cluster; empty: the cluster of `ray job submit` if there is one, else a local one."""
    num_cpus: Count | None = operational(None)
    """CPUs of a local cluster that the job starts itself; empty: all of the machine."""
    progress: Literal["auto", "on", "off"] = operational("auto")
    """Progress bars; `auto` shows them on a terminal only."""
