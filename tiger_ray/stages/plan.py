"""Plan a night: what each stage would do and why. A plan needs no Ray, makes no claim and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.record import Record, differences, read_record
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import TigerError
from tiger_ray.settings.settings import Settings
from tiger_ray.stages.night import NIGHT
from tiger_ray.stages.stage import Context, Key, Stage, key_of, refusal

Verdict = Literal["computes", "reuses", "skips", "left out", "refuses"]


@dataclass(frozen=True)
class PlannedStage:
    """What a night would do with one stage."""

    stage: Stage
    verdict: Verdict
    why: tuple[str, ...]
    """Settings, inputs or format that differ from the last night; or the text of the error."""
    rows_in: int | None = None
    """Rows of the inputs; None where an input is not computed yet, or is a file of the user."""
    bytes_in: int | None = None
    """Bytes of the inputs, files of the user included; None where an input is not computed yet."""
    last: Record | None = None
    """Record of the artifact of the latest date."""
    error: TigerError | None = None
    """The error with which the night would end at this stage."""


def plan_night(settings: Settings, storage: Storage) -> list[PlannedStage]:
    """The verdict on each stage of the night, in order; reads manifests and lists inputs, and writes nothing.

    Args:
        settings: of the whole night.
        storage: where artifacts live.

    Raises:
        StorageError: the store cannot be read.
    """
    known: dict[str, Manifest] = {}
    planned: list[PlannedStage] = []
    for stage in NIGHT:
        one, manifest = _plan_stage(stage, settings, storage, known, planned)
        planned.append(one)
        if manifest is not None:
            known[stage.name] = manifest
    return planned


def _plan_stage(
    stage: Stage,
    settings: Settings,
    storage: Storage,
    known: Mapping[str, Manifest],
    before: list[PlannedStage],
) -> tuple[PlannedStage, Manifest | None]:
    """The verdict, and the manifest that later stages would read if nothing needs to be computed."""
    reason = stage.left_out(settings)
    if reason:
        return PlannedStage(stage, "left out", (reason,)), None
    last = read_record(storage, stage.name)
    refused = [one.stage.name for one in before if one.verdict == "refuses"]
    if refused:
        return PlannedStage(stage, "refuses", (f"{refused[0]} is refused",), last=last), None
    missing = [name for name in stage.inputs if name not in known]
    if missing:
        first = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} computed first"
        return PlannedStage(stage, "computes", (first,), last=last), None
    context = Context(settings, storage, {name: known[name] for name in stage.inputs})
    try:
        if all(one.verdict in ("skips", "left out") for one in before):
            stage.gate(context)  # the gate reads artifacts of the date
        key, context = key_of(stage, context)
    except TigerError as error:
        return PlannedStage(stage, "refuses", (str(error),), last=last, error=error), None
    verdict, why, manifest, refusing = _verdict(stage, settings, storage, key, last)
    rows = sum(manifest.rows for manifest in context.inputs.values()) if stage.inputs else None
    return PlannedStage(stage, verdict, why, rows, _bytes_in(context), last, refusing), manifest


def _verdict(
    stage: Stage, settings: Settings, storage: Storage, key: Key, last: Record | None
) -> tuple[Verdict, tuple[str, ...], Manifest | None, TigerError | None]:
    published = storage.published(stage.name, settings.date)
    replace = settings.storage.replace
    if published is not None and not replace:
        if published.fingerprint == key.fingerprint:
            return "skips", (f"published for {settings.date}",), published, None
        error = refusal(storage.uri(f"{stage.name}/date={settings.date}"), published, key, settings)
        return "refuses", (str(error),), None, error
    complete = storage.completed(stage.name, key.fingerprint)
    found = tuple(differences(last, key.parts)) if last else ()
    if complete is not None:
        manifest = complete.model_copy(update={"date": settings.date})
        return "reuses", found or (f"same as {last.date if last else 'an earlier night'}",), manifest, None
    if last is None:
        return "computes", ("no earlier night",), None, None
    return "computes", found or (f"files of {last.date} are gone or damaged",), None, None


def _bytes_in(context: Context) -> int:
    own = sum(entry.bytes for manifest in context.inputs.values() for entry in manifest.files)
    return own + sum(int(file["bytes"]) for file in context.source.get("files", ()))
