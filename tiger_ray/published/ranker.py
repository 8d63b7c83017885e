"""The rankers of a night, made from published artifacts, for the actors of the night and the replicas of the endpoint.

N items, I id_length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import SequencesMetadata
from tiger_ray.artifacts.storage import Storage
from tiger_ray.ids.semantic_ids import SemanticIds
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.published.model import load_model
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.rankers.base import Rules
from tiger_ray.rankers.fallback import FallbackRanker
from tiger_ray.rankers.popularity import Popularity
from tiger_ray.rankers.tiger import TigerRanker
from tiger_ray.settings.settings import Settings


class NightRanker(NamedTuple):
    """The ranker of a night, and the artifacts that name its items and users."""

    ranker: FallbackRanker
    ids: SemanticIds
    vocabulary: Vocabulary


def open_ranker(
    storage: Storage, settings: Settings, model: Manifest, semantic_ids: Manifest, sequences: Manifest
) -> NightRanker:
    """The night's TIGER for users with history, and popularity for users without.

    Args:
        storage: where the artifacts are.
        settings: sections `decoding` and `recommendations`.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs that the model was trained on.
        sequences: manifest of the histories, which hold the popularity.

    Raises:
        ArtifactError: the model was trained on another ID space.
        DataError: no item is eligible.
    """
    ids = load_semantic_ids(storage, semantic_ids)
    rules = Rules(ids.eligible_N, settings.recommendations.exclude_history)
    tiger = _tiger(storage, settings, model, semantic_ids, ids, rules)
    popular = open_popularity(storage, sequences, rules)
    return NightRanker(FallbackRanker(tiger, popular), ids, tiger.vocabulary)


def open_tiger(
    storage: Storage, settings: Settings, model: Manifest, semantic_ids: Manifest, rules: Rules
) -> TigerRanker:
    """The night's TIGER, which has no item for a user without history.

    Args:
        storage: where the artifacts are.
        settings: section `decoding`, and the seed of the draws.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs that the model was trained on.
        rules: what may come out.

    Raises:
        ArtifactError: the model was trained on another ID space.
        DataError: no item is eligible.
    """
    ids = load_semantic_ids(storage, semantic_ids)
    return _tiger(storage, settings, model, semantic_ids, ids, rules)


def open_popularity(storage: Storage, sequences: Manifest, rules: Rules) -> Popularity:
    """Popularity by all events of the night; equally popular items come by item_index.

    Args:
        storage: where the artifacts are.
        sequences: manifest of the histories, which hold the popularity.
        rules: what may come out.
    """
    table = storage.read_table(sequences, "popularity.parquet")
    events_N = np.zeros(len(rules.eligible_N), np.int64)
    events_N[table.column("item_index").to_numpy()] = table.column("events").to_numpy()
    # The table holds the most popular items only; scores are shares of the events of all items.
    return Popularity(events_N, rules, SequencesMetadata.of(sequences).events)


def _tiger(
    storage: Storage,
    settings: Settings,
    model: Manifest,
    semantic_ids: Manifest,
    ids: SemanticIds,
    rules: Rules,
) -> TigerRanker:
    decoding = settings.decoding
    if not decoding.use_gpu:
        torch.set_num_threads(max(1, int(decoding.cpus_per_worker)))
    return TigerRanker(
        load_model(storage, model, semantic_ids),
        "cuda" if decoding.use_gpu else "cpu",
        codes_NI=ids.codes_NI,
        rules=rules,
        decoding=decoding,
        seed=settings.seed,
    )
