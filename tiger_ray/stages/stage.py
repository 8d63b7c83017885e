"""One stage of a night: skip it, reuse it, or compute and publish it.

A stage is fingerprinted by its settings, the content of its inputs and the version of its format. The
same fingerprint was already published for this date: skipped. It is complete under another date: reused,
that is published again without computing. Otherwise `compute` writes the files of a new run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tiger_ray.artifacts.faults import crash_point
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.connect import connect, require_room
from tiger_ray.core.hashing import fingerprint
from tiger_ray.errors import PublishError
from tiger_ray.settings.base import Section
from tiger_ray.settings.settings import Settings

log = logging.getLogger(__name__)


FORMAT_VERSIONS = {
    "catalog": 2,
    "events": 1,
    "embeddings": 3,
    "quantizer": 2,
    "semantic_ids": 2,
    "sequences": 3,
    "model": 1,
    "evaluation": 4,
    "recommendations": 2,
}
"""Artifacts in the order of the night. Raise a number when a stage starts to write something else for
the same input, so that what older code published is not taken for it."""


Status = Literal["computed", "reused", "skipped"]


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind, and whether it had to work for it."""

    manifest: Manifest
    status: Status
    seconds: float
    where: str

    def line(self) -> str:
        """One line for people: artifact, rows, seconds, where it lies."""
        notes = {
            "computed": "",
            "reused": "  (reused: same inputs and settings as an earlier night)",
            "skipped": "  (skipped: already published)",
        }
        facts = self.manifest.metadata["summary"]
        return (
            f"{self.manifest.artifact:<16}{self.seconds:>7.1f} s  {facts}  {self.where}{notes[self.status]}"
        )


Computed = tuple[Sequence[FileEntry], Mapping[str, Any]]
"""Files of a run, and the deterministic facts about them for the manifest; `summary` is the one for people."""


def run_stage(
    storage: Storage,
    settings: Settings,
    artifact: str,
    *,
    inputs: Mapping[str, Manifest],
    sections: Mapping[str, Section],
    compute: Callable[[Run], Computed],
    source: Mapping[str, Any] | None = None,
    kind: str | None = None,
    draws: bool = False,
) -> StageResult:
    """Publish `artifact` for `settings.date`, computing it only if no complete run has its fingerprint.

    Args:
        storage: where artifacts live.
        settings: of the whole night; written into the manifest, all of them.
        artifact: its name.
        inputs: manifests this stage reads, by a name of its own choice.
        sections: the settings that decide the result.
        compute: writes files into the run it is given; called at most once.
        source: what else decides the result, for example the pinned input files.
        kind: key of `FORMAT_VERSIONS`; None: the name of the artifact.
        draws: does the result follow from `seed` too?

    Raises:
        PublishError: the date holds this artifact made from other inputs or settings.
        SettingsError: the local cluster has no room for the workers of a section.
    """
    started = time.monotonic()
    digests = {name: manifest.digest for name, manifest in inputs.items()}
    key = fingerprint(
        {
            "artifact": artifact,
            "format_version": FORMAT_VERSIONS[kind or artifact],
            "seed": settings.seed if draws else None,
            "settings": {name: section.fingerprint() for name, section in sections.items()},
            "inputs": digests,
            "source": dict(source or {}),
        }
    )
    where = storage.uri(f"{artifact}/date={settings.date}")

    def result(manifest: Manifest, status: Status) -> StageResult:
        crash_point(f"{artifact}.done")
        done = StageResult(manifest, status, time.monotonic() - started, where)
        print(done.line(), flush=True)
        return done

    crash_point(f"{artifact}.begin")
    published = storage.published(artifact, settings.date)
    if published is not None and published.fingerprint == key and not settings.storage.replace:
        # Publishing again is a no-op but for `latest.json`, which a night killed right here had not moved.
        return result(storage.publish_again(published, date=settings.date), "skipped")
    if published is not None and not settings.storage.replace:
        raise PublishError(
            f"{where} was published from other inputs or settings ({_difference(published, digests, settings)}). "
            "It stays as it is; pass --storage.replace true to replace it, or another --date."
        )
    complete = storage.completed(artifact, key)
    if complete is not None:
        manifest = storage.publish_again(complete, date=settings.date, replace=settings.storage.replace)
        return result(manifest, "reused")
    run = storage.begin(artifact, key)
    connect(settings.ray)
    require_room(settings.ray, sections)
    log.info("%s: computing, run %s", artifact, run.run_id)
    files, metadata = compute(run)
    manifest = storage.publish(
        run,
        date=settings.date,
        files=files,
        settings=settings.resolved(),
        inputs=digests,
        metadata=dict(metadata),
        replace=settings.storage.replace,
    )
    return result(manifest, "computed")


def _difference(published: Manifest, digests: Mapping[str, str], settings: Settings) -> str:
    """The first few things that differ between a published manifest and tonight."""
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
