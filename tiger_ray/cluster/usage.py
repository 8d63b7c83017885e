"""How many worker processes a stage had, and the largest memory that one of them reached."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Usage:
    """What the workers of one stage reported."""

    processes: set[str] = field(default_factory=set)
    peak_memory_bytes: int = 0

    @property
    def workers(self) -> int:
        """Processes that reported."""
        return len(self.processes)


_current: ContextVar[Usage | None] = ContextVar("usage", default=None)


@contextmanager
def measure_usage() -> Iterator[Usage]:
    """Collect in the driver what `note_usage` is told while the block runs."""
    usage = Usage()
    token = _current.set(usage)
    try:
        yield usage
    finally:
        _current.reset(token)


def note_usage(report: str) -> None:
    """Add the report of a worker, as `usage_report` made it, to the stage that runs now, if one is measured."""
    usage = _current.get()
    if usage is None:
        return
    process, peak = report.rsplit(" ", 1)
    usage.processes.add(process)
    usage.peak_memory_bytes = max(usage.peak_memory_bytes, int(peak))


def forget_peak() -> None:
    """Start the peak memory of this process anew: Ray gives a process to one stage after another."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def usage_report() -> str:
    """Host and number of this process, and its peak resident memory in bytes; 0 where Linux does not say."""
    peak = 0
    with suppress(OSError, StopIteration), open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
        peak = int(line.split()[1]) * 1024
    return f"{socket.gethostname()}:{os.getpid()} {peak}"
