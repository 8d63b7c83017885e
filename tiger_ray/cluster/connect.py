"""The Ray cluster of a job; a job joins the cluster when the first stage has work to do."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping

from tiger_ray.errors import SettingsError, TigerError
from tiger_ray.settings.base import Section, Workers
from tiger_ray.settings.ray import RaySettings

IDLE_VARIABLE = "RAY_idle_worker_killing_time_threshold_ms"
"""Variable of Ray: how long Ray keeps an idle process, by default one second. At that default nearly every step of a
night starts new processes, and the imports of each cost two to four seconds of CPU time."""


IDLE_MS = 60_000


def connect(settings: RaySettings) -> None:
    """Join the cluster of `ray job submit` if there is one, or of `ray.address`, or start a local one.

    In a process that is connected already, free the resources that failed stages still hold. Set up Ray Data in
    any case.

    Raises:
        TigerError: no cluster answers at the address.
    """
    import ray

    if not ray.is_initialized():
        if not sys.stdout.isatty():  # Ray colours the lines of its workers in a log file, too
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        address, num_cpus = settings.address, None
        if is_local(settings):
            address, num_cpus = "local", settings.num_cpus
            os.environ.setdefault(IDLE_VARIABLE, str(IDLE_MS))
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, num_cpus=num_cpus, logging_level=logging.WARNING)
        except ConnectionError as error:
            where = settings.address or os.environ.get("RAY_ADDRESS", address)
            raise TigerError(
                f"no Ray cluster answers at {where}: {error}. Start it, or correct ray.address (RAY_ADDRESS)"
            ) from None
        except RuntimeError as error:
            if "ersion mismatch" not in str(error):
                raise
            raise TigerError(
                f"the Ray cluster at {settings.address or os.environ.get('RAY_ADDRESS')} runs other versions than this process "
                f"(Ray {ray.__version__}): {' '.join(str(error).split())}. Install the cluster's versions here, or these there"
            ) from None
        # Ray's own handler would end the process with another exit code than that of the job.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    else:
        free, whole = ray.available_resources(), ray.cluster_resources()
        if any(free.get(kind, 0) < whole.get(kind, 0) for kind in ("CPU", "GPU")):
            # Actors of a failed dataset hold them until Python collects the error, which may take minutes.
            gc.collect()
    context = ray.data.DataContext.get_current()
    shown = sys.stderr.isatty() if settings.progress == "auto" else settings.progress == "on"
    context.enable_progress_bars = shown
    context.print_on_execution_start = False
    # By default a keyed shuffle collects a gigabyte in one process before it starts.
    context.shuffle_input_batch_bytes = 32 << 20
    # The newer Parquet reader starts an actor per footer, up to 32 per read, for work of milliseconds.
    context.use_datasource_v2 = False
    # A spot node may die while an actor loads its weights.
    context.max_consecutive_actor_init_deaths = 3
    # Otherwise Ray Data wraps a TigerError in an error that reaches the driver without its cause.
    context.raise_original_map_exception = True
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # These loggers print a traceback and call an unwrapped error a bug in Ray; the exception has the whole message.
    for name in ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def require_room(ray_settings: RaySettings, sections: Mapping[str, Section]) -> None:
    """Refuse workers that do not fit into a local cluster, which cannot grow: Ray would wait forever.

    Args:
        ray_settings: tell whether the cluster is local; any other cluster may grow.
        sections: sections of the settings by name; those without workers are ignored.

    Raises:
        SettingsError: names the section, the resources that it asks for and those of the cluster.
    """
    import ray

    if is_local(ray_settings):
        require_resources(ray.cluster_resources(), sections)


def require_resources(whole: Mapping[str, float], sections: Mapping[str, Section]) -> None:
    """Refuse workers for which these resources do not suffice.

    Args:
        whole: CPUs under `CPU` and GPUs under `GPU`.
        sections: settings by the name of the section; sections without workers are passed over.

    Raises:
        SettingsError: names the section and both numbers.
    """
    for name, section in sections.items():
        if isinstance(section, Workers):
            # Actors of a pool may start one by one; workers that compute together must all fit at once.
            count = section.num_workers if section.starts_together else 1
            kind, each = ("GPU", 1) if section.use_gpu else ("CPU", section.cpus_per_worker)
            if count * each > whole.get(kind, 0):
                raise SettingsError(
                    f"{name}.{'use_gpu' if section.use_gpu else 'cpus_per_worker'} and {name}.num_workers ask for "
                    f"{count * each:g} {kind} at once, and this machine's Ray has {whole.get(kind, 0):g}; lower them, "
                    "or run the job on a cluster (ray job submit, ray.address)"
                )


def is_local(settings: RaySettings) -> bool:
    """True if the job starts its own cluster on this machine."""
    return (settings.address or os.environ.get("RAY_ADDRESS", "local")) == "local"
