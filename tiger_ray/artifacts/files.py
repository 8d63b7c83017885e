"""Names of the files that more than one room reads."""

from __future__ import annotations

from tiger_ray.artifacts.manifest import FileEntry


def shard_name(shard: int) -> str:
    """File name of a shard, the same in every artifact."""
    return f"shard-{shard:05d}.parquet"


def shard_number(entry: FileEntry) -> int:
    """Number of a shard, from the name that `shard_name` gave it."""
    return int(entry.name.removeprefix("shard-").removesuffix(".parquet"))


MODEL_FILES = ("model.safetensors", "config.json")
