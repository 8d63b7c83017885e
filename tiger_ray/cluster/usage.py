"""Count the worker processes of a stage, and find the largest memory that any of them reached."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Usage:
    """The processes of one stage, and their largest memory, from the reports of the workers."""

    processes: set[str] = field(default_factory=set)
    peak_memory_bytes: int = 0

    @property
    def workers(self) -> int:
        """Number of processes that reported."""
        return len(self.processes)


_current: ContextVar[Usage | None] = ContextVar("usage", default=None)


@contextmanager
def measure_usage() -> Iterator[Usage]:
    """Collect in the driver the reports that `note_usage` gets while the block runs."""
    usage = Usage()
    token = _current.set(usage)
    try:
        yield usage
    finally:
        _current.reset(token)


def note_usage(report: str) -> None:
    """Add a report of `usage_report` to the stage that is measured now; without such a stage do nothing."""
    usage = _current.get()
    if usage is None:
        return
    process, peak = report.rsplit(" ", 1)
    usage.processes.add(process)
    usage.peak_memory_bytes = max(usage.peak_memory_bytes, int(peak))


def forget_peak() -> None:
    """Reset the peak memory of this process, because Ray uses a process for one stage after another."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def usage_report() -> str:
    """Host and number of this process, and its peak resident memory in bytes; 0 bytes if Linux names no peak."""
    peak = 0
    with suppress(OSError, StopIteration), open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
        peak = int(line.split()[1]) * 1024
    return f"{socket.gethostname()}:{os.getpid()} {peak}"
