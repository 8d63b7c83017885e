"""Parts of every verb: settings, logging, storage check, and the exit code with how to go on."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tiger_ray.core.logs import show_logs
from tiger_ray.errors import TigerError

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM; the same command continues."""

UNFORESEEN = 1
"""Exit code of an error that tiger_ray does not raise on purpose."""

NO_DATE = "0001-01-01"
"""Date in the settings of a verb that needs no date and got none; earlier than every night."""

UNREAD = {"date": NO_DATE, "catalog": {"uri": "-"}, "events": {"uri": "-"}}
"""Values of the settings without default, for a verb that reads only `storage`."""


def run_verb(act: Callable[[], int | None]) -> int:
    """Call `act` and return the exit code; an error ends with its message and how to go on, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop_showing = show_logs()
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        return act() or 0
    except TigerError as error:
        _say(f"{type(error).__name__}: {error}", error.go_on)
        return error.exit_code
    except KeyboardInterrupt:
        _say("stopped; the same command continues where this one ended")
        return INTERRUPTED
    except Exception:
        _say(
            traceback.format_exc().rstrip(),
            "This error was not foreseen: please report the lines above. The same command continues after the "
            "last finished stage.",
        )
        return UNFORESEEN
    finally:
        stop_showing()
        if in_main:
            signal.signal(signal.SIGTERM, before)


def run_job(main: Callable[[Settings, Storage], None]) -> None:
    """Run `main(settings, storage)` with the settings of the command line, and exit."""
    sys.exit(run_verb(lambda: main(*open_night(sys.argv[1:], prog=Path(sys.argv[0]).name))))


def open_night(words: Sequence[str], *, prog: str | None = None) -> tuple[Settings, Storage]:
    """The settings of these words, and the store that they name, both checked.

    Args:
        words: `--config FILE` and `--section.name value`.
        prog: name of the program, for the help of the settings.

    Raises:
        SettingsError: a setting is wrong, or the encoder cannot be loaded.
        StorageError: the store cannot be reached, read or written.
    """
    from tiger_ray.settings.loading import load_settings

    settings = load_settings(words, prog=prog)
    # Import after the settings are read, so that a mistyped setting is refused at once.
    from tiger_ray.ids import encoders

    encoders.check(settings)
    storage = _storage(settings)
    storage.check()
    return settings, storage


def open_storage(words: Sequence[str], defaults: Mapping[str, Any] = UNREAD) -> tuple[Settings, Storage]:
    """The settings of these words, and the store that they name, for a verb that only reads.

    Args:
        words: `--config FILE` and `--section.name value`.
        defaults: values of settings that neither a file nor a flag gives.

    Raises:
        SettingsError: a setting is wrong.
    """
    from tiger_ray.settings.loading import load_settings

    settings = load_settings(words, defaults=defaults)
    return settings, _storage(settings)


def _storage(settings: Settings) -> Storage:
    from tiger_ray.artifacts.storage import Storage

    return Storage(settings.storage.root, commit_deadline_s=settings.storage.commit_deadline_s)


def _say(message: str, go_on: str = "") -> None:
    print(message, *([f"How to go on: {go_on}"] if go_on else []), sep="\n", file=sys.stderr, flush=True)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
