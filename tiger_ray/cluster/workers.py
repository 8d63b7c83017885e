"""Workers that compute one thing together, each with a rank: quantizers and models are trained this way.

One worker is a plain Ray task. Several workers run under Ray Train, which connects them by `torch.distributed`
(NCCL on GPUs, gloo on CPUs). When a worker dies, all start again and go on from their checkpoint on storage, if the
work writes one.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayError

from tiger_ray.artifacts.run import Run
from tiger_ray.cluster.progress import progress_bar
from tiger_ray.cluster.shards import plain_errors
from tiger_ray.cluster.usage import forget_peak, note_usage, usage_report
from tiger_ray.core.logs import show_logs
from tiger_ray.errors import TigerError
from tiger_ray.settings.base import WorkerGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """One of the workers."""

    rank: int
    world_size: int
    device: Any
    """torch.device of its tensors."""

    @property
    def is_first(self) -> bool:
        """True if this worker logs and writes for all workers."""
        return self.rank == 0


USAGE_FOLDER = "usage"
"""Folder of the run with one report per worker of Ray Train on its peak memory."""

Work = Callable[[dict[str, Any], Worker], None]
"""Called on each worker with the arguments, which are the same for all workers, and with the worker itself."""


def run_workers(
    work: Work, arguments: Mapping[str, Any], *, run: Run, date: str, settings: WorkerGroup
) -> None:
    """Run `work` on every worker, until all have returned.

    Args:
        work: function that each worker calls.
        arguments: arguments of `work`, the same for every worker. `run` is added, and `bar` for the log of the training.
        run: run of the artifact that the workers compute.
        date: date of the night, in the name of the run of Ray Train.
        settings: section `training` or `quantizer`.

    Raises:
        TigerError: a worker raised it; it is raised again at once. Any other error restarts the workers, and becomes
            a TigerError after `max_failures` restarts.
    """
    with progress_bar(run.artifact, getattr(settings, "num_steps", None)) as bar:
        arguments = {**arguments, "run": run, "bar": bar}
        if settings.num_workers == 1:
            _run_alone(work, arguments, run, settings)
        else:
            _run_together(work, arguments, run, date, settings)


def _run_alone(work: Work, arguments: Mapping[str, Any], run: Run, settings: WorkerGroup) -> None:
    """Run one worker as a plain task: it needs no process group, and not the five actors of Ray Train."""
    cpus, gpus = _resources(settings)
    task = ray.remote(_alone).options(name=run.artifact, num_cpus=cpus, num_gpus=gpus, max_retries=0)
    for failures in count(1):
        try:
            with plain_errors():
                note_usage(ray.get(task.remote(work, arguments, settings.cpus_per_worker)))
            return
        except RayError as error:
            if failures > settings.max_failures:
                raise _given_up(run, settings, error) from error
            log.warning("%s: the worker failed and is started again. %s", run.artifact, error)


def _alone(work: Work, arguments: dict[str, Any], cpus_per_worker: float) -> str:
    import torch

    device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
    return _work(work, arguments, Worker(0, 1, device), cpus_per_worker)


def _resources(settings: WorkerGroup) -> tuple[float, int]:
    """CPUs and GPUs of a worker."""
    return (0, 1) if settings.use_gpu else (settings.cpus_per_worker, 0)


def _given_up(run: Run, settings: WorkerGroup, error: Exception) -> TigerError:
    section = "quantizer" if run.artifact == "quantizer" else "training"
    return TigerError(
        f"{run.artifact} failed {settings.max_failures + 1} times at most and is given up "
        f"({section}.max_failures is {settings.max_failures}); last error: {error}"
    )


def _run_together(
    work: Work, arguments: Mapping[str, Any], run: Run, date: str, settings: WorkerGroup
) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    # Otherwise Ray Train logs each printed line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # Turn off the preemption watcher; our workers do not handle its notice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    cpus, gpus = _resources(settings)

    class EndAtTigerError(ray.train.UserCallback):  # type: ignore[misc]
        """Ends the run at a TigerError: a restart would raise the same error again."""

        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, TigerError):
                    silence_ray_train()
                    raise error  # Ray Train restarts after errors of workers, but not after errors of callbacks.

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Leave Ctrl-C to the job: Ray's handler would swallow it, in later stages too, and exit with code 0."""

    # Ray Train ends the run as soon as its own storage refuses one write. So its storage is a folder of the driver,
    # and `Run` writes the checkpoints.
    with tempfile.TemporaryDirectory(prefix="tiger-ray-") as folder:
        trainer = Trainer(
            partial(_together, work, settings.cpus_per_worker),
            train_loop_config=dict(arguments),
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.num_workers,
                use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": float(cpus), "GPU": float(gpus)},
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
            for rank in range(settings.num_workers):
                report = run.read_beside(USAGE_FOLDER, f"worker-{rank}")
                if report is not None:
                    note_usage(report.decode())
        except ray.train.TrainingFailedError as error:
            cause = getattr(error, "controller_failure", None)
            if isinstance(cause, TigerError):
                raise cause from None
            raise _given_up(run, settings, error) from error


def _together(work: Work, cpus_per_worker: float, arguments: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    try:
        report = _work(work, arguments, worker, cpus_per_worker)
        arguments["run"].write_beside(USAGE_FOLDER, {f"worker-{worker.rank}": report.encode()})
    except TigerError:
        silence_ray_train()
        raise


def silence_ray_train() -> None:
    """Stop the log of Ray Train in this process: the job reports an error of ours once, without a traceback."""
    logging.getLogger("ray.train").setLevel(logging.CRITICAL + 1)


def _work(work: Work, arguments: dict[str, Any], worker: Worker, cpus_per_worker: float) -> str:
    """Do the work; returns the `usage_report` of this worker."""
    import torch

    show_logs(with_time=False)
    forget_peak()
    if worker.device.type == "cpu":
        torch.set_num_threads(max(1, int(cpus_per_worker)))
    work(arguments, worker)
    return usage_report()
