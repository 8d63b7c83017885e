"""Stage `recommendations`: users -> top-K rows in Parquet.

Each Ray Data actor holds the night's ranker, and turns one shard of users into one file.

B users of a shard, K items per user, I id_length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.lineage import require_same_id_space, require_same_registry
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import (
    EvaluationMetadata,
    ModelMetadata,
    RecommendationsMetadata,
    SemanticIdsMetadata,
)
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.shards import map_shards
from tiger_ray.core.arrays import ranges
from tiger_ray.core.hashing import fingerprint
from tiger_ray.data.histories import user_shards
from tiger_ray.errors import ArtifactError
from tiger_ray.published.evaluation import evaluation_of
from tiger_ray.published.ranker import open_ranker
from tiger_ray.rankers.base import FALLBACK, NO_ITEM, Found, Histories
from tiger_ray.settings.recommendations import RecommendationsSettings
from tiger_ray.settings.settings import Settings
from tiger_ray.stages.gate import require_evaluated
from tiger_ray.stages.stage import Computed, Context, Stage, sections_of

FORMAT_VERSION = 2

SLOTS = 4_000_000
"""Most recommendations in one Arrow array: the text of an array is limited to 2 GiB, so ids may have 500 bytes."""


def _check(context: Context) -> None:
    inputs = context.inputs
    require_same_id_space(inputs["model"], inputs["semantic_ids"])
    require_same_registry(inputs["sequences"], inputs["semantic_ids"])


def _scoring_fingerprint(context: Context) -> str:
    """Fingerprint of everything that decides which items are recommended, which is everything except the date."""
    settings = context.settings
    return fingerprint(
        {
            "format_version": FORMAT_VERSION,
            "inputs": {name: manifest.digest for name, manifest in context.inputs.items()},
            "settings": {
                name: section.fingerprint() for name, section in sections_of(STAGE, context).items()
            },
            "seed": settings.seed if settings.decoding.sample else None,
        }
    )


def _compute(run: Run, context: Context) -> Computed:
    settings, storage, inputs, scoring = (
        context.settings,
        context.storage,
        context.inputs,
        _scoring_fingerprint(context),
    )
    shards = user_shards(inputs["sequences"])
    twin = _find_twin(storage, scoring)
    versions = {
        "model_version": inputs["model"].run_id,
        "semantic_ids_version": inputs["semantic_ids"].run_id,
    }
    if twin is not None:
        entries = map_shards(
            run,
            _RedateShard,
            {
                "storage": storage,
                "twin": twin,
                "values": {"date": settings.date, **versions},
                "group_rows": _group_rows(settings.recommendations),
            },
            shards=twin.files,
            num_workers=settings.decoding.num_workers,
            num_cpus=1,
            use_gpu=False,
        )
    else:
        entries = map_shards(
            run,
            _ScoreShard,
            {"storage": storage, "settings": settings, "inputs": dict(inputs)},
            shards=shards,
            num_workers=settings.decoding.num_workers,
            num_cpus=settings.decoding.cpus_per_worker,
            use_gpu=settings.decoding.use_gpu,
        )
    users = sum(entry.rows for entry in shards)
    facts = {
        name: sum(entry.fact(name) for entry in entries)
        for name in ("users", "fallback_users", "short_lists")
    }
    assert facts["users"] == users, f"{users} users were to be scored, {facts['users']} were"
    evaluated = evaluation_of(storage, settings, inputs["model"])
    top_k, eligible = settings.recommendations.top_k, SemanticIdsMetadata.of(inputs["semantic_ids"]).eligible
    summary = f"{users:,} users, {facts['fallback_users']:,} by popularity"
    if facts["short_lists"]:
        summary += f", {facts['short_lists']:,} with fewer than {top_k} items ({eligible:,} may be recommended at all)"
    if twin is not None:
        summary += ", same as an earlier night's but for the date"
    return entries, {
        "summary": summary,
        **facts,
        "eligible_items": eligible,
        "scoring": scoring,
        "top_k": top_k,
        "form": settings.recommendations.form,
        **versions,
        "holdout": ModelMetadata.of(inputs["model"]).holdout,
        # The quality gate of the next night reads these metrics.
        "evaluation": None if evaluated is None else _metrics_for_gate(EvaluationMetadata.of(evaluated)),
    }


def _metrics_for_gate(evaluation: EvaluationMetadata) -> dict[str, Any]:
    return {**evaluation.model.as_dict(), "protocol": evaluation.protocol.as_dict()}


def _find_twin(storage: Storage, scoring: str) -> Manifest | None:
    """The last recommendations if only the date differs from tonight's, else None."""
    try:
        last = storage.resolve("recommendations")
        same = RecommendationsMetadata.of(last).scoring == scoring
    except ArtifactError:
        return None
    return last if same and storage.is_intact(last) else None


