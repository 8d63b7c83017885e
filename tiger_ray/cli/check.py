"""`tiger-ray check`: check everything that a night needs before the night; one line per check, with cause and remedy.

Independent checks run at the same time, and a failed check does not stop the others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tiger_ray.artifacts.opening import open_store
from tiger_ray.artifacts.storage import Storage
from tiger_ray.artifacts.store import InputFile, parse_uri, persist
from tiger_ray.cli.tables import readable_bytes, show_table
from tiger_ray.cluster.connect import is_local, require_resources
from tiger_ray.cluster.nodes import Cluster, ask_nodes, driver_node, require_one_version
from tiger_ray.data import catalog, events
from tiger_ray.data.inputs import id_type, list_inputs, read_input_schema
from tiger_ray.data.survey import Surveyed, survey_catalog, survey_events
from tiger_ray.errors import SettingsError, StorageError, TigerError
from tiger_ray.ids import encoders
from tiger_ray.settings.loading import load_settings
from tiger_ray.settings.ray import RaySettings
from tiger_ray.settings.settings import Settings

DEADLINE_S = 25.0
"""Seconds after which a check without an answer has failed; the data checks may take longer."""

PROBE_TIMEOUT_S, PROBE_DEADLINE_S = 3.0, 6.0
"""Seconds for one try, and for all tries, of the first request to the store of an input."""

REFUSED_OFFSET_S = 900.0
"""S3 refuses requests that were signed more than 15 minutes before or after its own time."""

WARNED_OFFSET_S = 60.0
"""Seconds between two clocks above which the check warns."""

FULL_BYTES = 100 * 10**6
"""Free bytes below which a disk counts as full."""

ROOM_PER_INPUT_BYTE, ROOM_BYTES = 4, 10**9
"""Free bytes that a night should find: for each byte of the input, for items, vectors, histories and lists; and for the
checkpoints of models."""

SPILL_SHARE = 0.05
"""Ray writes no objects to a disk of which less than this share is free."""

SILENT = {
    "ray": "start the cluster, or correct ray.address (RAY_ADDRESS)",
    "": "the store or the disk is overloaded or out of reach: look at both, then check again",
}
"""Remedy for a check without an answer, by name of the check; the empty name is for all others."""

Status = Literal["ok", "warn", "FAILED", "not checked"]


@dataclass(frozen=True)
class Line:
    """The result of one check."""

    status: Status
    text: str
    seconds: float = 0.0
    exit_code: int = 0


class Doubt(Exception):
    """The night can start, but a person should know the message."""


class NotChecked(Exception):
    """The check needs the result of an earlier check that failed."""


@dataclass(frozen=True)
class Surroundings:
    """Clock, disks, cluster and GPUs around the program; tests replace them."""

    now: Callable[[], float] = time.time
    """Seconds since 1970 by the clock of this machine."""
    disk: Callable[[str], tuple[int, int]] = field(
        default=lambda path: (shutil.disk_usage(path).free, shutil.disk_usage(path).total)
    )
    """Free bytes and size in bytes of the disk that holds a path."""
    nodes: Callable[[RaySettings], Cluster] = ask_nodes
    """The running cluster that the settings name."""
    gpus: Callable[[], int] = field(default=lambda: _count_gpus())
    """GPUs of this machine."""


@dataclass
class _Found:
    """Results of earlier checks that later checks read."""

    input_bytes: int = 0
    catalog_id_type: str | None = None
    files: dict[str, list[InputFile]] = field(default_factory=dict)
    surveyed: Surveyed | None = None
    cluster: Cluster | None = None
    storage_answers: bool = False


def check(
    words: Sequence[str],
    *,
    data: bool = False,
    around: Surroundings | None = None,
    deadline_s: float = DEADLINE_S,
) -> int:
    """Run every check, print the table, and return the exit code of the first check that failed.

    Args:
        words: settings.
        data: also read the rows of the inputs.
        around: clock, disks, cluster and GPUs; None: those of this machine.
        deadline_s: seconds after which a check without an answer has failed; not used with `data`.
    """
    lines = run_checks(words, data=data, around=around, deadline_s=deadline_s)
    show_table(
        "",
        ("check", "", "what was found, and what to do", "seconds"),
        [(name, line.status, line.text, f"{line.seconds:.1f}") for name, line in lines.items()],
        right=("seconds",),
    )
    failed = [name for name, line in lines.items() if line.status == "FAILED"]
    code = next((line.exit_code for line in lines.values() if line.status == "FAILED"), 0)
    if failed:
        print(
            f"{len(failed)} of {len(lines)} checks failed ({', '.join(failed)}); a night would end with exit code {code}"
        )
    else:
        print(f"{len(lines)} checks, none failed: the night can start")
    return code


def run_checks(
    words: Sequence[str],
    *,
    data: bool = False,
    around: Surroundings | None = None,
    deadline_s: float = DEADLINE_S,
) -> dict[str, Line]:
    """The result of every check by its name, in the order in which a night would meet them.

    Args:
        words: settings.
        data: also read the rows of the inputs.
        around: clock, disks, cluster and GPUs; None: those of this machine.
        deadline_s: seconds after which a check without an answer has failed; not used with `data`.
    """
    around = around or Surroundings()
    names = ["settings", "encoder", "storage", "clock", "disk", "catalog", "events", "ray", "workers"]
    names += ["catalog rows", "event rows"] if data else []
    lines: dict[str, Line] = {}
    settings = _read(words, lines)
    if settings is None:
        return lines | {name: Line("not checked", "the settings come first") for name in names[1:]}
    found = _Found()
    chains: list[list[tuple[str, Callable[[], str]]]] = [
        [("encoder", lambda: _encoder(settings))],
        [("storage", lambda: _storage(settings, found)), ("clock", lambda: _clock(settings, found, around))],
        [
            ("catalog", lambda: _catalog(settings, found)),
            ("events", lambda: _events(settings, found)),
            ("disk", lambda: _disk(settings, found, around)),
        ],
        [
            ("ray", lambda: _ray(settings, found, around)),
            ("workers", lambda: _workers(settings, found, around)),
        ],
    ]
    if data:
        chains[2] += [
            ("catalog rows", lambda: _catalog_rows(settings, found)),
            ("event rows", lambda: _event_rows(settings, found)),
        ]
    # Daemon threads, because a store that never answers must not keep the process alive.
    threads = [threading.Thread(target=_run_chain, args=(chain, lines), daemon=True) for chain in chains]
    give_up = time.monotonic() + deadline_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(None if data else max(give_up - time.monotonic(), 0.0))
    done = dict(lines)
    for chain in chains:
        waiting = [name for name, _ in chain if name not in done]
        for name in waiting[:1]:
            text = f"no answer within {deadline_s:g} s; {SILENT.get(name, SILENT[''])}"
            done[name] = Line("FAILED", text, deadline_s, StorageError.exit_code)
        done |= {name: Line("not checked", f"{waiting[0]} did not answer") for name in waiting[1:]}
    return {name: done[name] for name in names}


def _read(words: Sequence[str], lines: dict[str, Line]) -> Settings | None:
    started = time.monotonic()
    try:
        settings = load_settings(words)
    except TigerError as error:
        lines["settings"] = Line("FAILED", _one_line(error), time.monotonic() - started, error.exit_code)
        return None
    lines["settings"] = Line(
        "ok", f"night {settings.date}, root {settings.storage.root}", time.monotonic() - started
    )
    return settings


def _run_chain(chain: Sequence[tuple[str, Callable[[], str]]], lines: dict[str, Line]) -> None:
    for name, run in chain:
        started = time.monotonic()
        status: Status = "ok"
        code = 0
        try:
            text = run()
        except Doubt as doubt:
            status, text = "warn", str(doubt)
        except NotChecked as reason:
            status, text = "not checked", str(reason)
        except TigerError as error:
            status, text, code = "FAILED", _one_line(error), error.exit_code
        except Exception as error:  # one check must not end the others
            status, text, code = "FAILED", f"not foreseen: {type(error).__name__}: {error}", 1
        lines[name] = Line(status, text, time.monotonic() - started, code)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# The checks: each returns a text for the table, or raises


def _encoder(settings: Settings) -> str:
    encoders.check(settings)
    chosen = settings.embeddings
    return (
        chosen.encoder
        if chosen.encoder != "sentence-transformers"
        else f"sentence-transformers, {chosen.model}"
    )


def _storage(settings: Settings, found: _Found) -> str:
    storage = Storage(settings.storage.root)
    storage.check()
    found.storage_answers = True
    return f"{storage.root}: written, read, listed, conditionally written, deleted"


def _clock(settings: Settings, found: _Found, around: Surroundings) -> str:
    if not found.storage_answers:
        raise NotChecked("the storage, whose clock is asked, does not answer")
    offset_s = Storage(settings.storage.root).clock_offset_s(around.now)
    ahead = "ahead of" if offset_s > 0 else "behind"
    said = f"this machine's clock is {abs(offset_s):,.0f} s {ahead} the store's"
    on_s3 = parse_uri(settings.storage.root)[0] == "s3"
    if on_s3 and abs(offset_s) > REFUSED_OFFSET_S:
        raise StorageError(f"{said}; S3 refuses requests that are 15 minutes off. Set the clock right (NTP)")
    if abs(offset_s) > WARNED_OFFSET_S:
        raise Doubt(f"{said}; set the clock right (NTP)")
    return f"within {max(abs(offset_s), 1.0):.0f} s of the store's"


def _disk(settings: Settings, found: _Found, around: Surroundings) -> str:
    wanted = ROOM_PER_INPUT_BYTE * found.input_bytes + ROOM_BYTES
    scheme, root = parse_uri(settings.storage.root)
    said = []
    doubts = []
    if scheme == "local":
        free, _ = around.disk(_existing(root))
        said.append(f"{readable_bytes(free)} free for {root}")
        if free < FULL_BYTES:
            raise StorageError(f"{said[0]}: the disk is full. Free space, or change storage.root")
        if free < wanted:
            doubts.append(
                f"{said[0]}, and a night over {readable_bytes(found.input_bytes)} of input should find {readable_bytes(wanted)}; "
                "free space, or change storage.root"
            )
    if is_local(settings.ray):
        temporary = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
        free, total = around.disk(_existing(temporary))
        said.append(f"{readable_bytes(free)} free for Ray in {temporary}")
        if free < max(FULL_BYTES, SPILL_SHARE * total):
            doubts.append(
                f"{said[-1]}, less than {SPILL_SHARE:.0%} of the disk: Ray writes no objects there. Free space, or set "
                "RAY_TMPDIR to another disk"
            )
    if doubts:
        raise Doubt("; ".join(doubts))
    return "; ".join(said) or "storage and Ray are on other machines"


def _existing(path: str) -> str:
    """The path if it exists, else the nearest existing folder above."""
    place = Path(path).absolute()
    return str(next(each for each in (place, *place.parents) if each.exists()))


def _catalog(settings: Settings, found: _Found) -> str:
    chosen = settings.catalog
    files = _list(chosen.uri, found)
    schema, rows = read_input_schema(files, chosen.uri, catalog.wanted_columns(chosen))
    kind = id_type(schema, chosen.item_id, chosen.uri)
    catalog.require_readable(schema, chosen)
    catalog.vector_type(schema, chosen)
    found.catalog_id_type = str(kind)
    found.files["catalog"] = files
    return f"{rows:,} items in {_size(files)}; ids {kind}"


def _events(settings: Settings, found: _Found) -> str:
    chosen = settings.events
    files = _list(chosen.uri, found)
    schema, rows = read_input_schema(files, chosen.uri, events.wanted_columns(chosen))
    id_type(schema, chosen.user_id, chosen.uri)
    kind = id_type(schema, chosen.item_id, chosen.uri)
    if found.catalog_id_type is not None:
        events.require_same_item_ids(kind, found.catalog_id_type, chosen, rows)
    unit = events.timestamp_unit(schema, chosen)
    events.require_tie(schema, chosen, rows)
    found.files["events"] = files
    return f"{rows:,} events in {_size(files)}; timestamps in {unit}"


def _list(uri: str, found: _Found) -> list[InputFile]:
    scheme, path = parse_uri(uri)
    if scheme == "s3":  # probe first, because a listing retries for a minute
        store = open_store(f"s3://{path}", PROBE_TIMEOUT_S)
        persist(lambda: store.get(".probe"), PROBE_DEADLINE_S)
    files = list_inputs(uri)
    found.input_bytes += sum(file.bytes for file in files)
    return files


def _size(files: Sequence[InputFile]) -> str:
    count = "1 file" if len(files) == 1 else f"{len(files):,} files"
    return f"{count}, {readable_bytes(sum(file.bytes for file in files))}"


def _catalog_rows(settings: Settings, found: _Found) -> str:
    if "catalog" not in found.files:
        raise NotChecked("the catalog does not pass its own check")
    found.surveyed = survey_catalog(found.files["catalog"], settings.catalog)
    return found.surveyed.text


def _event_rows(settings: Settings, found: _Found) -> str:
    if "events" not in found.files:
        raise NotChecked("the events do not pass their own check")
    item_ids = None if found.surveyed is None else found.surveyed.item_ids
    return survey_events(found.files["events"], settings.events, item_ids).text


def _ray(settings: Settings, found: _Found, around: Surroundings) -> str:
    driver = driver_node()
    if is_local(settings.ray):
        return f"Ray {driver.ray}, Python {driver.python}; the job starts a Ray of its own on this machine"
    found.cluster = around.nodes(settings.ray)
    require_one_version(found.cluster, driver)
    return f"{len(found.cluster.nodes)} nodes with Ray {driver.ray}, as here"


def _workers(settings: Settings, found: _Found, around: Surroundings) -> str:
    sections = {name: getattr(settings, name) for name in ("embeddings", "quantizer", "training", "decoding")}
    on_gpu = [name for name, section in sections.items() if section.use_gpu]
    asked = f"GPUs for {', '.join(on_gpu)}" if on_gpu else "no GPU asked for"
    if is_local(settings.ray):
        cpus = settings.ray.num_cpus or os.cpu_count() or 1
        gpus = around.gpus() if on_gpu else 0
        require_resources({"CPU": cpus, "GPU": gpus}, sections)
        return f"{asked}; this machine has {cpus} CPUs" + (f" and {gpus} GPUs" if on_gpu else "")
    if found.cluster is None:
        raise NotChecked("the cluster does not answer")
    has = found.cluster.resources
    try:
        require_resources(has, sections)
    except SettingsError:
        raise Doubt(
            f"the cluster has {_amounts(has)} now, and {asked}. A cluster that grows starts nodes when they are asked for; "
            "on a cluster of fixed size the night would wait for ever: add nodes, or lower num_workers of these sections"
        ) from None
    return f"{asked}; the cluster has {_amounts(has)}"


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
