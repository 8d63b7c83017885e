"""Report loss, speed, padding and share of the processor's peak while training runs.

The numbers go to log lines, to TensorBoard files beside the run and, if MLFLOW_TRACKING_URI is set, to MLflow.

B examples, I losses per example.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tiger_ray.errors import SettingsError, TigerError

log = logging.getLogger(__name__)

MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"


Sink = Callable[[int, Mapping[str, float]], None]
"""Takes the values of one step, by name."""


class LossWindow:
    """Mean loss over all workers since the last call of `mean`; `add` does not wait for the GPU.

    >>> window = LossWindow(torch.device("cpu"))
    >>> window.add(0, torch.tensor([[1.0, 2.0]]))
    >>> window.add(1, torch.tensor([[3.0, 4.0]]))
    >>> window.mean()
    2.5
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._bad_step = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, step: int, loss_BI: Tensor) -> None:
        """Add the losses, (B, I) float, of the examples of step number `step`, 0-based."""
        loss = loss_BI.detach().sum()
        self._sum += loss
        self._bad_step.clamp_(max=torch.where(loss.isfinite(), math.inf, step))
        self._count += loss_BI.numel()

    def mean(self) -> float:
        """Mean of the losses, the same on every worker; then start a new window.

        Raises:
            TigerError: a loss was not finite; the message names the first such step.
        """
        total = torch.stack([self._sum, torch.full_like(self._sum, self._count)])
        if dist.is_initialized():
            dist.all_reduce(total)
            dist.all_reduce(self._bad_step, dist.ReduceOp.MIN)
        bad_step = float(self._bad_step)
        if bad_step < math.inf:
            raise TigerError(
                f"the training loss was not a finite number at step {int(bad_step) + 1:,}; the last checkpoint "
                "is good. Lower training.learning_rate, or try training.precision fp32"
            )
        self._sum.zero_()
        self._count = 0
        return float(total[0] / total[1])


