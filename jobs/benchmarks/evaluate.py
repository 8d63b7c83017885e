"""Measure the time of an evaluation of finished lists: the users of Amazon Beauty, and a million users in shards.

    python jobs/benchmarks/evaluate.py --json evaluate.json

Two rankers' planted lists of 50 items of 12,101, on one core. Included: accuracy of both at three K, by history
length and by popularity of the target, all with intervals of 1,000 resamples; their paired difference; and what
both show. Not included: decoding and reading.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from planted import BEAUTY_ITEMS, beauty_users
from results import Claims
from turns import ROUNDS, ratios

from tiger_ray.evaluation import metrics as evaluation
from tiger_ray.evaluation.metrics import COLD, Exposure

USERS, MANY_USERS, USERS_PER_SHARD = 22_363, 1_000_000, 25_000
PLACES, KS, EDGES = 50, (5, 10, 50), (5, 10, 20)
CHECKED = 500


class Shard(NamedTuple):
    """Users of a shard: lists of two rankers, targets, histories."""

    found_BP: np.ndarray
    other_BP: np.ndarray
    target_B: np.ndarray
    item_E: np.ndarray
    lengths_B: np.ndarray


class Items(NamedTuple):
    """Facts of each item."""

    eligible_N: np.ndarray
    category_N: np.ndarray
    training_events_N: np.ndarray
    group_N: np.ndarray


class Counts(NamedTuple):
    """Counts that a worker makes of a shard."""

    by_length_GC: np.ndarray
    by_popularity_GC: np.ndarray
    joint_CC: np.ndarray
    shown: Exposure
    other_shown: Exposure
    targets_in_history: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file to write the claims to")
    words = parser.parse_args()
    claims, items = Claims(), planted_items()
    claims.settings |= {"places": PLACES, "ks": KS, "items": BEAUTY_ITEMS, "rounds": ROUNDS}
    shard = planted_shard(USERS, items, seed=0)
    require_right(Shard(*(rows[:CHECKED] for rows in shard[:3]), *first_histories(shard)), items)

    few, many = list[Seconds](), list[Seconds]()
    for number in range(ROUNDS + 1):
        spent = seconds_of([shard], items)
        if number:  # the first run only warms up
            few.append(spent)
            seeds = range(MANY_USERS // USERS_PER_SHARD)
            many.append(seconds_of((planted_shard(USERS_PER_SHARD, items, seed) for seed in seeds), items))
    claims.add(f"seconds_{USERS}_users", [spent.whole for spent in few], "s", "< 2")
    claims.add(f"seconds_{MANY_USERS}_users", [spent.whole for spent in many], "s")
    reporting = [spent.cpu_reporting for spent in few]
    claims.add("cpu_seconds_reporting", reporting, "s, whatever the number of users")
    per_user = [spent.cpu_counting / USERS * 1e6 for spent in few]
    per_many = [spent.cpu_counting / MANY_USERS * 1e6 for spent in many]
    claims.add(f"cpu_us_per_user_of_{USERS}", per_user, "us")
    claims.add(f"cpu_us_per_user_of_{MANY_USERS}", per_many, "us")
    claims.add("cpu_per_user_1m_to_22k", ratios(per_many, per_user), "", "1: linear")
    claims.write(words.json)


class Seconds(NamedTuple):
    """Wall-clock seconds, and processor seconds of each part."""

    whole: float
    cpu_counting: float
    cpu_reporting: float


def seconds_of(shards: Iterable[Shard], items: Items) -> Seconds:
    """Time of counting and adding up shards, and of the report; the time of planting shards is left out."""
    total, whole, cpu_counting = None, 0.0, 0.0
    for shard in shards:
        start, cpu = time.perf_counter(), time.process_time()
        part = count(shard, items)
        total = part if total is None else Counts(*(a + b for a, b in zip(total, part, strict=True)))
        whole, cpu_counting = whole + time.perf_counter() - start, cpu_counting + time.process_time() - cpu
    assert total is not None
    start, cpu = time.perf_counter(), time.process_time()
    report(total, items)
    return Seconds(whole + time.perf_counter() - start, cpu_counting, time.process_time() - cpu)


def count(shard: Shard, items: Items) -> Counts:
    rank_B, other_rank_B = (
        evaluation.ranks(found_BP, shard.target_B) for found_BP in (shard.found_BP, shard.other_BP)
    )
    length_group_B = np.digitize(shard.lengths_B, EDGES)
    return Counts(
        evaluation.grouped_rank_counts(rank_B, PLACES, length_group_B, len(EDGES) + 1),
        evaluation.grouped_rank_counts(rank_B, PLACES, items.group_N[shard.target_B], COLD + 1),
        evaluation.joint_rank_counts(rank_B, other_rank_B, PLACES),
        Exposure.of(shard.found_BP, items.eligible_N, items.category_N),
        Exposure.of(shard.other_BP, items.eligible_N, items.category_N),
        int(evaluation.targets_in_history(shard.item_E, shard.lengths_B, shard.target_B).sum()),
    )


def report(counts: Counts, items: Items) -> dict[str, Any]:
    """All metrics that follow from the counts."""
    rankers = [counts.joint_CC.sum(axis=1), counts.joint_CC.sum(axis=0)]
    return {
        "metrics": [evaluation.metrics(count_C, KS) for count_C in rankers],
        "intervals": [evaluation.estimates(count_C, KS) for count_C in rankers],
        "difference": evaluation.differences(counts.joint_CC, KS),
        "groups": [
            evaluation.estimates(count_C, KS) for count_C in (*counts.by_length_GC, *counts.by_popularity_GC)
        ],
        "shown": [
            shown.metrics(items.eligible_N, items.training_events_N)
            for shown in (counts.shown, counts.other_shown)
        ],
        "targets_in_history": counts.targets_in_history,
    }


# Planted lists


def planted_items() -> Items:
    """Skewed popularity; one item in 20 is cold, one in 50 not eligible, one in 100 without category."""
    rng = np.random.default_rng(0)
    events_N = np.where(rng.random(BEAUTY_ITEMS) < 0.05, 0, rng.zipf(1.6, BEAUTY_ITEMS).clip(max=500))
    return Items(
        rng.random(BEAUTY_ITEMS) < 0.98,
        np.where(rng.random(BEAUTY_ITEMS) < 0.01, -1, rng.integers(40, size=BEAUTY_ITEMS)),
        events_N,
        evaluation.popularity_groups(events_N),
    )


def planted_shard(users: int, items: Items, seed: int) -> Shard:
    """Lists that show popular items more, some of them short; the first ranker hits more often than the other."""
    rng = np.random.default_rng(seed)
    item_E, lengths_B = beauty_users(users)
    by_popularity = np.argsort(evaluation.popularity_ranks(items.training_events_N))
    target_B = by_popularity[(BEAUTY_ITEMS * rng.random(users) ** 2).astype(np.int64)]
    place_B = rng.integers(PLACES, size=users)
    found = []
    for share in (0.2, 0.18):
        found_BP = by_popularity[(BEAUTY_ITEMS * rng.random((users, PLACES)) ** 2).astype(np.int64)]
        hit = np.flatnonzero(rng.random(users) < share)
        place = np.where(rng.random(len(hit)) < 0.3, place_B[hit], rng.integers(PLACES, size=len(hit)))
        found_BP[hit, place] = target_B[hit]
        short = np.flatnonzero(rng.random(users) < 0.02)
        found_BP[short, PLACES // 2 :] = -1
        found.append(found_BP)
    return Shard(*found, target_B, item_E, lengths_B)


def first_histories(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    lengths_B = shard.lengths_B[:CHECKED]
    return shard.item_E[: lengths_B.sum()], lengths_B


# The same by loops


def require_right(shard: Shard, items: Items) -> None:
    """Compare with loops over users and items that follow the definitions."""
    found = report(count(shard, items), items)
    users = range(len(shard.target_B))
    histories = np.split(shard.item_E, np.cumsum(shard.lengths_B)[:-1])
    rankers = [
        [[item for item in row if item >= 0] for row in lists.tolist()]
        for lists in (shard.found_BP, shard.other_BP)
    ]
    rank = [
        [
            row.index(target) + 1 if target in row else math.inf
            for row, target in zip(rows, shard.target_B.tolist(), strict=True)
        ]
        for rows in rankers
    ]
    gains: dict[str, Callable[[float], float]] = {
        "recall": lambda rank: 1.0,
        "ndcg": lambda rank: 1 / math.log2(rank + 1),
        "mrr": lambda rank: 1 / rank,
    }

    def mean(ranker: int, name: str, chosen: Iterable[int]) -> float:
        gain, k = gains[name.split("@")[0]], int(name.split("@")[1])
        values = [gain(rank[ranker][user]) if rank[ranker][user] <= k else 0.0 for user in chosen]
        return sum(values) / max(len(values), 1)

    group_of = items.group_N[shard.target_B]
    length_group = [sum(length >= edge for edge in EDGES) for length in shard.lengths_B]
    groups = [[user for user in users if length_group[user] == group] for group in range(len(EDGES) + 1)]
    groups += [[user for user in users if group_of[user] == group] for group in range(COLD + 1)]
    for ranker in (0, 1):
        for name, estimate in found["intervals"][ranker].items():
            require_close(name, estimate.value, mean(ranker, name, users))
            require_close(name, found["metrics"][ranker][name], estimate.value)
        for name, value in by_loop(rankers[ranker], items).items():
            require_close(name, found["shown"][ranker][name], value)
    for name, estimate in found["difference"].items():
        require_close(name, estimate.value, mean(0, name, users) - mean(1, name, users))
    for chosen, estimates in zip(groups, found["groups"], strict=True):
        for name, estimate in estimates.items():
            require_close(name, estimate.value, mean(0, name, chosen))
    assert found["targets_in_history"] == sum(shard.target_B[user] in histories[user] for user in users)


def by_loop(lists: list[list[int]], items: Items) -> dict[str, float]:
    """The values of `Exposure.metrics` for these lists, computed by loops."""
    shown, entropy = Counter[int](), 0.0
    for row in lists:
        shown.update({item for item in row if items.eligible_N[item]})
        shares = [n / len(row) for n in Counter(items.category_N[item] for item in row).values()]
        entropy -= sum(share * math.log(share) for share in shares)
    events_N = items.training_events_N
    order = sorted(range(BEAUTY_ITEMS), key=lambda item: (-events_N[item], item))
    place = {item: number + 1 for number, item in enumerate(order)}
    valid, entries = sum(shown.values()), sum(map(len, lists))
    counts = sorted(shown[item] for item in range(BEAUTY_ITEMS) if items.eligible_N[item])
    # the area between the curve of equal shares and the Lorenz curve, doubled
    area = (np.cumsum(counts) - np.array(counts) / 2).sum() / valid / len(counts)
    return {
        "coverage": len(shown) / len(counts),
        "gini": 1 - 2 * area,
        "popularity_rank": sum(place[item] * times for item, times in shown.items()) / valid,
        "cold_share": sum(times for item, times in shown.items() if not events_N[item]) / valid,
        "invalid_share": (entries - valid) / entries,
        "short_lists": sum(len(row) < PLACES for row in lists),
        "entropy": entropy / len(lists),
    }


def require_close(name: str, ours: float, theirs: float) -> None:
    assert math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-9), f"{name} is {ours}, and by loops {theirs}"


if __name__ == "__main__":
    main()
