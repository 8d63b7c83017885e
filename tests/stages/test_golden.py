"""What a stage writes changes only together with its format version, because a night takes older runs for its own.

A run of older code is reused if its fingerprint is tonight's, and the code is in the fingerprint by the format
version alone. So `golden.json` keeps, of each artifact of a few tiny nights, the format version, the layout of
its files and a digest of their content, and nothing may change while the version stays.

The content is compared by its rows and values, not by the bytes of Parquet, which belong to the version of
pyarrow. Floats are left out, because another CPU rounds them otherwise; of what follows from them only the
layout is compared. Everything is read from the published root, so the test holds for any arrangement of modules.

After a raised version: `TIGER_GOLDEN=write python -m pytest tests/stages/test_golden.py`. That writes nothing as
long as something changed under an unchanged version; whoever changes this test itself removes the file first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import runpy
import signal
import struct
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# The only line that knows a module of tiger_ray, because the nights run by the jobs.
from tiger_ray.stages.night import NIGHT

pytestmark = pytest.mark.ray

FORMAT_VERSIONS = {stage.name: stage.format_version for stage in NIGHT}
JOBS = Path(__file__).parents[2] / "jobs"
GOLDEN = Path(__file__).with_name("golden.json")
COMMAND = "TIGER_GOLDEN=write python -m pytest tests/stages/test_golden.py"

TINY: dict[str, Any] = {
    "catalog": {
        "text": ["title", "brand"],
        "category": "category",
        "available": "available",
        "num_shards": 2,
    },
    "embeddings": {"dim": 16},
    "quantizer": {
        "level_sizes": [4, 4],
        "num_iterations": 2,
        "latent_dim": 4,
        "hidden_dims": [8],
        "num_epochs": 2,
    },
    "semantic_ids": {"min_usage": 0.0, "min_perplexity": 0.0, "max_disambiguated_share": 1.0},
    "events": {"max_unknown_share": 0.5, "max_null_share": 0.5},
    "sequences": {"num_shards": 2, "max_events": 6},
    "model": {"num_layers": 1, "d_model": 8, "num_heads": 1, "d_kv": 8, "d_ff": 8, "max_history": 4},
    "training": {
        "num_steps": 2,
        "global_batch_size": 8,
        "warmup_steps": 1,
        "checkpoint_every_steps": 1,
        "precision": "fp32",
    },
    "evaluation": {"min_ratio_to_popularity": 0.0, "max_drop": 1.0},
}

OTHERWISE: dict[str, Any] = {
    "events": {**TINY["events"], "ties": "item_id"},
    "sequences": {**TINY["sequences"], "validation_from": "2026-02-02", "test_from": "2026-02-03"},
    "model": {**TINY["model"], "num_user_buckets": 3},
    "training": {**TINY["training"], "holdout": "none"},
    "recommendations": {"form": "long", "top_k": 5},
}
"""The second night, on a world that has grown: moments for a split by time, no evaluation, other ties and rows."""

DATES = {
    "first": "2026-11-23",
    "second": "2026-11-24",
    "residual_kmeans": "2026-12-01",
    "rqvae": "2026-12-02",
    "lsh": "2026-12-03",
    "flat": "2026-12-04",
}
KINDS = tuple(DATES)[2:]
"""Quantizers whose nights end with their Semantic IDs; the first two nights have those of a hash, kind `random`."""

PORTABLE = ("catalog", "events", "embeddings", "sequences", "evaluation-popularity")
"""Artifacts that owe nothing to a rounded number but their floats; so do the Semantic IDs of `random` and `flat`."""


def catalog(num_items: int) -> pa.Table:
    numbers = range(num_items)
    return pa.table(
        {
            "item_id": pa.array([f"item {n * 7 % num_items:02d}" for n in numbers]),
            "title": pa.array([None if n % 19 == 3 else f"Título {n} & more" for n in numbers]),
            "brand": pa.array([f"brand {n % 5}" for n in numbers]),
            "category": pa.array([["all", f"category {n % 3}"] for n in numbers]),
            "available": pa.array([n % 11 != 5 for n in numbers]),
        }
    )


def events(num_users: int, num_items: int) -> pa.Table:
    """Users of 0 to 8 known items, with equal moments, repeats, nulls and an item of no catalog."""
    first = datetime(2026, 2, 1)
    rows: list[tuple[Any, ...]] = [
        (
            f"user {user:02d}",
            f"item {(user * 5 + step * step) % num_items:02d}",
            first + timedelta(hours=(user % 7) * 8 + step // 2 * 12),
        )
        for user in range(num_users)
        for step in range(user % 9)
    ]
    rows += [("user 00", "no item", first), ("user 01", None, first), (None, "item 00", first), *rows[:9]]
    user_id, item_id, timestamp = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": pa.array(user_id),
            "item_id": pa.array(item_id),
            "timestamp": pa.array(timestamp, pa.timestamp("us")),
        }
    )


WORLDS = {"small": (catalog(40), events(27, 40)), "grown": (catalog(46), events(31, 46))}


def publish_nights(folder: Path) -> Path:
    """The root under which everything is published that is compared."""
    root = folder / "root"

    def settings(night: str, kind: str, world: str = "small", **changed: Any) -> Path:
        sections = {"storage": {"root": str(root)}, **TINY, **changed}
        sections["quantizer"] = {**TINY["quantizer"], "kind": kind}
        for name in ("catalog", "events"):
            sections[name] = {**sections[name], "uri": f"{folder}/{world}/{name}.parquet"}
        file = folder / f"{night}.yaml"
        file.write_text(json.dumps({"date": DATES[night], **sections}), encoding="utf-8")
        return file

    first = settings("first", "random")
    run_job("nightly", first)
    run_job("baseline", first, "--baseline.kind", "popularity")
    run_job("nightly", settings("second", "random", "grown", **OTHERWISE))
    for kind in KINDS:
        for job in ("embed_catalog", "fit_quantizer", "assign_semantic_ids"):
            run_job(job, settings(kind, kind))
    return root


def run_job(name: str, settings: Path, *words: str) -> None:
    """A job of the repository in this process, on its Ray."""
    logger, on_sigterm = logging.getLogger("tiger_ray"), signal.getsignal(signal.SIGTERM)
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"jobs/{name}.py", "--config", str(settings), *words])
        try:
            runpy.run_path(str(JOBS / f"{name}.py"), run_name="__main__")
        except SystemExit as done:
            if done.code:
                raise
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)
            logger.setLevel(level)


class Artifact(NamedTuple):
    """What `golden.json` keeps of one artifact of one night."""

    format_version: int
    files: dict[str, dict[str, Any]]
    """Kind of file -> its `layout`, in lines, and the digest `content` if that is portable; `inputs` and `metadata`
    are those of the manifest."""

    @property
    def inputs(self) -> list[str]:
        """Names of the artifacts it was made from."""
        return self.files.get("inputs", {"layout": []})["layout"]


def world_digest() -> str:
    tables = [[str(table.schema), table.to_pylist()] for world in WORLDS.values() for table in world]
    return digest([tables, TINY, OTHERWISE, DATES])


@pytest.fixture(scope="module")
def published(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """What the code of today writes; kept in the golden file where its version allows, if that is wished."""
    folder = tmp_path_factory.mktemp("golden")
    for name, (items, log) in WORLDS.items():
        (folder / name).mkdir()
        pq.write_table(items, folder / name / "catalog.parquet")
        pq.write_table(log, folder / name / "events.parquet")
    found = dict(artifacts(publish_nights(folder)))
    if os.environ.get("TIGER_GOLDEN") == "write":
        write(found)
    return found


def artifacts(root: Path) -> Iterator[tuple[str, Artifact]]:
    """Name -> what is published, the form of manifests among it."""
    night_of = {date: night for night, date in DATES.items()}
    for file in sorted(root.glob("*/date=*/_manifest.json")):
        manifest = json.loads(file.read_text(encoding="utf-8"))
        name, night = manifest["artifact"], night_of[manifest["date"]]
        if night in KINDS and name not in ("quantizer", "semantic_ids"):
            continue  # the same as of the first night
        portable = name in PORTABLE or (name == "semantic_ids" and night in ("first", "second", "flat"))
        # a night that ends with its Semantic IDs has reused the first one's catalog
        inputs = [
            f"{'first' if night in KINDS and source != 'quantizer' else night}/{source}"
            for source in sorted(manifest["inputs"])
        ]
        files = {"inputs": {"layout": inputs}, "metadata": {"layout": sorted(manifest["metadata"])}}
        for kind, entries in by_kind(manifest["files"]).items():
            paths = [root / name / entry["path"] for entry in entries]
            files[kind] = {"layout": sorted({line for path in paths for line in layout(path)})}
            if portable:
                told = [
                    [entry["rows"], entry["facts"], content(path)]
                    for entry, path in zip(entries, paths, strict=True)
                ]
                files[kind]["content"] = digest(told)
        yield f"{night}/{name}", Artifact(FORMAT_VERSIONS[name.split("-")[0]], files)
    free = {name: {} for name in ("settings", "inputs", "metadata")}  # each artifact has its own
    form = {"layout": sorted(lines(manifest | free | {"files": [manifest["files"][0] | {"facts": {}}]}))}
    yield "manifest", Artifact(manifest["format_version"], {"manifest": form})


def by_kind(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Files whose names differ by their numbers alone, in the order of their names."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: str(entry["path"]).rsplit("/", 1)[-1]):
        kinds.setdefault(re.sub(r"\d+", "#", entry["path"].rsplit("/", 1)[-1]), []).append(entry)
    return kinds


def layout(path: Path) -> Iterator[str]:
    """Names and types of all that a file holds, but none of its values."""
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        yield f"names: {', '.join(file.schema_arrow.names)}"
        for field in file.schema_arrow:
            yield f"{field.name}: {field.type}{'' if field.nullable else ' not null'}"
        if file.schema_arrow.metadata:
            yield f"metadata: {sorted(file.schema_arrow.metadata)}"
        groups = (file.metadata.row_group(n) for n in range(file.num_row_groups))
        yield from {
            f"compression: {group.column(n).compression}"
            for group in groups
            for n in range(group.num_columns)
        }
    elif path.suffix == ".safetensors":
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, tensor in json.loads(data[8 : 8 + length]).items():
            yield f"{name}: {sorted(tensor) if name == '__metadata__' else (tensor['dtype'], tensor['shape'])}"
    else:
        assert path.suffix == ".json", f"how does one compare {path.name}?"
        yield from lines(json.loads(path.read_text(encoding="utf-8")))


def lines(value: Any, name: str = "") -> Iterator[str]:
    """Keys of JSON with the types of their values; numbers in keys are data."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from lines(part, re.sub(r"\d+", "#", f"{name}.{key}" if name else key))
    elif isinstance(value, list):
        for part in value:
            yield from lines(part, f"{name}[]")
    if not value or not isinstance(value, dict | list):
        yield f"{name}: {type(value).__name__}"


