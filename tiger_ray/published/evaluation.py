"""The published evaluations: metrics, and the paired counts that a comparison of two models needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.lineage import is_of_model, require_same_protocol
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import DataError
from tiger_ray.evaluation import metrics
from tiger_ray.settings.settings import Settings

METRICS_FILE = "metrics.json"
"""All that is known of the lists of an evaluation."""


def load_metrics(storage: Storage, evaluated: Manifest) -> dict[str, Any]:
    """Everything that an evaluation found, as `_compute` wrote it."""
    metrics: dict[str, Any] = json.loads(storage.read_file(evaluated, METRICS_FILE))
    return metrics


def list_shards(evaluated: Manifest) -> list[FileEntry]:
    """The files of an evaluation that hold lists."""
    return [entry for entry in evaluated.files if entry.name.startswith("shard-")]


def paired_counts(
    storage: Storage, evaluated: Manifest, other: Manifest, num_places: int
) -> npt.NDArray[np.int64]:
    """Users by their ranks in two evaluations, (C, C) int64, as `evaluation.joint_rank_counts`.

    Raises:
        ArtifactError: they are not of the same protocol.
        DataError: they are not of the same users and targets.
    """
    joint_CC = np.zeros((num_places + 1, num_places + 1), np.int64)
    for one, two in _shard_pairs(storage, evaluated, other):
        joint_CC += metrics.joint_rank_counts(_ranks(one), _ranks(two), num_places)
    return joint_CC


def recall_of(storage: Storage, evaluated: Manifest, other: Manifest, k: int) -> float:
    """Mean over users of the share of the other evaluation's first k items that are among the first k of this one.

    Raises:
        ArtifactError: they are not of the same protocol.
        DataError: they are not of the same users and targets.
    """
    share, users = 0.0, 0
    for one, two in _shard_pairs(storage, evaluated, other):
        item_BP, sought_BP = (schemas.matrix_of(lists.column("items"))[:, :k] for lists in (one, two))
        share += float(metrics.share_found(item_BP, sought_BP).sum())
        users += len(item_BP)
    return share / max(users, 1)


def _shard_pairs(
    storage: Storage, evaluated: Manifest, other: Manifest
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Lists of two evaluations, a shard at a time, of the same users in the same order."""
    require_same_protocol(evaluated, other)
    theirs = {entry.name: entry for entry in list_shards(other)}
    for entry in list_shards(evaluated):
        one = storage.read_table(evaluated, entry)
        two = storage.read_table(other, theirs[entry.name]) if entry.name in theirs else None
        if two is None or any(
            not one.column(name).equals(two.column(name)) for name in ("user_hash", "target")
        ):
            raise DataError(
                f"{evaluated.artifact} {evaluated.run_id} and {other.artifact} {other.run_id} are not of the same users "
                f"and targets ({entry.name} differs); evaluate both with the same histories and section evaluation"
            )
        yield one, two


def _ranks(lists: pa.Table) -> npt.NDArray[np.int64]:
    return metrics.ranks(schemas.matrix_of(lists.column("items")), lists.column("target").to_numpy())


def evaluation_of(storage: Storage, settings: Settings, model: Manifest) -> Manifest | None:
    """The evaluation of this model that is published for the night, if one is."""
    published = storage.published("evaluation", settings.date)
    return published if published is not None and is_of_model(published, model) else None
