"""The record of a stage: when and why it ran, how long, with how many workers and how much memory.

`run.json` lies beside the manifest of a date. A record is not published: nothing is computed from a record, and a
night without records is complete. The record of the computation also lies in the folder of the run; a night that
reuses the run copies the cost from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import canonical_json, fingerprint
from tiger_ray.errors import ArtifactError, StorageError

if TYPE_CHECKING:
    from typing import Self

log = logging.getLogger(__name__)

RECORD_FILE = "run.json"

LONG = 200
"""Characters of JSON above which a value of the key is kept as its size and digest."""


class Record(BaseModel):
    """When, why and at what cost one artifact of one night was published.

    >>> known = {"artifact": "catalog", "date": "2026-11-23", "run_id": "5e3f", "began_at": "2026-11-23T01:00:00Z"}
    >>> cost = {"seconds": 4.5, "workers": 2, "peak_memory_bytes": 9_000}
    >>> Record(status="computed", why=("no earlier night",), files=1, rows=7, bytes=90, **known, **cost).cost == cost
    True
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    artifact: str
    date: str
    run_id: str
    status: str
    """`computed` or `reused`."""
    why: tuple[str, ...]
    """What differs from the last night of this artifact."""
    began_at: datetime
    seconds: float
    """Wall-clock time of the stage, publishing included."""
    files: int
    rows: int
    bytes: int
    workers: int = 0
    """Processes that took part and reported their memory; 0 where nothing was computed."""
    peak_memory_bytes: int = 0
    """Largest resident set of one worker process."""
    key: dict[str, Any] = {}
    """Everything that decides the result, with long values as size and digest."""
    computed: dict[str, Any] | None = None
    """For a reused run: seconds, workers and memory of the night that computed it."""

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        status: str,
        *,
        began_at: datetime,
        seconds: float,
        why: Sequence[str],
        key: Mapping[str, Any],
    ) -> Record:
        """The record of a published artifact.

        Args:
            manifest: of the artifact.
            status: `computed` or `reused`.
            began_at: start of the stage, with a time zone.
            seconds: wall-clock time of the stage.
            why: what differs from the last night, for people.
            key: from `key_summary`.
        """
        return cls(
            artifact=manifest.artifact,
            date=manifest.date,
            run_id=manifest.run_id,
            status=status,
            why=tuple(why),
            began_at=began_at,
            seconds=round(seconds, 3),
            files=len(manifest.files),
            rows=manifest.rows,
            bytes=sum(entry.bytes for entry in manifest.files),
            key=dict(key),
        )

    def with_usage(self, usage: Any) -> Self:
        """The record with the workers and the peak memory of a computation."""
        update = {"workers": usage.workers, "peak_memory_bytes": usage.peak_memory_bytes}
        return self.model_copy(update=update)

    @property
    def cost(self) -> dict[str, Any]:
        """Seconds, workers and peak memory of the computation, tonight's or that of the night that computed the run."""
        if self.computed is not None:
            return self.computed
        return {
            "seconds": self.seconds,
            "workers": self.workers,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def write_record(storage: Storage, record: Record) -> None:
    """Put the record beside the manifest of its date; an error of the store becomes a warning and does not end the night."""
    run_key = f"{record.artifact}/_runs/{record.run_id}/{RECORD_FILE}"
    try:
        if record.status == "reused":
            origin = _read(storage, run_key)
            record = record.model_copy(update={"computed": origin.cost if origin else None})
        data = canonical_json(record.model_dump(mode="json"))
        if record.status == "computed":
            storage.persist(lambda: storage.store.put(run_key, data))
        key = f"{record.artifact}/date={record.date}/{RECORD_FILE}"
        storage.persist(lambda: storage.store.put(key, data))
    except StorageError as error:
        log.warning("%s of %s is published, but its record is not: %s", record.artifact, record.date, error)


def read_record(storage: Storage, artifact: str, date: str | None = None) -> Record | None:
    """The record of an artifact for a date, or for the latest date; None if there is no readable one.

    Args:
        storage: where artifacts live.
        artifact: name of the artifact.
        date: the night, YYYY-MM-DD; None: the latest.
    """
    try:
        wanted = date or storage.latest_date(artifact)
    except ArtifactError:
        return None  # publishing repairs a damaged `latest.json`
    return _read(storage, f"{artifact}/date={wanted}/{RECORD_FILE}") if wanted else None


def _read(storage: Storage, key: str) -> Record | None:
    stored = storage.get(key)
    if stored is None:
        return None
    try:
        return Record.model_validate_json(stored.data)
    except ValidationError:
        log.warning("%s is damaged, and is ignored", storage.uri(key))
        return None


def key_summary(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a key, with long values of the source as `{"count", "digest"}`."""
    source = {name: _short(value) for name, value in parts["source"].items()}
    return {**parts, "source": source}


def _short(value: Any) -> Any:
    if len(canonical_json(value)) <= LONG:
        return value
    count = len(value) if isinstance(value, list | dict) else 1
    return {"count": count, "digest": fingerprint({"value": value})}


def differences(last: Record, parts: Mapping[str, Any]) -> list[str]:
    """What differs between the key of an earlier night and tonight's, each as `name before -> now`.

    Args:
        last: record of the earlier night.
        parts: parts of tonight's key.

    Returns:
        An empty list if the keys are equal.
    """
    return list(_differences(last.key, key_summary(parts)))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in ("format_version", "seed"):
        if before.get(name) != now[name]:
            yield f"{name.replace('_', ' ')} {before.get(name)} -> {now[name]}"
    old_inputs = before.get("inputs", {})
    for name in sorted({*old_inputs, *now["inputs"]}):
        if name not in now["inputs"]:
            yield f"no {name} any more"
        elif name not in old_inputs:
            yield f"{name} is new"
        elif old_inputs[name] != now["inputs"][name]:
            yield f"{name} changed"
    for group in ("settings", "source"):
        olds = before.get(group, {})
        for name in sorted({*olds, *now[group]}):
            old, new = olds.get(name), now[group].get(name)
            if old == new:
                continue
            if group == "settings" and isinstance(old, dict) and isinstance(new, dict):
                for key in sorted({*old, *new}):
                    if old.get(key) != new.get(key):
                        yield f"{name}.{key} {old.get(key)!r} -> {new.get(key)!r}"
            else:
                yield _changed(name, old, new)


def _changed(name: str, old: Any, new: Any) -> str:
    counts = [_count(value) for value in (old, new)]
    if None not in counts:
        return f"{name} changed ({counts[0]:,} -> {counts[1]:,})"
    return f"{name} {old!r} -> {new!r}"


def _count(value: Any) -> int | None:
    if isinstance(value, list):
        return len(value)
    if isinstance(value, dict) and "digest" in value:
        return int(value["count"])
    return None