def content(path: Path) -> Any:
    """Rows or values of a file, without floats."""
    if path.suffix == ".json":
        return without_floats(json.loads(path.read_text(encoding="utf-8")))
    table = pq.read_table(path)
    return table.drop_columns([f.name for f in table.schema if has_floats(f.type)]).to_pylist()


def has_floats(kind: pa.DataType) -> bool:
    parts = [kind.field(n).type for n in range(kind.num_fields)]
    return pa.types.is_floating(kind) or any(has_floats(part) for part in parts)


def without_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_floats(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_floats(part) for part in value]
    return "a float" if isinstance(value, float) else value


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read() -> tuple[str, dict[str, Artifact]]:
    """Digest of the world, and name -> artifact, as the golden file has them."""
    if not GOLDEN.exists():
        return "", {}
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return kept["world"], {name: Artifact(**artifact) for name, artifact in kept["artifacts"].items()}


def write(found: dict[str, Artifact]) -> None:
    """Replace the golden file, unless a format version is to be raised first: then the tests say so."""
    _, kept = read()
    same = [
        name for name in kept.keys() & found.keys() if kept[name].format_version == found[name].format_version
    ]
    if any(changes(name, kept, found) for name in same):
        return
    told = {
        "world": world_digest(),
        "artifacts": {name: artifact._asdict() for name, artifact in found.items()},
    }
    text = json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False)
    GOLDEN.write_text(f"{text}\n", encoding="utf-8")


