"""Tables for the end of a night: metrics, and a few users with their items by title."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts.files import shard_name
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import EvaluationMetadata, ModelMetadata, RecommendationsMetadata
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import shard_of, stable_hash
from tiger_ray.published.semantic_ids import load_item_ids

NUM_USERS = 5
"""Users of the examples."""


NUM_LAST = 3
"""Last items of each example."""


NUM_RECOMMENDED = 3
"""Recommended items of each example."""


TITLE_WIDTH = 44
"""Characters of a title."""


def metrics_table(evaluation: Manifest | None, model: Manifest) -> str:
    """Metrics of the model beside popularity, with the protocol of the evaluation."""
    if evaluation is None:
        return "no evaluation: training saw every event (training.holdout none)"
    found = EvaluationMetadata.of(evaluation)
    names = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in evaluation.setting("evaluation", "ks")]
    lines = [f"{'':<12}" + "".join(f"{name:>12}" for name in names)]
    for label, metrics in (("TIGER", found.model), ("popularity", found.popularity)):
        lines.append(f"{label:<12}" + "".join(f"{metrics.by_name[name]:>12.4f}" for name in names))
    protocol, periods = found.protocol, f" ({found.periods})" if found.periods else ""
    lines.append(
        f"{found.model.users:,} users ({protocol.users}); {protocol.split}{periods}; {protocol.ranking}, "
        f"beam {protocol.beam_width}; history of {protocol.model_history}, "
        f"{'masked' if protocol.history_masked else 'not masked'}; ties by {protocol.ties}"
        + (f" (chose {found.tied_share:.1%} of the targets)" if found.tied_share else "")
    )
    lines.append(f"training saw: {_seen(ModelMetadata.of(model).holdout)}")
    return "\n".join(lines)


def examples_table(
    storage: Storage,
    catalog: Manifest,
    semantic_ids: Manifest,
    sequences: Manifest,
    recommendations: Manifest,
) -> str:
    """A few users of the first shard: their last items and their recommended items, by title.

    Args:
        storage: root of the artifacts.
        catalog: manifest with the titles.
        semantic_ids: manifest with the item ids by item_index.
        sequences: manifest with the histories.
        recommendations: manifest with the lists.
    """
    users = list(_examples(storage, semantic_ids, sequences, recommendations))
    wanted = {item for _, last, best in users for item in (*last, *best)}
    titles = titles_of(storage, catalog, wanted)
    lines = []
    for user_id, last, best in users:
        lines.append(f"user {user_id}")
        left, right = [titles[i] for i in last], [titles[i] for i in best]
        for row in range(max(len(left), len(right))):
            seen = left[row] if row < len(left) else ""
            lines.append(f"    {seen:<{TITLE_WIDTH}}  ->  {right[row] if row < len(right) else ''}")
    return "\n".join([f"    {'last items (oldest first)':<{TITLE_WIDTH}}  ->  recommended", *lines])


def _examples(
    storage: Storage, semantic_ids: Manifest, sequences: Manifest, recommendations: Manifest
) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """User id, last item ids, recommended item ids."""
    shard = recommendations.files[0].name
    users = storage.read_table(sequences, shard, columns=["user_id", "history"])
    users = users.filter(pc.greater(pc.list_value_length(users.column("history")), 0)).slice(0, NUM_USERS)
    if not users.num_rows:
        return
    item_ids = load_item_ids(storage, semantic_ids)
    rows = storage.read_table(recommendations, shard)
    for user_id, history in zip(
        users.column("user_id").to_pylist(), users.column("history").to_pylist(), strict=True
    ):
        last = [item_ids[index].as_py() for index in history[-NUM_LAST:]]  # `take` would copy all item ids
        own = rows.filter(
            pc.equal(rows.column("user_id"), pa.scalar(user_id, rows.schema.field("user_id").type))
        )
        if RecommendationsMetadata.of(recommendations).form == "wide":
            best = own.column("item_ids").to_pylist()[0]
        else:
            best = own.sort_by("rank").column("item_id").to_pylist()
        yield user_id, last, best[:NUM_RECOMMENDED]


def titles_of(storage: Storage, catalog: Manifest, wanted: set[Any]) -> dict[Any, str]:
    """Titles of a few items; reads only the catalog files with these items, one at a time.

    Args:
        storage: root of the artifacts.
        catalog: manifest with the titles.
        wanted: item ids.

    Returns:
        Item id -> title, also for an item that the catalog lacks.
    """
    if not wanted:
        return {}
    titles = {item: f"item {item}, not in the catalog" for item in wanted}
    keys = pa.array(sorted(wanted))
    shards = np.unique(shard_of(stable_hash(keys), catalog.setting("catalog", "num_shards")))
    for shard in shards:
        name = shard_name(int(shard))
        if name in {entry.name for entry in catalog.files}:
            items = storage.read_table(catalog, name, columns=["item_id", "title"])
            items = items.filter(
                pc.is_in(items.column("item_id"), value_set=keys.cast(items.column("item_id").type))
            )
            pairs = zip(items.column("item_id").to_pylist(), items.column("title").to_pylist(), strict=True)
            titles |= {item: _shorten(title or f"item {item}") for item, title in pairs}
    return titles


def _shorten(title: str) -> str:
    return title if len(title) <= TITLE_WIDTH else title[: TITLE_WIDTH - 1] + "…"


def _seen(holdout: str) -> str:
    return {
        "leave_one_out": "all events but each user's last two (training.holdout leave_one_out)",
        "time": "all events before sequences.validation_from (training.holdout time)",
        "none": "every event (training.holdout none)",
    }[holdout]
