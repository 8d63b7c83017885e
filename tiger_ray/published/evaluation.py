"""The published evaluations: metrics, and the paired counts that a comparison of two models needs.

B users of a shard, P places of a list, C = P + 1 ranks: one more than places, for a target without a place.
"""

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
"""File of an evaluation with metrics, exposure and protocol."""


def load_metrics(storage: Storage, evaluated: Manifest) -> dict[str, Any]:
    """Content of the metrics file of an evaluation, as the stage `evaluation` wrote the file."""
    metrics: dict[str, Any] = json.loads(storage.read_file(evaluated, METRICS_FILE))
    return metrics


def list_shards(evaluated: Manifest) -> list[FileEntry]:
    """The files of an evaluation that hold lists."""
    return [entry for entry in evaluated.files if entry.name.startswith("shard-")]


def paired_counts(
    storage: Storage, evaluated: Manifest, other: Manifest, num_places: int
) -> npt.NDArray[np.int64]:
    """Users by their ranks in two evaluations, (C, C) int64, as `evaluation.metrics.joint_rank_counts`.

    Args:
        storage: where both evaluations are published.
        evaluated: manifest of the evaluation whose ranks are the rows.
        other: manifest of the evaluation whose ranks are the columns.
        num_places: places of a list.

    Raises:
        ArtifactError: the evaluations are not of the same protocol.
        DataError: the evaluations are not of the same users and targets.
    """
    joint_CC = np.zeros((num_places + 1, num_places + 1), np.int64)
    for one, two in _shard_pairs(storage, evaluated, other):
        joint_CC += metrics.joint_rank_counts(_ranks(one), _ranks(two), num_places)
    return joint_CC


def recall_of(storage: Storage, evaluated: Manifest, other: Manifest, k: int) -> float:
    """Mean over users of the share of the other evaluation's first k items that are among the first k of this one.

    Args:
        storage: where both evaluations are published.
        evaluated: manifest of the evaluation that is judged.
        other: manifest of the evaluation whose items are sought.
        k: places of a list that count.

    Raises:
        ArtifactError: the evaluations are not of the same protocol.
        DataError: the evaluations are not of the same users and targets.
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
    """Lists of two evaluations, one shard after the other, of the same users in the same order."""
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
    """The evaluation of a model that is published for the night; None if there is none.

    Args:
        storage: where artifacts live.
        settings: with the date.
        model: manifest of the model.
    """
    published = storage.published("evaluation", settings.date)
    return published if published is not None and is_of_model(published, model) else None
