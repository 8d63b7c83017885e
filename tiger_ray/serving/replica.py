"""One replica of the endpoint: the artifacts of a night, loaded once, and the decoder beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.arrays import best_first
from tiger_ray.core.hashing import stable_hash
from tiger_ray.errors import ArtifactError
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.published.scorer import Scorer
from tiger_ray.rankers.fallback import FALLBACK, GENERATED
from tiger_ray.serving.http import REASONS, Query
from tiger_ray.settings.settings import Settings

NO_DECODER = (DeploymentUnavailableError, RayActorError)


class Recommender:
    """Queries to answers in one process; no Ray in here."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        model: Manifest,
        semantic_ids: Manifest,
        sequences: Manifest,
    ) -> None:
        self.versions = versions_of(settings, model, semantic_ids)
        self._max_k = settings.serving.max_k
        self._exclude_history = settings.recommendations.exclude_history
        self._scorer = Scorer(storage, settings, model, semantic_ids, sequences)
        self._needs_user = needs_user(settings, self._scorer.vocabulary)
        # a hash table that is built once; `SemanticIds.lookup` would build one for every batch
        self._items = pd.Index(self._scorer.ids.item_id.to_pandas())
        self._items.get_indexer(self._items[:1])  # here, or the first requests would wait for it
        self._user_id_type = pa.type_for_alias(sequences.metadata["user_id_type"])
        self._popular = self._scorer.most_popular(self._max_k)
        self.check()

    def check(self) -> None:
        """Decode one history, to be sure that it works.

        Raises:
            ArtifactError: nothing, or not a number, came out.
        """
        item = np.flatnonzero(self._scorer.ids.eligible_N)[:1].astype(np.int32)
        found_1K, score_1K = self._scorer.recommend(
            item, np.ones(1, np.int64), np.zeros(1, np.uint64), self._max_k
        )
        if found_1K[0, 0] < 0 or not np.isfinite(score_1K[0, 0]):
            raise ArtifactError(f"the model recommends nothing after item_index {item[0]} ({self.versions})")

    def answer(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """One answer per query, ready for JSON; in fp32 it does not depend on the others of the batch."""
        item_index = self._items.get_indexer(
            pd.Index([item for query in queries for item in query.history], dtype=self._items.dtype)
        )
        user_E = np.repeat(np.arange(len(queries)), [len(query.history) for query in queries])
        known_E = item_index >= 0
        lengths_B = np.bincount(user_E[known_E], minlength=len(queries)).astype(np.int64)
        unknown_B = np.bincount(user_E[~known_E], minlength=len(queries))
        generated_B = lengths_B > 0
        found_BK = np.full((len(queries), self._max_k), -1, np.int64)
        score_BK = np.full(found_BK.shape, -np.inf, np.float32)
        if generated_B.any():
            # always for the largest k, so that a batch may mix them
            found_BK[generated_B], score_BK[generated_B] = self._scorer.recommend(
                item_index[known_E].astype(np.int32),
                lengths_B[generated_B],
                self._user_hash(queries)[generated_B],
                self._max_k,
                exclude_history=self._exclude_history,
            )
        popular_K, share_K = self._popular
        found_BK[~generated_B, : len(popular_K)] = popular_K
        score_BK[~generated_B, : len(popular_K)] = share_K
        return [
            self._answer(
                query.k, found_BK[user], score_BK[user], bool(generated_B[user]), int(unknown_B[user])
            )
            for user, query in enumerate(queries)
        ]

    def _answer(
        self,
        k: int,
        found_K: npt.NDArray[np.int64],
        score_K: npt.NDArray[np.float32],
        generated: bool,
        unknown: int,
    ) -> dict[str, Any]:
        ids = self._scorer.ids
        (found_k,), (score_k,) = best_first(found_K[None, :k], score_K[None, :k])
        item_index = found_k[found_k >= 0]
        columns = [
            ids.item_ids(item_index).to_pylist(),
            score_k.tolist(),
            ids.codes_NI[item_index].tolist(),
        ]
        names = ("item_id", "score", "semantic_id")
        answer = {
            "items": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=False)],
            "source": GENERATED if generated else FALLBACK,
            "unknown_items": unknown,
            **self.versions,
        }
        if len(item_index) < k:
            few_eligible = int(ids.eligible_N.sum()) < k
            answer["reason"] = REASONS[0] if few_eligible else REASONS[1] if generated else REASONS[2]
        return answer

    def _user_hash(self, queries: Sequence[Query]) -> npt.NDArray[np.uint64]:
        if not self._needs_user:
            return np.zeros(len(queries), np.uint64)
        return stable_hash(pa.array([query.user_id for query in queries], self._user_id_type))


class Decoder:
    """A replica that decodes requests in batches."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        model: Manifest,
        semantic_ids: Manifest,
        sequences: Manifest,
    ) -> None:
        self._recommender = Recommender(storage, settings, model, semantic_ids, sequences)
        self.answer.set_max_batch_size(settings.serving.max_batch_size)
        self.answer.set_batch_wait_timeout_s(settings.serving.batch_wait_s)

    @serve.batch  # type: ignore[untyped-decorator]
    async def answer(self, queries: list[Query]) -> list[dict[str, Any]]:
        """Answers to the queries of one batch."""
        return self._recommender.answer(queries)

    async def versions(self) -> dict[str, str]:
        """What this replica serves."""
        return self._recommender.versions

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self._recommender.check()


def needs_user(settings: Settings, vocabulary: Vocabulary) -> bool:
    """Does an answer depend on who asks: by a user token, or by a draw of the user's own?"""
    return vocabulary.num_user_buckets > 0 or settings.decoding.sample


def versions_of(settings: Settings, model: Manifest, semantic_ids: Manifest) -> dict[str, str]:
    """What the answer says about the artifacts that it came from."""
    return {
        "model_version": model.run_id,
        "semantic_ids_version": semantic_ids.run_id,
        "date": settings.date,
    }
