"""Small worlds on disk or S3, and a night over them through the library functions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.manifests import metadata_of
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import fingerprint
from tiger_ray.data.inputs import input_filesystem
from tiger_ray.settings.settings import Settings
from tiger_ray.stages.night import NIGHT, STAGE_NAMES, inputs_of
from tiger_ray.stages.stage import Stage, StageResult, run_stage

MONDAY, TUESDAY, WEDNESDAY = "2026-11-23", "2026-11-24", "2026-11-25"

TINY: dict[str, Any] = {
    "catalog": {
        "text": ["title", "brand", "category"],
        "category": "category",
        "available": "available",
        "num_shards": 3,
    },
    "quantizer": {"level_sizes": [16, 16, 16], "num_iterations": 8},
    "sequences": {"num_shards": 3, "max_events": 30},
    "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 64, "max_history": 8},
    "training": {
        "num_steps": 60,
        "global_batch_size": 64,
        "learning_rate": 0.01,
        "warmup_steps": 10,
        "checkpoint_every_steps": 30,
        "precision": "fp32",
    },
    "evaluation": {"min_ratio_to_popularity": 0.0},
}


def tiny_settings(root: str, data: str, date: str = MONDAY, **changed: Any) -> Settings:
    """Settings of a small fast night over `data`/catalog and `data`/events; `changed` is section -> values."""
    own: dict[str, Any] = {
        "storage": {"root": root},
        "catalog": {"uri": f"{data}/catalog"},
        "events": {"uri": f"{data}/events"},
    }
    sections = {
        name: {**TINY.get(name, {}), **own.get(name, {}), **changed.get(name, {})}
        for name in {*TINY, *own, *changed} - {"seed"}
    }
    return Settings(date=date, seed=changed.get("seed", 0), **sections)


def write(uri: str, *tables: pa.Table) -> None:
    """Each table as one Parquet file in the folder `uri`."""
    filesystem, path = input_filesystem(uri)
    filesystem.create_dir(path, recursive=True)
    for number, table in enumerate(tables):
        pq.write_table(table, f"{path}/part-{number:05d}.parquet", filesystem=filesystem)


@dataclass
class Night:
    """What every stage of one night left."""

    settings: Settings
    storage: Storage
    results: dict[str, StageResult] = field(default_factory=dict)

    def __getitem__(self, artifact: str) -> Manifest:
        return self.results[artifact].manifest

    @property
    def statuses(self) -> dict[str, str]:
        return {artifact: result.status for artifact, result in self.results.items()}

    def rows(self, artifact: str = "recommendations", prefix: str = "") -> pa.Table:
        """All rows of an artifact, of files whose name starts with `prefix`."""
        names = [entry.name for entry in self[artifact].files if entry.name.startswith(prefix)]
        return pa.concat_tables([self.storage.read_table(self[artifact], name) for name in names])


STAGES = STAGE_NAMES


def run_night(settings: Settings, until: str = "recommendations") -> Night:
    """The stages of the night up to and with `until`, without the quality gate."""
    storage = Storage(settings.storage.root)
    night = Night(settings, storage)
    for stage in NIGHT[: STAGES.index(until) + 1]:
        if not stage.left_out(settings):
            inputs = inputs_of(stage, settings, storage, night.results)
            night.results[stage.name] = run_stage(stage, settings, storage, **inputs)
    return night


def run(stage: Stage, settings: Settings, storage: Storage, *inputs: Manifest) -> StageResult:
    """One stage on these inputs, in the order of `stage.inputs`."""
    return run_stage(stage, settings, storage, **dict(zip(stage.inputs, inputs, strict=True)))


def published_dates(storage: Storage) -> set[tuple[str, str]]:
    """(artifact, date) of everything that is published under the root."""
    found = set()
    for artifact in STAGES:
        for file in storage.store.find(artifact):
            parts = file.path.split("/")
            if parts[-1] == "_manifest.json" and parts[1].startswith("date="):
                found.add((artifact, parts[1].removeprefix("date=")))
    return found


def publish(
    storage: Storage,
    artifact: str,
    files: dict[str, Any],
    metadata: dict[str, Any],
    *,
    date: str = MONDAY,
    inputs: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
) -> Manifest:
    """Tables and bytes as an artifact, as if its stage had written them; metadata not given is that of `metadata_of`."""
    digests = {
        name: hashlib.sha256(
            file if isinstance(file, bytes) else file.to_pandas().to_json().encode()
        ).hexdigest()
        for name, file in files.items()
    }
    run = storage.begin(artifact, fingerprint({"files": digests, "settings": settings, "metadata": metadata}))
    entries = [
        run.write_table(name, file) if isinstance(file, pa.Table) else run.write_file(name, file)
        for name, file in files.items()
    ]
    return storage.publish(
        run,
        date=date,
        files=entries,
        settings=settings or {},
        inputs=inputs or {},
        metadata=metadata_of(artifact, summary="") | metadata,
    )
