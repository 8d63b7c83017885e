"""What every job does around its one call: settings, logging, storage check, Ray, exit code."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tiger_ray.core.logs import show_logs
from tiger_ray.errors import TigerError
from tiger_ray.settings.loading import load_settings
from tiger_ray.settings.settings import Settings

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM; the same command continues."""


def run_job(main: Callable[[Settings, Storage], None]) -> None:
    """Run `main(settings, storage)` on Ray with the settings of the command line, and exit.

    Errors of ours end with one message and the exit code of `errors.py`, without a traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    show_logs()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        settings = load_settings(sys.argv[1:], prog=Path(sys.argv[0]).name)
        _run(main, settings)
    except TigerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command continues where this one ended", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _run(main: Callable[[Settings, Storage], None], settings: Settings) -> None:
    # Imported here, so that --help and a mistyped setting answer at once.
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.ids import encoders

    encoders.check(settings)
    storage = Storage(settings.storage.root, commit_deadline_s=settings.storage.commit_deadline_s)
    storage.check()
    main(settings, storage)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
