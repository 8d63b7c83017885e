"""Counts of one shard of users, and metrics from the sum of all counts.

B users, P places of a list, C = P + 1 cells of a count by rank, G groups of users, N items.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger_ray.artifacts import schemas
from tiger_ray.evaluation import metrics
from tiger_ray.evaluation.metrics import Estimate, Exposure
from tiger_ray.settings.settings import Settings

LENGTH_EDGES = (3, 5, 10, 20)
"""History lengths at which the next group of users begins."""


@dataclass(frozen=True)
class Tally:
    """Counts from the lists of some users. Tallies of disjoint users add up.

    >>> eligible_N, category_N = np.ones(2, bool), np.array([0, 1])
    >>> exposure = Exposure.of(np.array([[1]]), eligible_N, category_N)
    >>> count_C, groups_GC = np.array([1, 0]), np.zeros((1, 2), int)
    >>> tally = Tally(count_C, np.diag(count_C), groups_GC, groups_GC, 0, exposure)
    >>> (tally + tally).count_C.tolist()
    [2, 0]
    """

    count_C: npt.NDArray[np.int64]
    """Users by rank of their target."""
    joint_CC: npt.NDArray[np.int64]
    """Users by the ranker's rank (rows) and by the rank of popularity (columns)."""
    by_length_GC: npt.NDArray[np.int64]
    """Users by group of history length and by rank."""
    by_popularity_GC: npt.NDArray[np.int64]
    """Users by popularity group of their target and by rank."""
    repeated_targets: int
    """Users whose target is in their history."""
    exposure: Exposure

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def tally_of(
    lists: pa.Table,
    eligible_N: npt.NDArray[np.bool_],
    popularity_group_N: npt.NDArray[np.int8],
    category_N: npt.NDArray[np.int32],
) -> Tally:
    """Tally of one table of lists.

    Args:
        lists: rows of `schemas.ranked_lists`, one per user.
        eligible_N: true for an item that may be recommended, (N,) bool.
        popularity_group_N: result of `metrics.popularity_groups`, (N,) int8.
        category_N: as in `metrics.category_entropy`, (N,) int32.
    """
    item_BP = schemas.matrix_of(lists.column("items"))
    num_places = item_BP.shape[1]
    target_B = lists.column("target").to_numpy()
    rank_B = metrics.ranks(item_BP, target_B)
    length_B = np.digitize(lists.column("history_length").to_numpy(), LENGTH_EDGES)
    return Tally(
        metrics.rank_counts(rank_B, num_places),
        metrics.joint_rank_counts(rank_B, lists.column("popularity_rank").to_numpy(), num_places),
        metrics.grouped_rank_counts(rank_B, num_places, length_B, len(LENGTH_EDGES) + 1),
        metrics.grouped_rank_counts(rank_B, num_places, popularity_group_N[target_B], metrics.COLD + 1),
        int(lists.column("target_in_history").to_numpy().sum()),
        Exposure.of(item_BP, eligible_N, category_N),
    )


def sum_of(parts: Iterable[Any]) -> Any:
    """Sum of at least one part, such as tallies; at most two parts are in memory at a time."""
    return functools.reduce(operator.add, parts)


def metrics_of(tally: Tally, settings: Settings) -> dict[str, Any]:
    """Metrics of a tally, ready for JSON: overall with intervals, and by group."""
    ks, seed = settings.evaluation.ks, settings.seed

    def with_intervals(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in estimates.items()}

    def by_group(name: str, labels: Sequence[str], count_GC: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        return [
            {name: label, **metrics.metrics(count_C, ks)}
            for label, count_C in zip(labels, count_GC, strict=True)
        ]

    edges = (1, *LENGTH_EDGES)
    lengths = [f"{low} to {high - 1}" for low, high in zip(edges, edges[1:], strict=False)]
    tenths = [f"tenth {number} of the warm items" for number in range(1, metrics.COLD + 1)]
    warm_C = tally.by_popularity_GC[: metrics.COLD].sum(axis=0)
    return {
        "users": int(tally.count_C.sum()),
        "model": with_intervals(metrics.estimates(tally.count_C, ks, seed=seed)),
        "popularity": with_intervals(metrics.estimates(tally.joint_CC.sum(axis=0), ks, seed=seed)),
        "model_minus_popularity": with_intervals(metrics.differences(tally.joint_CC, ks, seed=seed)),
        "by_history_length": by_group("items", [*lengths, f"{edges[-1]} and more"], tally.by_length_GC),
        "by_target_popularity": by_group("target", [*tenths, "cold"], tally.by_popularity_GC),
        "by_target_warmth": by_group(
            "target", ["warm", "cold"], np.stack([warm_C, tally.by_popularity_GC[metrics.COLD]])
        ),
        "targets_in_history": tally.repeated_targets,
    }
