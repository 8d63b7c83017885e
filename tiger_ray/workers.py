"""Workers that compute one thing together, each with a rank, under Ray Train: how anything is trained.

`torch.distributed` is set up among them (NCCL on GPUs, gloo on CPUs). When a worker dies, all are started
again, and may find on storage what they left there.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tiger_ray.config import QuantizerSettings, TrainingSettings
from tiger_ray.errors import TigerError
from tiger_ray.storage import Run

WorkerSettings = QuantizerSettings | TrainingSettings
"""Sections that say how many workers there are, and what each of them gets."""


def run_workers(
    work: Callable[[dict[str, Any]], None],
    arguments: Mapping[str, Any],
    *,
    run: Run,
    date: str,
    settings: WorkerSettings,
) -> None:
    """Run `work(arguments)` on every worker, until all have returned.

    Args:
        work: gets `arguments` as one dictionary; `ray.train.get_context()` tells its rank.
        arguments: the same for every worker.
        run: whose artifact they compute.
        date: of the night.
        settings: section `training` or `quantizer`.

    Raises:
        TigerError: what a worker raised, as itself and at once; or, of any other cause, after so many
            restarts as the settings allow.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    # Ray Train would log each printed line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    resources = {"CPU": 0.0 if settings.use_gpu else settings.cpus_per_worker, "GPU": float(settings.use_gpu)}

    class EndAtTigerError(ray.train.UserCallback):  # type: ignore[misc]
        """An error of ours would come again, for every restart does the same."""

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, TigerError):
                    logging.disable()
                    raise error  # Ray Train restarts after errors of workers, but not of callbacks

    # Ray Train ends a run for good where its own storage refuses a write for a second, so it gets a folder of
    # the driver's, and what must last is written by `Run`.
    with tempfile.TemporaryDirectory(prefix="tiger-ray-") as folder:
        trainer = TorchTrainer(
            partial(_work, work),
            train_loop_config={**arguments, "run": run},
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.num_workers, use_gpu=settings.use_gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=f"{date}-{run.fingerprint[:16]}",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                callbacks=[EndAtTigerError()],
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            cause = getattr(error, "controller_failure", None)
            if isinstance(cause, TigerError):
                raise cause from None
            raise TigerError(
                f"{run.artifact} ended, after {settings.max_failures} restarts at most: {error}"
            ) from error


def _work(work: Callable[[dict[str, Any]], None], arguments: dict[str, Any]) -> None:
    try:
        work(arguments)
    except TigerError:
        logging.disable()  # the job says it once, without a traceback
        raise


def this_worker(cpus_per_worker: float) -> tuple[int, int, Any]:
    """Rank, number of workers and device of the worker that calls; sets its number of CPU threads."""
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(cpus_per_worker)))
    return context.get_world_rank(), context.get_world_size(), device
