"""The published model, read without Ray."""

from __future__ import annotations

from datetime import date as calendar_date
from datetime import timedelta

from tiger_ray.artifacts.files import MODEL_FILES
from tiger_ray.artifacts.lineage import require_same_id_space
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.model.t5 import TigerModel, read_config
from tiger_ray.model.tokens import Vocabulary

WARM_START_DAYS = 31
"""Days to look back for a model to start from."""


def load_model(storage: Storage, model: Manifest, semantic_ids: Manifest) -> TigerModel:
    """The published model, checked to be of the ID space of the Semantic IDs.

    Args:
        storage: where the model is published.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs that the model is to write.

    Raises:
        ArtifactError: the model was trained on another ID space.
    """
    require_same_id_space(model, semantic_ids)
    return TigerModel.from_files({name: storage.read_file(model, name) for name in MODEL_FILES})


def load_vocabulary(storage: Storage, model: Manifest, semantic_ids: Manifest) -> Vocabulary:
    """The vocabulary of the published model, read from `config.json` without the weights.

    Args:
        storage: where the model is published.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs that the model is to write.

    Raises:
        ArtifactError: the model was trained on another ID space, or its `config.json` is damaged.
    """
    require_same_id_space(model, semantic_ids)
    return read_config(storage.read_file(model, "config.json"))[1]


def last_model(storage: Storage, date: str) -> Manifest | None:
    """The last model published for a date before this one, at most `WARM_START_DAYS` before."""
    tonight = calendar_date.fromisoformat(date)
    for days in range(1, WARM_START_DAYS + 1):
        published = storage.published("model", (tonight - timedelta(days)).isoformat())
        if published is not None:
            return published
    return None