def _group_rows(settings: RecommendationsSettings) -> int:
    """Rows that hold `SLOTS` recommendations."""
    return SLOTS if settings.form == "long" else max(SLOTS // settings.top_k, 1)


class _RedateShard:
    """Copies one file of recommendations with a new date and the versions of that night."""

    def __init__(
        self, run: Run, storage: Storage, twin: Manifest, values: Mapping[str, str], group_rows: int
    ) -> None:
        self._run, self._storage, self._twin, self._values = run, storage, twin, values
        self._group_rows = group_rows

    def __call__(self, shard: FileEntry) -> FileEntry:
        table = self._storage.read_table(self._twin, shard)
        parts = [
            min(self._group_rows, table.num_rows - at) for at in range(0, table.num_rows, self._group_rows)
        ]
        for name, value in self._values.items():
            place = table.schema.get_field_index(name)
            repeated = pa.chunked_array([pa.repeat(value, rows) for rows in parts], pa.string())
            table = table.set_column(place, table.schema.field(name), repeated)
        return self._run.write_table(shard.name, table, shard.facts, self._group_rows)


class _ScoreShard:
    """Scores one file of users."""

    def __init__(
        self, run: Run, storage: Storage, settings: Settings, inputs: Mapping[str, Manifest]
    ) -> None:
        self._run, self._storage, self._settings, self._inputs = run, storage, settings, inputs
        self._ranker, self._ids, _ = open_ranker(storage, settings, **inputs)

    def __call__(self, shard: FileEntry) -> FileEntry:
        settings = self._settings.recommendations
        users = self._storage.read_table(self._inputs["sequences"], shard.name).combine_chunks()
        found = self._ranker.recommend(_histories(users), settings.top_k).best_first()
        step = max(SLOTS // settings.top_k, 1)
        user_id = users.column("user_id")
        parts = [slice(start, start + step) for start in range(0, max(len(found), 1), step)]
        table = pa.concat_tables([self._table(user_id[part], found.take(part)) for part in parts])
        facts = {
            "users": len(found),
            "fallback_users": int((found.source_BK[:, 0] == FALLBACK).sum()),
            "short_lists": int((found.item_BK[:, -1] == NO_ITEM).sum()),
        }
        return self._run.write_table(shard.name, table, facts, _group_rows(settings))

    def _table(self, user_id: pa.ChunkedArray, found: Found) -> pa.Table:
        """Lists of items as rows of `schemas.recommendations`."""
        there_BK = found.item_BK != NO_ITEM
        length_B = there_BK.sum(axis=1)
        item_index = found.item_BK[there_BK]
        item_id = self._ids.item_ids(item_index)
        score = pa.array(found.score_BK[there_BK])
        codes = self._ids.codes_NI[item_index]
        starts = np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32)
        semantic_id = pa.ListArray.from_arrays(pa.array(starts), pa.array(codes.ravel()))
        source = pa.array(np.array(schemas.SOURCES)[found.source_BK[there_BK]])
        date, model, ids = (
            self._settings.date,
            self._inputs["model"].run_id,
            self._inputs["semantic_ids"].run_id,
        )
        if self._settings.recommendations.form == "long":
            row = np.repeat(np.arange(len(length_B)), length_B)
            rank = (ranges(np.zeros_like(length_B), length_B) + 1).astype(np.int16)
            columns = [user_id.take(pa.array(row)), pa.array(rank), item_id, score, semantic_id, source]
            schema = schemas.recommendations_long(user_id.type, item_id.type)
        else:
            offsets = pa.array(np.concatenate([[0], np.cumsum(length_B)]).astype(np.int32))
            lists = [
                pa.ListArray.from_arrays(offsets, values) for values in (item_id, score, semantic_id, source)
            ]
            columns = [user_id, *lists]
            schema = schemas.recommendations(user_id.type, item_id.type)
        num_rows = len(columns[0])
        columns += [pa.repeat(value, num_rows) for value in (date, model, ids)]
        return pa.table(columns, names=schema.names).cast(schema)


def _histories(users: pa.Table) -> Histories:
    """Histories of a user shard, as `schemas.sequences`."""
    history = users.column("history").combine_chunks()
    lengths_B = np.diff(history.offsets.to_numpy()).astype(np.int64)
    return Histories(history.flatten().to_numpy(), lengths_B, users.column("user_hash").to_numpy())


STAGE = Stage(
    name="recommendations",
    does="model and histories -> the best items of every user",
    inputs=("model", "semantic_ids", "sequences"),
    sections=("decoding", "recommendations"),
    gate=lambda context: require_evaluated(context.settings, context.storage, context.inputs["model"]),
    check=_check,
    source=lambda context: {"date": context.settings.date},
    draws=lambda settings: settings.decoding.sample,
    compute=_compute,
    format_version=FORMAT_VERSION,
)
"""Publishes `recommendations`: the best items to follow the whole history of each user.

Raises:
    ArtifactError: the model was trained on other Semantic IDs, or the histories were built on other Semantic IDs.
"""
