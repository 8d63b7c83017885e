"""Which artifacts belong together: every rule of lineage, decided from the manifests alone.

A `require_` function raises, and its error names both sides, what differs, and what to run or to set.
"""

from __future__ import annotations

from datetime import datetime

from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import (
    CatalogMetadata,
    EvaluationMetadata,
    ModelMetadata,
    RegistryMetadata,
    SemanticIdsMetadata,
    SequencesMetadata,
)
from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.settings.settings import Settings

GATES = ("min_ratio_to_popularity", "max_drop")
"""Settings of section evaluation that change no list and no metric."""


def id_space(semantic_ids: Manifest) -> str:
    """The ID space, which a model must share with its Semantic IDs: the quantizer and the sizes of the levels."""
    return SemanticIdsMetadata.of(semantic_ids).space


def registry_of(semantic_ids: Manifest) -> Manifest:
    """The manifest without tonight's eligibility: an item that runs out of stock must not retrain a model."""
    kept = {"items", "level_sizes", "space", "item_id_type"}
    metadata = RegistryMetadata.of(semantic_ids).model_dump(mode="json", include=kept)
    return semantic_ids.model_copy(update={"files": tuple(segments_of(semantic_ids)), "metadata": metadata})


def segments_of(manifest: Manifest) -> list[FileEntry]:
    """Files of the registry in the order of item_index."""
    return sorted(
        (entry for entry in manifest.files if entry.name.startswith("segment-")), key=lambda entry: entry.name
    )


def is_of_model(evaluation: Manifest, model: Manifest) -> bool:
    """True if the evaluation is of this model."""
    return evaluation.input("model") == model.digest


def require_same_registry(sequences: Manifest, semantic_ids: Manifest) -> None:
    """Refuse histories whose `item_index` means the items of another registry.

    Raises:
        ArtifactError: names both registries, and the command that builds fitting histories.
    """
    theirs, ours = sequences.input("semantic_ids"), registry_of(semantic_ids).digest
    if theirs != ours:
        raise ArtifactError(
            f"{sequences.title} are histories of the registry {theirs[:12]}: they were not built on Semantic IDs "
            f"{semantic_ids.run_id} of {semantic_ids.date}, which are the registry {ours[:12]}. Build the histories "
            "again: run `tiger-ray run events sequences`"
        )


def require_same_id_type(catalog: Manifest, registry: Manifest) -> None:
    """Refuse a catalog whose item ids are of another type than those of the registry that it is appended to.

    Raises:
        DataError: names both types.
    """
    found, started = CatalogMetadata.of(catalog).id_type, RegistryMetadata.of(registry).item_id_type
    if found != started:
        raise DataError(
            f"item_id is {found} in {catalog.title}, but the registry of Semantic IDs (run {registry.run_id}) was "
            f"started with {started}; ids of another type are other ids. Keep the type, or start a new registry by "
            "raising quantizer.version"
        )


def require_same_id_space(model: Manifest, semantic_ids: Manifest) -> None:
    """Refuse a model that was trained on other Semantic IDs.

    Raises:
        ArtifactError: names both ID spaces.
    """
    theirs, ours = ModelMetadata.of(model).space, id_space(semantic_ids)
    if theirs != ours:
        raise ArtifactError(
            f"{model.title} was trained on ID space {theirs}, but Semantic IDs {semantic_ids.run_id} of "
            f"{semantic_ids.date} are of {ours}; train a model on these Semantic IDs: run `tiger-ray run model`"
        )


def require_holdout(sequences: Manifest, holdout: str) -> None:
    """Refuse histories without the moments of the time split, if `training.holdout` asks for the split.

    Raises:
        ArtifactError: names the settings.
    """
    if SequencesMetadata.of(sequences).examples(holdout) is None:
        raise ArtifactError(
            f"{sequences.title} were built without sequences.validation_from and sequences.test_from, "
            f"which training.holdout {holdout!r} needs; set both and build the histories again: run `tiger-ray run events sequences`"
        )


