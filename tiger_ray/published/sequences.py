"""The published histories, read without Ray.

E events, U users of a shard, B users, S shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.arrays import ranges
from tiger_ray.core.hashing import splitmix64
from tiger_ray.data.histories import columns_for, cuts_of, user_shards
from tiger_ray.errors import DataError
from tiger_ray.rankers.base import Histories, Ranker
from tiger_ray.training.examples import Corpus, Examples
from tiger_ray.training.validation import Validation


def read_corpus(storage: Storage, sequences: Manifest, shards: Sequence[FileEntry], holdout: str) -> Corpus:
    """Histories of some user shards, without the events that the holdout hides.

    Args:
        storage: where the histories are published.
        sequences: manifest of the histories.
        shards: user shards to read.
        holdout: section `training`.

    Raises:
        ArtifactError: a shard is missing or damaged.
    """
    # Fill one array shard by shard: joining parts at the end would take twice the memory.
    item_index_E = np.empty(sum(entry.fact("events") for entry in shards), np.int32)
    num_events, num_examples, ends, hashes = 0, 0, [], []
    for entry in shards:
        columns = [*columns_for(holdout), "user_hash"]
        table = storage.read_table(sequences, entry, columns=columns).combine_chunks()
        history = table.column("history").combine_chunks()
        whole_U = np.diff(history.offsets.to_numpy()).astype(np.int64)
        seen_U = cuts_of(table, holdout).seen_B
        useful_U = seen_U > 1
        seen_U = np.where(useful_U, seen_U, 0)
        # A mask takes one byte per event; indices would take eight.
        runs = np.stack([seen_U, whole_U - seen_U], axis=1).ravel()
        seen_E = np.repeat(np.tile([True, False], len(whole_U)), runs)
        end = num_events + int(seen_U.sum())
        np.compress(seen_E, history.flatten().to_numpy(), out=item_index_E[num_events:end])
        ends.append(num_examples + np.cumsum(seen_U[useful_U] - 1))
        hashes.append(table.column("user_hash").to_numpy()[useful_U])
        num_events, num_examples = end, int(ends[-1][-1])
    return Corpus(item_index_E[:num_events], np.concatenate(ends), np.concatenate(hashes))


def open_examples(
    storage: Storage,
    sequences: Manifest,
    *,
    holdout: str,
    max_history: int,
    events_in_memory: int,
    seed: int,
) -> Examples:
    """Examples of a sequences artifact; nothing is read before the first batch.

    Args:
        storage: where the histories are published.
        sequences: manifest of the histories.
        holdout: section `training`.
        max_history: section `model`.
        events_in_memory: section `training`.
        seed: seed of every order of examples.

    Raises:
        DataError: the events do not fit into memory, and neither does one user shard.
    """
    shards = [entry for entry in user_shards(sequences) if entry.fact(f"examples_{holdout}")]
    events_S = np.array([entry.fact("events") for entry in shards], np.int64)
    examples = Examples(
        events_S,
        np.array([entry.fact(f"examples_{holdout}") for entry in shards], np.int64),
        lambda some: read_corpus(storage, sequences, [shards[shard] for shard in some], holdout),
        max_history=max_history,
        events_in_memory=events_in_memory,
        seed=seed,
    )
    if examples.streamed and events_S.max() > events_in_memory // 2:
        entry, events = shards[int(events_S.argmax())], int(events_S.max())
        enough = min(2 * events, int(events_S.sum()))
        raise DataError(
            f"{entry.name} of {sequences.artifact} (run {sequences.run_id}) has {events:,} events, but only "
            f"{events_in_memory // 2:,} can be in memory at a time beside the next ones, half of "
            f"training.events_in_memory {events_in_memory:,}; spread the users over more shards "
            f"(sequences.num_shards), or raise training.events_in_memory to {enough:,}"
        )
    return examples


def load_validation(
    storage: Storage,
    sequences: Manifest,
    num_users: int,
    make_ranker: Callable[[Any, torch.device], Ranker],
    *,
    holdout: str,
    rank: int = 0,
    world_size: int = 1,
) -> Validation:
    """Read the first user shards until the sample is full, and keep every `world_size`-th user of the sample.

    Shards are ranges of a hash of the user, and another hash chooses users of the last shard. So the sample is
    random, and the same for any number of workers.

    Args:
        storage: where the histories are published.
        sequences: manifest of the histories.
        num_users: users of the whole sample.
        make_ranker: makes the ranker from a model and a device.
        holdout: section `training`.
        rank: number of this worker.
        world_size: number of workers.
    """
    items, lengths, hashes, targets, missing = [], [], [], [], num_users
    for entry in user_shards(sequences):
        columns = [*columns_for(holdout), "user_hash"]
        table = storage.read_table(sequences, entry.name, columns=columns)
        history = table.combine_chunks().column("history").combine_chunks()
        length_U = np.diff(history.offsets.to_numpy()).astype(np.int64)
        hash_U = table.column("user_hash").to_numpy()
        item_index, first_U = history.flatten().to_numpy(), np.cumsum(length_U) - length_U
        target_at_U = cuts_of(table, holdout).validation_at_B
        user = np.flatnonzero(target_at_U >= 0)
        user = user[np.argsort(splitmix64(hash_U[user]), kind="stable")[:missing]]
        mine = user[(rank - num_users + missing) % world_size :: world_size]
        read = target_at_U[mine]
        items.append(item_index[ranges(first_U[mine], read)])
        lengths.append(read)
        hashes.append(hash_U[mine])
        targets.append(item_index[first_U[mine] + read].astype(np.int64))
        missing -= len(user)
        if not missing:
            break
    return Validation(
        Histories(np.concatenate(items), np.concatenate(lengths), np.concatenate(hashes)),
        np.concatenate(targets),
        make_ranker,
    )
