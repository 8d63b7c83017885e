"""Which artifacts belong together: every rule of lineage, decided from the manifests alone."""

from __future__ import annotations

from datetime import datetime

from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.errors import ArtifactError
from tiger_ray.settings.settings import Settings


def id_space(manifest: Manifest) -> str:
    """What a model must share with the Semantic IDs it reads: the quantizer and the sizes of the levels."""
    return str(manifest.metadata["space"])


def registry_of(manifest: Manifest) -> Manifest:
    """The manifest without tonight's eligibility: an item that runs out of stock must not retrain a model."""
    kept = ("items", "level_sizes", "space", "item_id_type")
    metadata = {name: manifest.metadata[name] for name in kept}
    return manifest.model_copy(update={"files": tuple(segments_of(manifest)), "metadata": metadata})


def require_same_registry(sequences: Manifest, semantic_ids: Manifest) -> None:
    """Refuse histories whose `item_index` means the items of another registry, from the manifests alone.

    Raises:
        ArtifactError: names both, and the job that makes them fit.
    """
    if sequences.inputs["semantic_ids"] != registry_of(semantic_ids).digest:
        raise ArtifactError(
            f"sequences {sequences.run_id} were not built on Semantic IDs {semantic_ids.run_id}; build them again "
            "(jobs/build_sequences.py)"
        )


def segments_of(manifest: Manifest) -> list[FileEntry]:
    """Files of the registry in the order of item_index."""
    return sorted(
        (entry for entry in manifest.files if entry.name.startswith("segment-")), key=lambda entry: entry.name
    )


def require_same_id_space(model: Manifest, semantic_ids: Manifest) -> None:
    """Refuse a model that was trained on other Semantic IDs, from the manifests alone.

    Raises:
        ArtifactError: names both ID spaces.
    """
    if model.metadata["space"] != id_space(semantic_ids):
        raise ArtifactError(
            f"model {model.run_id} was trained on ID space {model.metadata['space']}, but Semantic IDs "
            f"{semantic_ids.run_id} are of {id_space(semantic_ids)}; train a model on them (jobs/train_model.py)"
        )


def require_same_model(last: Manifest, settings: Settings, semantic_ids: Manifest) -> None:
    """Refuse to start from a model whose weights mean something else, or know what tonight hides.

    Raises:
        ArtifactError: it is of another ID space, holdout or shape; names both.
    """
    advice = (
        "Set training.warm_start to false for this night, with training.num_steps for a training from scratch"
    )
    if last.metadata["space"] != id_space(semantic_ids):
        raise ArtifactError(
            f"training.warm_start: the model of {last.date} writes Semantic IDs of ID space "
            f"{last.metadata['space']}, tonight's are of {id_space(semantic_ids)}. {advice}"
        )
    _require_hidden_from(last, settings)
    before, now = last.settings["model"], settings.model.model_dump(mode="json")
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
    """The last model has not seen the events that tonight's test asks for, as far as settings can tell.

    Of leave-one-out's validation events it has seen a few: an event that was a user's second and last was trained
    on, and is one for validation when a third has come.
    """
    tonight, before = settings.training.holdout, last.metadata["holdout"]
    if tonight == "none":
        return
    moment = "validation_from"
    begins, began = getattr(settings.sequences, moment), last.settings["sequences"][moment]
    if tonight != before:
        said = f"training.holdout {before!r}, tonight's is {tonight!r}"
    elif tonight == "time" and begins < datetime.fromisoformat(began):
        said = f"sequences.{moment} {began}, tonight's is {begins}"
    else:
        return
    raise ArtifactError(
        f"training.warm_start: the model of {last.date} was trained with {said}: it may have seen events that tonight "
        "are hidden, and would be praised for knowing them. Set training.warm_start to false for this night"
    )
