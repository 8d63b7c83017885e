"""The night: its stages in order, and the function that walks them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.settings.settings import Settings
from tiger_ray.stages import (
    catalog,
    embeddings,
    evaluation,
    events,
    model,
    quantizer,
    recommendations,
    semantic_ids,
    sequences,
)
from tiger_ray.stages.stage import Context, Stage, StageResult, run_stage

NIGHT: tuple[Stage, ...] = (
    catalog.STAGE,
    events.STAGE,
    embeddings.STAGE,
    quantizer.STAGE,
    semantic_ids.STAGE,
    sequences.STAGE,
    model.STAGE,
    evaluation.STAGE,
    recommendations.STAGE,
)
"""Each stage reads only artifacts of stages before it."""

STAGE_NAMES = tuple(stage.name for stage in NIGHT)


def run_night(settings: Settings, storage: Storage, names: Collection[str] = ()) -> dict[str, StageResult]:
    """Run stages in the order of the night.

    Args:
        settings: of the whole night.
        storage: where artifacts live.
        names: stages to run, even if the settings leave a stage out; their other inputs must be published for the
            date. Empty: all stages that the settings do not leave out.

    Returns:
        The result of each stage that ran, by name; a stage that the settings leave out has none.

    Raises:
        ArtifactError: an input of a stage is not published for the date.
        QualityError: the quality gate refuses the model.
        TigerError: whatever a stage refuses or fails with.
    """
    results: dict[str, StageResult] = {}
    for stage in NIGHT:
        if stage.name not in names if names else stage.left_out(settings):
            continue
        inputs = inputs_of(stage, settings, storage, results)
        stage.gate(Context(settings, storage, inputs))
        results[stage.name] = run_stage(stage, settings, storage, **inputs)
    return results


def inputs_of(
    stage: Stage, settings: Settings, storage: Storage, results: Mapping[str, StageResult]
) -> dict[str, Manifest]:
    """The manifests that a stage reads: tonight's results first, else the artifacts published for the date.

    Args:
        stage: stage that reads.
        settings: with the date.
        storage: where artifacts live.
        results: results of the stages that already ran, by name.

    Raises:
        ArtifactError: an input is not published for the date; names the input.
    """
    return {
        name: results[name].manifest if name in results else storage.resolve(name, settings.date)
        for name in stage.inputs
    }
