"""Nights as real processes on real Ray nodes: start, kill, look at what is left behind."""

import json
import multiprocessing
import os
import runpy
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError
from urllib.request import urlopen

import ray

from tiger_ray.artifacts.faults import CRASH_VARIABLE
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.stages.night import STAGE_NAMES

REPOSITORY = Path(__file__).parents[1]
DATE = "2026-11-25"
TIMEOUT_S = 240.0
ARTIFACTS = STAGE_NAMES

# Small, but with many decoder calls per user shard, so that a kill can come between two shards.
SETTINGS = """
catalog:
  uri: "{data}/catalog"
  text: [title, brand, category]
  num_shards: 4
events:
  uri: "{data}/events"
embeddings:
  dim: 64
quantizer:
  level_sizes: [8, 8, 8]
  num_iterations: 10
sequences:
  num_shards: 4
model:
  num_layers: 2
  d_model: 32
  num_heads: 2
  d_kv: 16
  d_ff: 64
  dropout: 0.0
training:
  num_steps: 40
  global_batch_size: 64
  warmup_steps: 5
  checkpoint_every_steps: 10
  log_every_steps: 10
  precision: fp32
decoding:
  batch_tokens: 400
evaluation:
  min_ratio_to_popularity: 0.0   # 40 steps beat nobody
"""

_T = TypeVar("_T")

# A driver spends most of its CPU time on imports. Forked from a server that has done them, it is otherwise a
# process like any other, with a pid and a death of its own.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *(
            f"tiger_ray.stages.{name}"
            for name in ("catalog", "events", "embeddings", "semantic_ids", "sequences")
        ),
        *(
            f"tiger_ray.{name}"
            for name in ("stages.model", "stages.recommendations", "report.tables", "cli.job")
        ),
        *("ray.data", "ray.train.torch", "ray.util.state"),
    ]
)


class Night:
    """One run of `jobs/nightly.py`, or of another job, in a process of its own."""

    def __init__(
        self,
        settings: Path,
        root: str | Path,
        *words: str,
        address: str,
        crash_at: str | None = None,
        job: str = "nightly",
    ) -> None:
        self._log = settings.with_name(f"night-{time.monotonic_ns()}.log")
        argv = [f"jobs/{job}.py", "--config", str(settings), "--date", DATE, "--storage.root", str(root)]
        environment = {"RAY_ADDRESS": address} | ({CRASH_VARIABLE: crash_at} if crash_at else {})
        self.process: ForkServerProcess = _context.Process(
            target=_run_job, args=([*argv, *words], environment, str(self._log))
        )
        self.process.start()

    @property
    def output(self) -> str:
        """What it has printed so far, its workers' lines among them."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code, -9 after SIGKILL; it is killed when the time is up."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"the night did not end within {timeout_s:g} s:\n{self.output[-4000:]}")
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, and nothing else."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10.0)

    def succeed(self) -> str:
        """Wait for exit code 0; returns the output."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.output[-4000:]}"
        return self.output

    def die(self) -> str:
        """Wait for the death by the crash point; returns the output."""
        code = self.wait()
        assert code == -signal.SIGKILL, f"not killed, exit code {code}:\n{self.output[-4000:]}"
        return self.output


def _run_job(argv: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Body of a driver process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # pytest may have replaced the streams in the server.
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    sys.argv = list(argv)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        ray.shutdown()
        sys.stdout.flush()


def until(condition: Callable[[], _T | None], what: str, timeout_s: float = TIMEOUT_S) -> _T:
    """Poll until the condition gives something; AssertionError names what never happened."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {timeout_s:g} s")


def published(root: str | Path) -> dict[str, Manifest]:
    """What a night published, by artifact; all of them must be there."""
    storage = Storage(str(root))
    return {artifact: storage.resolve(artifact, DATE) for artifact in ARTIFACTS}


def contents(manifest: Manifest) -> dict[str, str]:
    """SHA-256 by file name."""
    return {entry.name: entry.sha256 for entry in manifest.files}


_ports: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, none of them given before: one node asks several times."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as each:
            each.bind(("127.0.0.1", 0))
            port = each.getsockname()[1]
        if port not in _ports:
            _ports.add(port)
            found.append(port)
    return found


@contextmanager
def ray_node(
    folder: Path,
    *words: str,
    hidden: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """`ray start --block` with ports of its own; every process of it is gone afterwards.

    Args:
        folder: its temporary and working directory; short, for a Unix socket's name has 107 characters at most.
        words: command line of `ray start`.
        hidden: folders that are empty for every process of this node.
        environment: further variables of every process of this node.
    """
    agent, grpc, runtime_env, metrics, objects, manager = free_ports(6)
    empty = folder / "empty"
    empty.mkdir()
    mounts = "".join(
        f"mount --bind {shlex.quote(str(empty))} {shlex.quote(str(each))} && " for each in hidden
    )
    command = [
        *((*private_mounts(), "sh", "-c", f'{mounts}exec "$@"', "sh") if hidden else ()),
        *(str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--min-worker-port", "0", "--max-worker-port", "0"),
        *("--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(grpc)),
        *("--runtime-env-agent-port", str(runtime_env), "--metrics-export-port", str(metrics)),
        *("--object-manager-port", str(objects), "--node-manager-port", str(manager)),
        *("--object-store-memory", str(200 * 2**20), "--temp-dir", str(folder), *words),
    ]
    mark = f"TIGER_RAY_TEST_NODE={secrets.token_hex(8)}"
    variables = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        **dict([mark.split("=")]),
        **(environment or {}),
    }
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        # Workers have process groups of their own; what they all share is the variable.
        for pid in _pids_with_environment(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10.0)


def private_mounts() -> tuple[str, ...]:
    """Command that gives a process mounts of its own; empty if this machine does not allow it."""
    for command in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        if (
            shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True).returncode == 0
        ):
            return command
    return ()


def _pids_with_environment(assignment: str) -> list[int]:
    """Processes that inherited this variable, so those of one node and no others."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if assignment.encode() in variables:
                found.append(int(folder.name))
    return found


def wait_for_orphans(address: str) -> None:
    """Until no actor scores users any more on the cluster: those of a killed driver live on for a moment."""
    until(lambda: not actors(address, "_ShardActor"), "the end of a killed driver's actors")


def actors(address: str, name: str) -> list[int]:
    """Processes of the actors of this class on the cluster."""

    def is_one(pid: int) -> bool:
        try:
            return name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    return list(filter(is_one, _pids_with_environment(f"RAY_ADDRESS={address}")))


def wait_for_nodes(dashboard: str, count: int, folders: Sequence[Path]) -> None:
    """Until so many nodes are alive and the dashboard answers; otherwise shows the nodes' logs."""

    def alive() -> bool:
        try:
            with urlopen(f"{dashboard}/nodes?view=summary", timeout=5.0) as answer:
                nodes = json.load(answer)["data"]["summary"]
        except (URLError, OSError, ValueError, KeyError):
            return False
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes) == count

    try:
        until(alive, f"{count} nodes at {dashboard}", 120.0)
    except AssertionError as error:
        logs = [(folder / "ray.log").read_text(errors="replace")[-3000:] for folder in folders]
        raise AssertionError("\n".join([str(error), *logs])) from None
