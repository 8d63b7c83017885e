"""One stage of a night as a value, and the one function that runs any stage: skip, reuse, or compute and publish.

A stage has a key: the version of its format, its settings, the digests of its inputs, and a source where the
inputs and settings do not decide everything. `fingerprint` of the key names the result. The same fingerprint
is published for this date: skipped. It is complete under another date: reused, that is published again without
computing. Otherwise the stage computes the files of a new run.

The key needs no Ray, makes no claim and computes nothing, so that a plan can ask for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

from tiger_ray.artifacts.faults import crash_point
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import Published, check_metadata
from tiger_ray.artifacts.record import Record, differences, key_summary, read_record, write_record
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.connect import connect, require_room
from tiger_ray.cluster.usage import Usage, measure_usage
from tiger_ray.core.hashing import fingerprint
from tiger_ray.errors import PublishError
from tiger_ray.settings.base import Section
from tiger_ray.settings.settings import Settings

log = logging.getLogger(__name__)

Computed = tuple[Sequence[FileEntry], Mapping[str, Any]]
"""Files of a run, and the deterministic facts about the files for the manifest; `summary` is the fact for people."""

Status = Literal["computed", "reused", "skipped"]


@dataclass(frozen=True)
class Context:
    """Everything that a stage may read.

    Args:
        settings: of the whole night.
        storage: where artifacts live.
        inputs: manifest of each input, by the name of its artifact.
        source: what decides the result besides settings and inputs, from `Stage.source`; `compute` reads this copy.
    """

    settings: Settings
    storage: Storage
    inputs: Mapping[str, Manifest] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage of the night: what it reads, what decides its result, and how to compute it.

    >>> from tiger_ray.stages.catalog import STAGE
    >>> STAGE.name, STAGE.inputs, STAGE.sections
    ('catalog', (), ('catalog',))
    """

    name: str
    """Also the name of the artifact."""
    does: str
    """The work of the stage in a few words, for plan and docs."""
    inputs: tuple[str, ...]
    """Artifacts that the stage reads."""
    sections: tuple[str, ...]
    """Settings that decide the result."""
    compute: Callable[[Run, Context], Computed]
    """Writes the files into the run; called at most once."""
    format_version: int = 1
    """Raise the number when the stage writes something else for the same key, so that no night reuses files of the old
    format."""
    keyed_inputs: Callable[[Context], Mapping[str, Manifest]] = lambda context: context.inputs
    """The manifests whose digests are in the key."""
    source: Callable[[Context], Mapping[str, Any]] = lambda context: {}
    """What decides the result besides settings and inputs, for example the pinned input files."""
    draws: Callable[[Settings], bool] = lambda settings: False
    """True if the result depends on `seed`."""
    check: Callable[[Context], None] = lambda context: None
    """Raises an error for a night that the stage must refuse, from settings and manifests alone."""
    gate: Callable[[Context], None] = lambda context: None
    """Raises an error where a night must not go on to this stage, from what its earlier stages published."""
    left_out: Callable[[Settings], str | None] = lambda settings: None
    """Why a night with these settings leaves the stage out; None if the night has the stage."""


