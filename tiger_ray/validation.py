"""How good a model is while it is trained: a fixed sample of users, ranked by the real beam search.

The target is each user's event before the last, which training does not see; the test target is never read.

N items, I id_length, B users, E events of all users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tiger_ray import evaluation
from tiger_ray.beam_search import Decoder, ranges
from tiger_ray.config import DecodingSettings
from tiger_ray.hashing import mixed
from tiger_ray.histories import HELD_OUT, user_shards
from tiger_ray.model import TigerModel
from tiger_ray.storage import Manifest, Storage
from tiger_ray.tokens import user_buckets

BEAM_WIDTH = 20
TOP = 10


@dataclass(frozen=True)
class Validation:
    """A worker's part of the sample."""

    item_E: npt.NDArray[np.int32]
    """Events before each user's target, one user after the other."""
    lengths_B: npt.NDArray[np.int64]
    """Events per user; at least 1."""
    user_hash_B: npt.NDArray[np.uint64]
    target_B: npt.NDArray[np.int64]
    """item_index to be ranked."""
    codes_NI: npt.NDArray[np.int16]
    """Semantic IDs by item_index."""
    eligible_N: npt.NDArray[np.bool_]
    """May the item be recommended?"""
    precision: Literal["fp32", "bf16"]

    @classmethod
    def load(
        cls,
        storage: Storage,
        sequences: Manifest,
        num_users: int,
        *,
        codes_NI: npt.NDArray[np.int16],
        eligible_N: npt.NDArray[np.bool_],
        precision: Literal["fp32", "bf16"],
        rank: int = 0,
        world_size: int = 1,
    ) -> Validation:
        """Read the first user shards, as many as it takes, and keep every `world_size`-th user of the sample.

        Shards are ranges of a hash of the user, and within the last one users are chosen by another hash, so
        the sample is random, and the same for any number of workers.
        """
        items, lengths, hashes, targets, missing = [], [], [], [], num_users
        for entry in user_shards(sequences):
            table = storage.read_table(sequences, entry.name, columns=["history", "user_hash"])
            history = table.combine_chunks().column("history").combine_chunks()
            length_U = np.diff(history.offsets.to_numpy()).astype(np.int64)
            hash_U = table.column("user_hash").to_numpy()
            item_index, first_U = history.flatten().to_numpy(), np.cumsum(length_U) - length_U
            user = np.flatnonzero(length_U > HELD_OUT)
            user = user[np.argsort(mixed(hash_U[user]), kind="stable")[:missing]]
            mine = user[(rank - num_users + missing) % world_size :: world_size]
            read = length_U[mine] - HELD_OUT
            items.append(item_index[ranges(first_U[mine], read)])
            lengths.append(read)
            hashes.append(hash_U[mine])
            targets.append(item_index[first_U[mine] + read].astype(np.int64))
            missing -= len(user)
            if not missing:
                break
        return cls(
            np.concatenate(items),
            np.concatenate(lengths),
            np.concatenate(hashes),
            np.concatenate(targets),
            codes_NI,
            eligible_N,
            precision,
        )

    def metrics(self, model: TigerModel, device: torch.device) -> dict[str, float]:
        """Recall and NDCG at 10 of the model as it is, over the users of all workers; empty if there are none.

        Source: paper section 4 (leave-one-out, full ranking), at item level.
        """
        rank_B = np.zeros(0, np.int64)
        if len(self.target_B):
            was_training = model.training
            settings = DecodingSettings(beam_width=BEAM_WIDTH, precision=self.precision)
            decoder = Decoder(model.eval(), self.codes_NI, self.eligible_N, settings, device)
            buckets_B = None
            if model.vocabulary.num_user_buckets:
                buckets_B = user_buckets(self.user_hash_B, model.vocabulary)
            found_BK, _ = decoder.recommend(self.item_E, self.lengths_B, buckets_B, TOP)
            rank_B = evaluation.ranks(found_BK, self.target_B)
            model.train(was_training)
        sums = evaluation.metric_sums(rank_B, (TOP,))
        total = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
        if dist.is_initialized():
            dist.all_reduce(total)
        metrics = evaluation.means([dict(zip(sums, total.tolist(), strict=True))])
        return metrics if metrics.pop("users") else {}