def changes(name: str, kept: dict[str, Artifact], found: dict[str, Artifact]) -> str:
    """The files of an artifact that differ, and in what; empty if its code has changed nothing.

    Other content of an input changes the fingerprint by itself, and with it the content of what follows.
    """
    before, now = kept[name], found[name]
    of_input = any(kept.get(source) != found.get(source) for source in upstream(name, found))
    told = []
    for kind in sorted(before.files.keys() | now.files.keys()):
        old, new = before.files.get(kind), now.files.get(kind)
        if old is None or new is None:
            told.append(f"{kind} {'is new' if old is None else 'is gone'}")
        elif old["layout"] != new["layout"]:
            gone = [line for line in old["layout"] if line not in new["layout"]]
            came = [line for line in new["layout"] if line not in old["layout"]]
            told.append(f"the layout of {kind}: {gone} became {came}")
        elif old != new and not of_input:
            told.append(f"the content of {kind}")
    return "; ".join(told)


def upstream(name: str, found: dict[str, Artifact]) -> set[str]:
    """Everything that an artifact was made from, directly or not."""
    sources = set(found[name].inputs) & found.keys()
    return sources.union(*(upstream(source, found) for source in sources))


def test_the_golden_file_knows_every_artifact_and_no_other(published: dict[str, Artifact]) -> None:
    world, kept = read()
    assert world == world_digest(), (
        f"the nights of this test are others now; remove {GOLDEN.name}, then: {COMMAND}"
    )
    assert kept.keys() == published.keys(), f"after a look at the difference: {COMMAND}"


@pytest.mark.parametrize("name", sorted(read()[1]))
def test_bytes_change_only_with_the_format_version(published: dict[str, Artifact], name: str) -> None:
    _, kept = read()
    before, now = kept[name].format_version, published[name].format_version
    found = changes(name, kept, published)
    stage = name.split("/")[-1].split("-")[0]
    where = "of the manifest" if name == "manifest" else f"of stage {stage!r}"
    assert now == before, (
        f"the format_version {where} is {now}, and {GOLDEN.name} still holds {before}, so nothing guards it: {COMMAND}"
    )
    assert not found, (
        f"the bytes of {name} changed ({found}), and its format_version is still {now}: older runs would be taken "
        f"for the new ones. Raise the format_version {where} and write the golden file again ({COMMAND}), "
        "or undo the change"
    )
