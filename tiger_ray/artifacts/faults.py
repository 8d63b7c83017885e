"""Named points at which a test may kill the process, to prove that a night survives it there."""

from __future__ import annotations

import os
import signal

CRASH_VARIABLE = "TIGER_RAY_CRASH_AT"


BOUNDARIES = ("begin", "computed", "published", "done")
"""Crash points of every stage, in order: no file written; all files written, but no manifest; manifest written,
but `latest.json` not moved; stage complete."""


def crash_point(name: str) -> None:
    """Kill this process with SIGKILL if the environment names this point."""
    if os.environ.get(CRASH_VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
