"""Named points at which a test may kill the process, to prove that a night survives it there."""

from __future__ import annotations

import os
import signal

CRASH_VARIABLE = "TIGER_RAY_CRASH_AT"


BOUNDARIES = ("begin", "computed", "published", "done")
"""Crash points of every stage, in order: nothing done yet; all files written, no manifest; manifest
written, `latest.json` not moved; the stage is complete."""


def crash_point(name: str) -> None:
    """SIGKILL this process if the environment names this point; free of cost otherwise."""
    if os.environ.get(CRASH_VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
