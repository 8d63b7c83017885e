"""How good a model is while it is trained: a fixed sample of users, ranked as the finished model ranks them.

The target is each user's validation event, which training does not see; the test target is never read.

N items, I id_length, B users, E events of all users, C cells of a count by rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from tiger_ray import evaluation
from tiger_ray.beam_search import Decoder, ranges
from tiger_ray.config import DecodingSettings
from tiger_ray.hashing import mixed
from tiger_ray.histories import columns_for, cuts_of, user_shards
from tiger_ray.model import TigerModel
from tiger_ray.rankers import Ranker
from tiger_ray.storage import Manifest, Storage
from tiger_ray.tokens import user_buckets

BEAM_WIDTH = 20
TOP = 10


class BeamRanker:
    """Ranks by beam search with the weights that a model has now."""

    def __init__(
        self,
        model: TigerModel,
        device: torch.device,
        *,
        codes_NI: npt.NDArray[np.int16],
        eligible_N: npt.NDArray[np.bool_],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        """Get ready to decode: Semantic IDs, (N, I) int16, and what may be recommended, (N,) bool."""
        settings = DecodingSettings(beam_width=BEAM_WIDTH, precision=precision)
        self._decoder = Decoder(model, codes_NI, eligible_N, settings, device)
        self._vocabulary = model.vocabulary

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_hash_B: npt.NDArray[np.uint64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `Ranker.recommend`."""
        buckets_B = None
        if self._vocabulary.num_user_buckets:
            assert user_hash_B is not None
            buckets_B = user_buckets(user_hash_B, self._vocabulary)
        return self._decoder.recommend(item_index, lengths_B, buckets_B, k, exclude_history=exclude_history)


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
    make_ranker: Callable[[Any, torch.device], Ranker]
    """Makes a ranker of the model as it is, in evaluation mode, on a device."""

    @classmethod
    def load(
        cls,
        storage: Storage,
        sequences: Manifest,
        num_users: int,
        make_ranker: Callable[[Any, torch.device], Ranker],
        *,
        holdout: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> Validation:
        """Read the first user shards, as many as it takes, and keep every `world_size`-th user of the sample.

        Shards are ranges of a hash of the user, and within the last one users are chosen by another hash, so
        the sample is random, and the same for any number of workers.
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
            user = user[np.argsort(mixed(hash_U[user]), kind="stable")[:missing]]
            mine = user[(rank - num_users + missing) % world_size :: world_size]
            read = target_at_U[mine]
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
            make_ranker,
        )

    def metrics(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Recall, NDCG and MRR at 10 of the model as it is, over the users of all workers; empty if there are none.

        Source: paper section 4 (full ranking; leave-one-out, if that is the holdout), at item level.
        """
        rank_B = np.zeros(0, np.int64)
        if len(self.target_B):
            was_training = model.training
            ranker = self.make_ranker(model.eval(), device)
            found_BK, _ = ranker.recommend(self.item_E, self.lengths_B, self.user_hash_B, TOP)
            rank_B = evaluation.ranks(found_BK, self.target_B)
            model.train(was_training)
        count_C = torch.from_numpy(evaluation.rank_counts(rank_B, TOP)).to(device)
        if dist.is_initialized():
            dist.all_reduce(count_C)
        metrics = evaluation.metrics(count_C.cpu().numpy(), (TOP,))
        return metrics if metrics.pop("users") else {}
