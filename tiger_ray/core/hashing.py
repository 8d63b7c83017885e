"""Hashes that are equal in every process and on every machine, and the shard that a hash belongs to.

N ids, B items in batch, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa


def stable_hash(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Hash of each id, (N,)."""
    if isinstance(ids, pa.ChunkedArray):  # one array of all ids might exceed 2 GiB
        return np.concatenate([np.zeros(0, np.uint64), *map(stable_hash, ids.chunks)])
    return pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)


def shard_of(key_N: npt.NDArray[np.uint64], num_shards: int) -> npt.NDArray[np.int32]:
    """Shard of each hash, 0 to `num_shards` - 1, (N,): the shards are equally long ranges of hashes.

    Hence the order of shards is the order of hashes, for any number of shards.
    """
    high_N = key_N >> np.uint64(32)
    return (high_N * np.uint64(num_shards) >> np.uint64(32)).astype(np.int32)


def row_hash(embedding_BD: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """Hash of each embedding, (B, D) to (B,): equal embeddings have equal hashes.

    Source: multilinear hashing (Lemire and Kaser 2014).
    """
    # -0.0 becomes 0.0, so that equal rows have equal bits.
    bits_BD = np.ascontiguousarray(embedding_BD + np.float32(0)).view(np.uint32)
    dimension_D = np.arange(embedding_BD.shape[1], dtype=np.uint64)
    return splitmix64(bits_BD.astype(np.uint64) @ (splitmix64(dimension_D) | np.uint64(1)))


def splitmix64(key_N: npt.NDArray[np.uint64], seed: int = 0) -> npt.NDArray[np.uint64]:
    """A new hash of each hash, (N,), independent of the given hash and of the new hash with another seed.

    `decoding.sampling.splitmix64` computes the same in torch.

    Source: the finalizer of SplitMix64 (Steele et al. 2014).
    """
    key_N = key_N + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    key_N = (key_N ^ (key_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key_N = (key_N ^ (key_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key_N ^ (key_N >> np.uint64(31))


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `parts`: equal parts in any order give the same 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Indented JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
