"""The scoring stage on Ray beside bare decoders, each worker on a core of its own."""

from __future__ import annotations

import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from planted import Users, first, planted_codes, planted_decoder, planted_model

from tiger_ray.settings.settings import Settings

CORES = len(os.sched_getaffinity(0))
BEAM_WIDTH, PRECISION, NUM_SHARDS = 10, "bf16", 8
SPAWN = get_context("spawn")


def shards_of(users: Users) -> list[Users]:
    items, lengths_B = users
    lengths = np.split(lengths_B, NUM_SHARDS)
    ends = np.cumsum([part.sum() for part in lengths])
    return list(zip(np.split(items, ends[:-1]), lengths, strict=True))


def bare_users_per_s(users: Users) -> float:
    """Users per second of decoders with one thread, all at once, each with a share of the shards."""
    together, answers = SPAWN.Barrier(CORES), SPAWN.Queue()
    processes = [
        SPAWN.Process(target=decode_bare, args=(shards_of(users)[rank::CORES], together, answers))
        for rank in range(CORES)
    ]
    for process in processes:
        process.start()
    rates = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def decode_bare(shards: list[Users], together: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    decoder = planted_decoder(BEAM_WIDTH, PRECISION)
    decoder.recommend(*first(shards[0], 200), None, BEAM_WIDTH)
    together.wait()
    start = time.perf_counter()
    for shard in shards:
        decoder.recommend(*shard, None, BEAM_WIDTH)
    answers.put(sum(len(lengths_B) for _, lengths_B in shards) / (time.perf_counter() - start))


def job_users_per_s(root: str, users: Users) -> tuple[float, float]:
    """Users per second of the whole stage, and the rate after every worker has finished a shard."""
    import ray

    from tiger_ray.artifacts.lineage import registry_of
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.stages import recommendations
    from tiger_ray.stages.stage import run_stage

    settings = Settings(
        date="2026-01-01",
        storage={"root": root},
        catalog={"uri": "/planted"},
        events={"uri": "/planted"},
        decoding={"beam_width": BEAM_WIDTH, "precision": PRECISION, "num_workers": CORES},
        recommendations={"top_k": BEAM_WIDTH},
        serving={"max_k": BEAM_WIDTH},
    )
    inputs: dict[str, Any] = {}
    for name, planted in planted_inputs(users).items():
        made_of = {"semantic_ids": registry_of(inputs["semantic_ids"]).digest} if name == "sequences" else {}
        inputs[name] = publish(Storage(root), name, *planted, made_of)
    start = time.monotonic()
    manifest = run_stage(recommendations.STAGE, settings, Storage(root), **inputs).manifest
    seconds = time.monotonic() - start
    ray.shutdown()
    files = [
        (Path(root, "recommendations", entry.path).stat().st_mtime, entry.rows) for entry in manifest.files
    ]
    finished, rows = zip(*sorted(files), strict=True)
    return len(users[1]) / seconds, sum(rows[CORES:]) / (finished[-1] - finished[CORES - 1])


def planted_inputs(users: Users) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Files and metadata of the artifacts that the scoring stage reads."""
    from tiger_ray.artifacts import schemas
    from tiger_ray.ids import semantic_ids

    model, codes_NI = planted_model(), planted_codes()
    item_index, counts = np.unique(users[0], return_counts=True)
    popularity = [item_index[:1000], counts[:1000], counts[:1000]]
    sequences = {"popularity.parquet": table_of(popularity, schemas.popularity())}
    for number, (items, lengths_B) in enumerate(shards_of(users)):
        offsets = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int32)
        user_id = number * len(lengths_B) + np.arange(len(lengths_B))
        columns = [user_id, user_id, pa.ListArray.from_arrays(pa.array(offsets), pa.array(items))]
        sequences[f"shard-{number:05d}.parquet"] = table_of(columns, schemas.sequences(pa.int64()))
    item_id = pa.array(np.arange(len(codes_NI)))
    ids = {
        "segment-00000-shard-00000.parquet": semantic_ids.segment_of(
            0, item_id, codes_NI[:, :-1], codes_NI[:, -1]
        ),
        "eligible.parquet": pa.table({"eligible": np.ones(len(codes_NI), bool)}),
    }
    ids_facts = {
        "space": "planted",
        "level_sizes": list(model.vocabulary.level_sizes),
        "item_id_type": "int64",
        "items": len(codes_NI),
        "eligible": len(codes_NI),
        "new_items": len(codes_NI),
        "disambiguated_share": 0.0,
        "appended_to": None,
    }
    model_facts = {
        "space": "planted",
        "holdout": "none",
        "step": 0,
        "loss": 0.0,
        "level_sizes": list(model.vocabulary.level_sizes),
    }
    not_scored = [
        "users_without_history",
        "examples_none",
        "examples_leave_one_out",
        "validation_users_leave_one_out",
        "test_users_leave_one_out",
        "validation_tied_leave_one_out",
        "test_tied_leave_one_out",
    ]
    sequences_facts = {
        "users": len(users[1]),
        "events": len(users[0]),
        "user_id_type": "int64",
        **dict.fromkeys(not_scored, 0),
    }
    return {
        "model": (model.to_files(), model_facts),
        "semantic_ids": (ids, ids_facts),
        "sequences": (sequences, sequences_facts),
    }


def table_of(columns: list[Any], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(column) for column in columns]
    return pa.table(
        [array.cast(kind) for array, kind in zip(arrays, schema.types, strict=True)], schema=schema
    )


def publish(
    storage: Any, artifact: str, files: dict[str, Any], metadata: dict[str, Any], inputs: dict[str, str]
) -> Any:
    """Publish tables and bytes as an artifact."""
    run = storage.begin(artifact, f"planted-{artifact}")
    entries = [
        run.write_file(name, file) if isinstance(file, bytes) else run.write_table(name, file)
        for name, file in files.items()
    ]
    facts = {"summary": "planted", **metadata}
    return storage.publish(run, date="2026-01-01", files=entries, settings={}, inputs=inputs, metadata=facts)
