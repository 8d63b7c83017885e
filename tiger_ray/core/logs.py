"""What a job shows of the package's log; the library itself only logs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

PACKAGE = logging.getLogger("tiger_ray")


class _Stdout(logging.Handler):
    """Writes to whatever `sys.stdout` is at the moment: a job's output may be redirected after the start."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), flush=True)
        except Exception:
            self.handleError(record)


def show_logs(*, with_time: bool | None = None) -> Callable[[], None]:
    """Show messages of the package from level INFO on, one line each, on stdout.

    Calling again changes nothing.

    Args:
        with_time: begin each line with the time of day; None: unless stdout is a terminal. A worker passes False,
            because Ray marks the lines of a worker itself.

    Returns:
        Ends the showing that this call began.
    """
    if any(isinstance(handler, _Stdout) for handler in PACKAGE.handlers):
        return lambda: None
    if with_time is None:
        with_time = not sys.stdout.isatty()
    handler = _Stdout()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(message)s" if with_time else "%(message)s", "%H:%M:%S")
    )
    level = PACKAGE.level
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)
    PACKAGE.propagate = False

    def stop() -> None:
        PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)
        PACKAGE.propagate = True

    return stop