class TrainingLog:
    """Loss and speed of all workers, shown by the first worker every few steps.

    >>> shown = {}
    >>> log = TrainingLog(1, 1, torch.device("cpu"), sinks=[lambda step, values: shown.update(values)])
    >>> log.add_checkpoint({"step": 1, "ndcg@10": 0.25})
    >>> shown
    {'checkpoint/ndcg_10': 0.25}
    """

    def __init__(
        self,
        every: int,
        num_steps: int,
        device: torch.device,
        peak: float | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Start counting.

        Args:
            every: steps between two lines.
            num_steps: steps of the whole run; the last step is always shown.
            device: device of the model.
            peak: operations per second that a matrix product reaches on this worker; None: the lines leave out
                the share of the peak.
            sinks: get the same numbers as the lines.
        """
        self._every, self._num_steps, self._device = every, num_steps, device
        self._peak, self._sinks = peak, sinks
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        self._loss = LossWindow(self._device)
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._counts = torch.zeros(4, dtype=torch.float64)
        self._since = time.monotonic()

    def add_batch(self, step: int, loss_BI: Tensor, tokens: int, padded: int, operations: float) -> None:
        """Count a batch.

        Args:
            step: 0-based number of the step.
            loss_BI: losses of each example, (B, I) float.
            tokens: tokens of the histories, without padding.
            padded: tokens of the histories, with padding.
            operations: floating-point operations of forward and backward, without those on padding.
        """
        self._loss.add(step, loss_BI)
        self._counts += torch.tensor([len(loss_BI), tokens, padded, operations], dtype=torch.float64)

    def end_step(self, step: int, learning_rate: float) -> None:
        """Show the counts since the last line, if `every` steps are over or this is the last step."""
        self._steps += 1
        if self._steps < self._every and step + 1 < self._num_steps:
            return
        loss = self._loss.mean()  # Waits for the device, so read the clock afterwards.
        counts, workers = self._counts.to(self._device), 1
        if dist.is_initialized():
            dist.all_reduce(counts)
            workers = dist.get_world_size()
        examples, tokens, padded, operations = counts.tolist()
        seconds = time.monotonic() - self._since
        values = {
            "loss": loss,
            "learning_rate": learning_rate,
            "examples_per_s": examples / seconds,
            "tokens_per_s": tokens / seconds,
            "padding_share": 1 - tokens / padded,
            "operations_per_s": operations / seconds,
        }
        if self._peak:
            values["peak_share"] = operations / seconds / workers / self._peak
        if self._is_first:
            shown = (
                f"step {step + 1:,}/{self._num_steps:,}  loss {loss:.4f}  learning rate {learning_rate:.1e}  "
                f"{values['examples_per_s']:,.0f} examples/s  {values['tokens_per_s']:,.0f} tokens/s  "
                f"padding {values['padding_share']:.0%}  {operations / seconds / 1e9:,.0f} GFLOP/s"
            )
            log.info("%s", shown + (f", {values['peak_share']:.0%} of peak" if self._peak else ""))
        self._write("training", step + 1, values)
        self._begin()

    def add_checkpoint(self, point: Mapping[str, float]) -> None:
        """Show the metrics of a checkpoint, by name, and its `step`."""
        metrics = {name: value for name, value in point.items() if name != "step"}
        if self._is_first:
            words = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            log.info("checkpoint at step %s: %s", f"{int(point['step']):,}", words)
        self._write("checkpoint", int(point["step"]), metrics)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude this block from the training speed."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def _write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            # TensorBoard and MLflow refuse an @ in a name.
            sink(step, {f"{group}/{name}".replace("@", "_"): value for name, value in values.items()})


class TensorBoard:
    """An event file in a temporary folder; the caller copies the file to storage.

    >>> board = TensorBoard(start=0)
    >>> board(1, {"training/loss": 0.5})
    >>> [name.endswith(".from-step-0") for name in board.files()]
    [True]
    >>> board.close()
    """

    def __init__(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name, filename_suffix=f".from-step-{start}")

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step, by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def files(self) -> dict[str, bytes]:
        """Content of the event file up to now, by file name."""
        self._writer.flush()  # waits for the thread that writes
        return {path.name: path.read_bytes() for path in Path(self._folder.name).iterdir()}

    def close(self) -> None:
        """End the run."""
        self._writer.close()


class MLflow:
    """The tracking server of the variable MLFLOW_TRACKING_URI; training goes on if the server fails."""

    def __init__(self, run_name: str, settings: Mapping[str, Any]) -> None:
        """Begin a run of the experiment `tiger_ray`.

        Args:
            run_name: name of the run in MLflow.
            settings: parameters of the run, by section and name.

        Raises:
            SettingsError: the variable is set, but the package is not installed.
        """
        try:
            import mlflow
        except ImportError:
            raise SettingsError(
                f"{MLFLOW_VARIABLE} is set, but the package mlflow is not installed; install mlflow-skinny on "
                f"the training workers or unset {MLFLOW_VARIABLE}"
            ) from None
        self._mlflow = mlflow

        def begin() -> None:
            mlflow.set_experiment("tiger_ray")
            mlflow.end_run()  # An earlier training of this process may have failed and left its run open.
            mlflow.start_run(run_name=run_name)
            mlflow.log_params(
                {f"{section}.{key}": value for section, of in settings.items() for key, value in of.items()}
            )

        self._works = True
        self._try(begin)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step, by name."""
        self._try(lambda: self._mlflow.log_metrics(dict(values), step=step))

    def close(self) -> None:
        """End the run."""
        self._try(self._mlflow.end_run)

    def _try(self, action: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            action()
        except Exception as error:  # A curve must never end a night.
            self._works = False
            log.warning("MLflow gets nothing more of this run: %s: %s", type(error).__name__, error)


def wants_mlflow() -> bool:
    """True if MLFLOW_TRACKING_URI is set."""
    return bool(os.environ.get(MLFLOW_VARIABLE))


def peak_operations_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on this device, with the threads that torch has now."""
    size = 1024 if device.type == "cpu" else 8192
    factor = torch.randn(size, size, device=device, dtype=dtype)

    def seconds(repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            factor @ factor
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds(3)
    repeats = 10
    return max(2 * size**3 * repeats / seconds(repeats) for _ in range(3))