@dataclass(frozen=True)
class Key:
    """Everything that decides the result of a stage, as JSON values."""

    parts: Mapping[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that names the result."""
        return fingerprint(self.parts)


def key_of(stage: Stage, context: Context) -> tuple[Key, Context]:
    """The key of a stage, and the context with `source` that `compute` gets; computes and claims nothing.

    Raises:
        TigerError: the stage refuses these settings and inputs, see `Stage.check`.
    """
    stage.check(context)
    context = replace(context, source=stage.source(context))
    parts = {
        "artifact": stage.name,
        "format_version": stage.format_version,
        "seed": context.settings.seed if stage.draws(context.settings) else None,
        "settings": {name: section.fingerprint() for name, section in sections_of(stage, context).items()},
        "inputs": {name: manifest.digest for name, manifest in stage.keyed_inputs(context).items()},
        "source": dict(context.source),
    }
    return Key(parts), context


def sections_of(stage: Stage, context: Context) -> dict[str, Section]:
    """The settings that decide the result of a stage, by the name of the section."""
    return {name: getattr(context.settings, name) for name in stage.sections}


@dataclass(frozen=True)
class StageResult:
    """The published artifact of a stage, and what the stage had to do: compute, reuse or skip."""

    manifest: Manifest
    status: Status
    seconds: float
    where: str
    why: tuple[str, ...] = ()
    """What differs from the last run of the stage."""

    def line(self) -> str:
        """One line for people: artifact, seconds, summary, where the artifact lies."""
        notes = {
            "computed": "",
            "reused": "  (reused: same inputs and settings as an earlier night)",
            "skipped": "  (skipped: already published)",
        }
        facts = Published.of(self.manifest).summary
        return (
            f"{self.manifest.artifact:<16}{self.seconds:>7.1f} s  {facts}  {self.where}{notes[self.status]}"
        )


def run_stage(stage: Stage, settings: Settings, storage: Storage, **inputs: Manifest) -> StageResult:
    """Publish the artifact of a stage for `settings.date`, and compute it only if no complete run has its key.

    Args:
        stage: what to run.
        settings: of the whole night; the manifest holds all of them.
        storage: where artifacts live.
        inputs: manifest of each input, by the name of its artifact.

    Raises:
        PublishError: the date holds this artifact made from other inputs or settings.
        SettingsError: the local cluster has no room for the workers of a section.
        ArtifactError: the stage returned metadata that is not that of its artifact.
        TigerError: whatever the stage refuses or fails with.
    """
    started, began_at = time.monotonic(), datetime.now(UTC)
    key, context = key_of(stage, Context(settings, storage, inputs))
    name, date = stage.name, settings.date
    where = storage.uri(f"{name}/date={date}")

    def result(manifest: Manifest, status: Status, usage: Usage | None = None) -> StageResult:
        crash_point(f"{name}.done")
        seconds = time.monotonic() - started
        why: tuple[str, ...] = ()
        if status != "skipped":
            why = _why(last, key, status)
            record = Record.of(
                manifest, status, began_at=began_at, seconds=seconds, why=why, key=key_summary(key.parts)
            )
            write_record(storage, record.with_usage(usage) if usage else record)
        done = StageResult(manifest, status, seconds, where, why)
        log.info("%s", done.line())
        return done

    crash_point(f"{name}.begin")
    published = storage.published(name, date)
    if published is not None and published.fingerprint == key.fingerprint and not settings.storage.replace:
        # Publish again only to move `latest.json`: a night killed right here had not moved the file.
        return result(storage.publish_again(published, date=date), "skipped")
    if published is not None and not settings.storage.replace:
        raise refusal(where, published, key, settings)
    last = read_record(storage, name)
    complete = storage.completed(name, key.fingerprint)
    if complete is not None:
        manifest = storage.publish_again(complete, date=date, replace=settings.storage.replace)
        return result(manifest, "reused")
    run = storage.begin(name, key.fingerprint)
    connect(settings.ray)
    require_room(settings.ray, sections_of(stage, context))
    log.debug("%s: computing, run %s", name, run.run_id)
    with measure_usage() as usage:
        files, metadata = stage.compute(run, context)
    manifest = storage.publish(
        run,
        date=date,
        files=files,
        settings=settings.resolved(),
        inputs=dict(key.parts["inputs"]),
        metadata=check_metadata(name, metadata),
        replace=settings.storage.replace,
    )
    return result(manifest, "computed", usage)


def _why(last: Record | None, key: Key, status: Status) -> tuple[str, ...]:
    """What differs from the last night, in words."""
    if last is None:
        return ("no earlier night",)
    found = differences(last, key.parts)
    if found:
        return tuple(found)
    return (f"same as {last.date}",) if status == "reused" else (f"files of {last.date} are gone or damaged",)


def refusal(where: str, published: Manifest, key: Key, settings: Settings) -> PublishError:
    """The error for a date that holds the artifact, made from other inputs or settings.

    Args:
        where: address of the artifact.
        published: manifest that the date holds.
        key: of tonight.
        settings: of tonight.
    """
    return PublishError(
        f"{where} was published from other inputs or settings ({_difference(published, key, settings)}). "
        "It stays as it is; pass --storage.replace true to replace it, or another --date."
    )


def _difference(published: Manifest, key: Key, settings: Settings) -> str:
    """The first few things that differ between a published manifest and tonight."""
    digests: Mapping[str, str] = key.parts["inputs"]
    found = [f"other {name}" for name, digest in digests.items() if published.inputs.get(name) != digest]
    for section, values in settings.resolved().items():
        before = published.settings.get(section)
        if isinstance(values, dict) and isinstance(before, dict):
            changed = [k for k, v in values.items() if before.get(k) != v]
            found += [
                f"{section}.{k} {before.get(k)!r} -> {values[k]!r}" for k in changed if section != "storage"
            ]
        elif section != "date" and before != values:
            found.append(f"{section} {before!r} -> {values!r}")
    return "; ".join(found[:5]) or "other input files or format version"
