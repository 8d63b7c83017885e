"""Workers that compute one thing together, each with a rank, under Ray Train: how anything is trained.

`torch.distributed` is set up among them (NCCL on GPUs, gloo on CPUs). When a worker dies, all are started
again, and find the last checkpoint if there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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
        run: checkpoints go to its folder `ray_train`.
        date: of the night; a job restarted for the same night and run finds its checkpoints.
        settings: section `training` or `quantizer`.

    Raises:
        TigerError: what a worker raised, as itself; or one that says how many failures there were.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    # Ray Train would log each printed line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    resources = {"CPU": 0.0 if settings.use_gpu else settings.cpus_per_worker, "GPU": float(settings.use_gpu)}
    trainer = TorchTrainer(
        work,
        train_loop_config={**arguments, "run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers, use_gpu=settings.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # A run of this name on this storage is resumed silently, so the name is the night's own.
            name=f"{date}-{run.fingerprint[:16]}",
            storage_path=run.folder_uri("ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, TigerError):
                raise cause from None
        raise TigerError(
            f"{run.artifact} ended after {settings.max_failures + 1} failures: {error}"
        ) from error


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
