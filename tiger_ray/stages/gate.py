"""The quality gate: recommendations of a model that ranks too badly are not published."""

from __future__ import annotations

import logging

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import EvaluationMetadata, ModelMetadata, RecommendationsMetadata
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import ArtifactError, QualityError
from tiger_ray.published.evaluation import evaluation_of
from tiger_ray.settings.settings import Settings

log = logging.getLogger(__name__)


def require_gate(settings: Settings, storage: Storage, evaluated: Manifest) -> None:
    """The quality gate: refuse a night that is worse than popularity, or much worse than the last one.

    Args:
        settings: section `evaluation`.
        storage: where the last recommendations are published.
        evaluated: manifest of tonight's evaluation.

    Raises:
        QualityError: the model ranks too badly; names both numbers and the settings that decide.
    """
    name = f"ndcg@{max(evaluated.setting('evaluation', 'ks'))}"  # evaluation.ks may have changed since
    measured = EvaluationMetadata.of(evaluated)
    ours, popular = measured.model.by_name[name], measured.popularity.by_name[name]
    floor = settings.evaluation.min_ratio_to_popularity * popular
    if ours < floor:
        raise QualityError(
            f"{name} is {ours:.4f}, popularity has {popular:.4f}, and evaluation.min_ratio_to_popularity asks for "
            f"{floor:.4f}; recommendations are not published, the last ones stay. Train longer, or look at the data"
        )
    try:
        published = storage.resolve("recommendations")
    except ArtifactError:
        return
    try:
        last = RecommendationsMetadata.of(published).evaluation
    except ArtifactError as error:  # publishing tonight may restore the damaged recommendations
        log.warning("evaluation.max_drop is not applied tonight: %s", error)
        return
    if last is None or name not in last.by_name or last.protocol != measured.protocol.as_dict():
        return
    before = last.by_name[name]
    if ours < (1 - settings.evaluation.max_drop) * before:
        raise QualityError(
            f"{name} is {ours:.4f}, {1 - ours / before:.0%} below the {before:.4f} of the last published "
            f"recommendations, and evaluation.max_drop allows a loss of {settings.evaluation.max_drop:.0%}; "
            "recommendations are not published, the last ones stay. Look at the data and at the loss of the training; "
            "if the new level is right, run again with a higher evaluation.max_drop"
        )


def require_evaluated(settings: Settings, storage: Storage, model: Manifest) -> None:
    """Apply the quality gate to the published evaluation of a model; a model that was trained on all events passes.

    Args:
        settings: with the date, and section `evaluation`.
        storage: where artifacts live.
        model: manifest of the model.

    Raises:
        ArtifactError: the model has no published evaluation.
        QualityError: as `require_gate`.
    """
    if ModelMetadata.of(model).holdout == "none":
        return
    evaluated = evaluation_of(storage, settings, model)
    if evaluated is None:
        raise ArtifactError(
            f"model {model.run_id} of {settings.date} has no evaluation, so the quality gate cannot judge it; run "
            "`tiger-ray run evaluation` first"
        )
    require_gate(settings, storage, evaluated)
