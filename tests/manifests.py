"""Manifests that were never written: of each artifact, with all its metadata."""

from __future__ import annotations

import json
from typing import Any

from tiger_ray.artifacts.manifest import FileEntry, Manifest

DATE, RUN = "2026-11-23", "0123456789abcdef" * 2

MEASURED = {"users": 4, "recall@5": 0.25, "ndcg@5": 0.125, "recall@10": 0.5, "ndcg@10": 0.25, "mrr@10": 0.2}
PROTOCOL = {
    "split": "leave-one-out, test",
    "ranking": "full, item level, constrained beam search",
    "beam_width": 10,
    "items": "most probable",
    "temperature": 1.0,
    "model_history": 20,
    "history_masked": False,
    "max_history": None,
    "ties": "item_id",
    "unseen_targets": "keep",
    "users": "all",
}
REGISTRY = {
    "items": 9,
    "new_items": 2,
    "disambiguated_share": 0.25,
    "level_sizes": [4, 4, 8],
    "space": "abc-4x4x8",
    "item_id_type": "string",
    "appended_to": None,
}
TRAINED = {"holdout": "leave_one_out", "step": 60, "loss": 2.5, "recall@10": 0.5, "ndcg@10": 0.25}
METADATA: dict[str, dict[str, Any]] = {
    "catalog": {"items": 8, "empty_text": 1, "available": 7, "id_type": "string"},
    "events": {
        "events": 30,
        "nulls": 1,
        "unknown": 2,
        "unwanted_kind": 3,
        "files": [{"path": "/e/part-0.parquet", "bytes": 100, "version": "1"}],
        "user_id_type": "string",
        "timestamp_unit": "us",
    },
    "embeddings": {"dim": 8, "encoder": "e" * 64},
    "quantizer": {"level_sizes": [4, 4], "kind": "residual_kmeans"},
    "semantic_ids": {**REGISTRY, "eligible": 7},
    "sequences": {
        "users": 6,
        "user_id_type": "string",
        "events": 27,
        "users_without_history": 1,
        "examples_none": 22,
        "examples_leave_one_out": 12,
        "validation_users_leave_one_out": 4,
        "test_users_leave_one_out": 4,
        "validation_tied_leave_one_out": 2,
        "test_tied_leave_one_out": 1,
    },
    "model": {**TRAINED, "space": "abc-4x4x8", "level_sizes": [4, 4, 8]},
    "model-sasrec-softmax": TRAINED,
    "evaluation": {
        "model": MEASURED,
        "popularity": MEASURED,
        "protocol": PROTOCOL,
        "periods": None,
        "training": "step 60 of 60, batches of 64, seed 0",
        "tied_share": 0.25,
    },
    "recommendations": {
        "users": 6,
        "fallback_users": 1,
        "short_lists": 0,
        "eligible_items": 7,
        "scoring": "f" * 64,
        "top_k": 10,
        "form": "wide",
        "model_version": RUN,
        "semantic_ids_version": RUN,
        "holdout": "leave_one_out",
        "evaluation": {**MEASURED, "protocol": PROTOCOL},
    },
}
TIME_SPLIT = {
    "examples_time": 10,
    "validation_users_time": 3,
    "test_users_time": 2,
    "validation_tied_time": 1,
    "test_tied_time": 0,
    "validation_from": "2026-05-01T00:00:00Z",
    "test_from": "2026-06-01T00:00:00Z",
}


def metadata_of(artifact: str, **changed: Any) -> dict[str, Any]:
    """All metadata of an artifact, some of it changed."""
    known = METADATA.get(artifact) or METADATA[artifact.partition("-")[0]]
    return {"summary": "a summary", **json.loads(json.dumps(known)), **changed}


def manifest_of(artifact: str, metadata: dict[str, Any] | None = None, **content: Any) -> Manifest:
    """A manifest of no stored run; its settings have what a reader of evaluations asks for."""
    return Manifest(
        **{
            "artifact": artifact,
            "date": DATE,
            "run_id": RUN,
            "fingerprint": "f" * 64,
            "files": (),
            "settings": {"seed": 0, "evaluation": {"ks": [5, 10]}},
            "inputs": {},
            "metadata": metadata_of(artifact) if metadata is None else metadata,
            "software": {},
            **content,
        }
    )


def entry_of(name: str, content: str = "0", **facts: int) -> FileEntry:
    """A file of `content`, one hex digit, in the run of `manifest_of`."""
    path = f"_runs/{RUN}/a-{content}/{name}"
    return FileEntry(path=path, bytes=1, rows=1, sha256=content * 64, facts=facts)
