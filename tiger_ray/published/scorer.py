"""Model, Semantic IDs, trie and popularity of one night in one process."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import splitmix64
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.model.tokens import user_buckets
from tiger_ray.published.model import load_model
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.settings.settings import Settings


class Scorer:
    """Model, Semantic IDs, trie and popularity in one process: what an actor or a replica holds."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        model: Manifest,
        semantic_ids: Manifest,
        sequences: Manifest,
    ) -> None:
        decoding = settings.decoding
        device = "cuda" if decoding.use_gpu else "cpu"
        if not decoding.use_gpu:
            torch.set_num_threads(max(1, int(decoding.cpus_per_worker)))
        self.ids = load_semantic_ids(storage, semantic_ids)
        self.decoder = Decoder(
            load_model(storage, model, semantic_ids), self.ids.codes_NI, self.ids.eligible_N, decoding, device
        )
        self.vocabulary = self.decoder.model.vocabulary
        self._sample, self._seed = decoding.sample, settings.seed
        self.popular = storage.read_table(sequences, "popularity.parquet")
        self._num_events = int(sequences.metadata["events"])  # also of items that are not among these

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_hash_B: npt.NDArray[np.uint64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `Decoder.recommend`, for user hashes instead of buckets and seeds."""
        buckets = None
        if self.vocabulary.num_user_buckets:
            assert user_hash_B is not None
            buckets = user_buckets(user_hash_B, self.vocabulary)
        seed_B = None
        if self._sample:
            assert user_hash_B is not None
            # mixed, because shards and user buckets follow from the hash itself
            seed_B = splitmix64(user_hash_B, self._seed).view(np.int64)
        return self.decoder.recommend(
            item_index, lengths_B, buckets, k, exclude_history=exclude_history, seed_B=seed_B
        )

    def most_popular(self, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The k most popular eligible items, (K,), and the natural log of their share of the events, (K,)."""
        count = self.popular.column("events").to_numpy()
        item_index = self.popular.column("item_index").to_numpy().astype(np.int64)
        # Ties go by index: the file's own order counts events that the evaluation must not see.
        order = np.lexsort((item_index, -count))
        order = order[self.ids.eligible_N[item_index[order]] & (count[order] > 0)][:k]
        return item_index[order], np.log(count[order] / max(self._num_events, 1)).astype(np.float32)