def require_same_histories(model: Manifest, sequences: Manifest) -> None:
    """Refuse to evaluate a model on other histories than those of its training: the model may have seen the held-out
    events.

    Raises:
        ArtifactError: names model and histories.
    """
    theirs = model.input("sequences")
    if theirs != sequences.digest:
        raise ArtifactError(
            f"{model.title} was trained on other histories ({theirs[:12]}) than {sequences.title} "
            f"({sequences.digest[:12]}): the model may have seen the events that it would be asked for. Train a model on these "
            "histories: run `tiger-ray run model`"
        )


def require_same_protocol(evaluation: Manifest, other: Manifest) -> None:
    """Refuse to compare two evaluations that were not made in the same way; the rankers may differ.

    Raises:
        ArtifactError: names both evaluations, and each setting that differs.
    """
    ours, theirs = evaluation.setting("evaluation"), other.setting("evaluation")
    differ = [
        f"evaluation.{name} {ours.get(name)} and {theirs.get(name)}"
        for name in dict.fromkeys([*ours, *theirs])
        if name not in GATES and ours.get(name) != theirs.get(name)
    ]
    split, their_split = (EvaluationMetadata.of(each).protocol.split for each in (evaluation, other))
    if split != their_split and not differ:
        differ = [f"training.holdout gave the splits {split!r} and {their_split!r}"]
    if differ:
        raise ArtifactError(
            f"{evaluation.title} and {other.title} cannot be compared: {', '.join(differ)}; evaluate both with the "
            "same training.holdout and the same section evaluation: run `tiger-ray run evaluation`, or jobs/baseline.py for a baseline"
        )


def require_same_model(last: Manifest, settings: Settings, semantic_ids: Manifest) -> None:
    """Refuse to start from a model of another ID space or shape, or from one that saw events which are hidden tonight.

    Args:
        last: the model to start from.
        settings: of tonight.
        semantic_ids: of tonight.

    Raises:
        ArtifactError: the model is of another ID space, holdout or shape; names the values of both.
    """
    advice = (
        "Set training.warm_start to false for this night, with training.num_steps for a training from scratch"
    )
    theirs, ours = ModelMetadata.of(last).space, id_space(semantic_ids)
    if theirs != ours:
        raise ArtifactError(
            f"training.warm_start: the model of {last.date} writes Semantic IDs of ID space "
            f"{theirs}, tonight's are of {ours}. {advice}"
        )
    _require_hidden_from(last, settings)
    before, now = last.setting("model"), settings.model.model_dump(mode="json")
    shape = {name: value for name, value in now.items() if name not in ("dropout", "max_history")}
    changed = [
        f"model.{name} {before.get(name)!r} -> {shape[name]!r}"
        for name in shape
        if before.get(name) != shape[name]
    ]
    if changed:
        raise ArtifactError(
            f"training.warm_start: the model of {last.date} has another shape ({', '.join(changed)}). {advice}"
        )


def _require_hidden_from(last: Manifest, settings: Settings) -> None:
    """Refuse a last model that may have been trained on tonight's test events, as far as settings can tell.

    With leave-one-out the last model was trained on a few of tonight's validation events: the second and last event
    of a user is a training event, and becomes the validation event when the user has a third.
    """
    tonight, before = settings.training.holdout, ModelMetadata.of(last).holdout
    if tonight == "none":
        return
    begins, said = settings.sequences.validation_from, ""
    if tonight != before:
        said = f"training.holdout {before!r}, tonight's is {tonight!r}"
    elif tonight == "time":
        began = last.setting("sequences", "validation_from")
        if began is None:
            raise last.damaged("settings.sequences.validation_from is null, but metadata.holdout is 'time'")
        if begins is not None and begins < datetime.fromisoformat(began):
            said = f"sequences.validation_from {began}, tonight's is {begins}"
    if said:
        raise ArtifactError(
            f"training.warm_start: the model of {last.date} was trained with {said}: the model may have seen "
            "events that are hidden tonight, and its metrics would be too good. Set training.warm_start to false for this night"
        )
