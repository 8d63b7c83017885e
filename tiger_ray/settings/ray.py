"""Section `ray`: the cluster that a job joins or starts."""

from __future__ import annotations

from typing import Literal

from tiger_ray.settings.base import Count, Section, operational


class RaySettings(Section):
    """The Ray cluster of a job."""

    address: str | None = operational(None)
    """Address of a running cluster. Empty: the cluster of `ray job submit`, or a local one outside of it."""
    num_cpus: Count | None = operational(None)
    """CPUs of a local cluster that the job starts itself. Empty: all CPUs of the machine."""
    progress: Literal["auto", "on", "off"] = operational("auto")
    """Progress bars; `auto` shows them on a terminal only."""
