"""A progress bar with the estimated time left for training workers, drawn by the driver on a terminal.

Ray Data draws its own bars. A log file gets only the lines of the log.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

LOOK_EVERY_S = 0.5
"""Seconds between two updates of the bar."""


class _Board:
    """Holds the last step and text that the first worker sent."""

    def __init__(self) -> None:
        self._step, self._words = 0, ""

    def write(self, step: int, words: str) -> None:
        self._step, self._words = step, words

    def read(self) -> tuple[int, str]:
        return self._step, self._words


@dataclass(frozen=True)
class BarSink:
    """Sends the numbers of a worker's training log to the bar, as a `training.log.Sink`."""

    board: Any

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step, and the loss if `values` has one."""
        loss = values.get("training/loss")
        self.board.write.remote(step, "" if loss is None else f"loss {loss:.4f}")

    def close(self) -> None:
        """Do nothing: `progress_bar` removes the bar."""


@contextmanager
def progress_bar(name: str, num_steps: int | None) -> Iterator[BarSink | None]:
    """Draw a bar while the block runs, if Ray Data may draw bars too.

    Args:
        name: of the artifact.
        num_steps: steps until the end; None: no bar.

    Yields:
        The sink for the training log; None if no bar is drawn.
    """
    if num_steps is None or not ray.data.DataContext.get_current().enable_progress_bars:
        yield None
        return
    board = ray.remote(num_cpus=0)(_Board).remote()
    ended = threading.Event()
    thread = threading.Thread(target=_draw, args=(name, num_steps, board, ended), daemon=True)
    thread.start()
    try:
        yield BarSink(board)
    finally:
        ended.set()
        thread.join(10 * LOOK_EVERY_S)
        ray.kill(board)


def _draw(name: str, num_steps: int, board: Any, ended: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=num_steps, words="")
        while not ended.wait(LOOK_EVERY_S):
            try:
                step, words = ray.get(board.read.remote(), timeout=10)
            except ray.exceptions.RayError:
                return  # the job reports the error
            bar.update(task, completed=step, words=words)
