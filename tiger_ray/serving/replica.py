"""One replica of the endpoint: the ranker of a night, opened once, and the answers it gives.

B queries of a batch, E history items of all queries.
"""

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

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import SequencesMetadata
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import stable_hash
from tiger_ray.errors import ArtifactError
from tiger_ray.published.ranker import open_ranker
from tiger_ray.rankers.base import FALLBACK, NO_ITEM, Found, Histories
from tiger_ray.rankers.tiger import needs_user
from tiger_ray.serving.http import REASONS, Query
from tiger_ray.settings.settings import Settings

NO_DECODER = (DeploymentUnavailableError, RayActorError)


class Snapshot:
    """The ranker of one night, which turns queries into answers without Ray.

    Args:
        storage: where the artifacts are.
        settings: of the night and the endpoint.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs.
        sequences: manifest of the histories, which hold the popularity.

    Raises:
        ArtifactError: the model recommends nothing after a history of one item.
    """

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
        self._ranker, self._ids, vocabulary = open_ranker(storage, settings, model, semantic_ids, sequences)
        self._needs_user = needs_user(vocabulary, settings.decoding)
        # Build the hash table once: `SemanticIds.lookup` builds a table in every call.
        self._items = pd.Index(self._ids.item_id.to_pandas())
        # pandas builds the table at the first lookup: look up now, so that no request waits.
        self._items.get_indexer(self._items[:1])
        self._user_id_type = pa.type_for_alias(SequencesMetadata.of(sequences).user_id_type)
        self.check()

    def check(self) -> None:
        """Check that the model works: recommend after a history of one item.

        Raises:
            ArtifactError: the model recommends no item, or the score is not finite.
        """
        # Prefer an ineligible item: an excluded history then takes no item away.
        item = int(np.argmin(self._ids.eligible_N))
        found = self._ranker.recommend(Histories.of([[item]], np.zeros(1, np.uint64)), self._max_k)
        if found.item_BK[0, 0] == NO_ITEM or not np.isfinite(found.score_BK[0, 0]):
            raise ArtifactError(f"the model recommends nothing after item_index {item} ({self.versions})")

    def answer(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """One answer per query, ready for JSON; in fp32 an answer does not depend on the other queries of the batch."""
        item_index = self._items.get_indexer(
            pd.Index([item for query in queries for item in query.history], dtype=self._items.dtype)
        )
        user_E = np.repeat(np.arange(len(queries)), [len(query.history) for query in queries])
        known_E = item_index >= 0
        lengths_B = np.bincount(user_E[known_E], minlength=len(queries)).astype(np.int64)
        unknown_B = np.bincount(user_E[~known_E], minlength=len(queries))
        histories = Histories(item_index[known_E].astype(np.int32), lengths_B, self._user_hash(queries))
        # Ask for the largest k, so that the queries of a batch may differ in k.
        found = self._ranker.recommend(histories, self._max_k)
        return [
            self._answer(found.take([user]).first(query.k).best_first(), int(unknown_B[user]))
            for user, query in enumerate(queries)
        ]

    def _answer(self, found: Found, unknown: int) -> dict[str, Any]:
        """The answer to one query.

        Args:
            found: k slots for one user.
            unknown: number of items of the history that the catalog never had.
        """
        ids, source, k = self._ids, int(found.source_BK[0, 0]), found.item_BK.shape[1]
        item_index = found.item_BK[found.item_BK != NO_ITEM]
        columns = [
            ids.item_ids(item_index).to_pylist(),
            found.score_BK[0].tolist(),
            ids.codes_NI[item_index].tolist(),
        ]
        names = ("item_id", "score", "semantic_id")
        answer = {
            "items": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=False)],
            "source": schemas.SOURCES[source],
            "unknown_items": unknown,
            **self.versions,
        }
        if len(item_index) < k:
            few_eligible = int(ids.eligible_N.sum()) < k
            answer["reason"] = REASONS[0] if few_eligible else REASONS[2 if source == FALLBACK else 1]
        return answer

    def _user_hash(self, queries: Sequence[Query]) -> npt.NDArray[np.uint64]:
        if not self._needs_user:
            return np.zeros(len(queries), np.uint64)
        return stable_hash(pa.array([query.user_id for query in queries], self._user_id_type))


class Replica:
    """A replica of the endpoint's deployment that answers queries in batches.

    Args:
        storage: where the artifacts are.
        settings: of the night and the endpoint.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs.
        sequences: manifest of the histories, which hold the popularity.
    """

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        model: Manifest,
        semantic_ids: Manifest,
        sequences: Manifest,
    ) -> None:
        self._snapshot = Snapshot(storage, settings, model, semantic_ids, sequences)
        self.answer.set_max_batch_size(settings.serving.max_batch_size)
        self.answer.set_batch_wait_timeout_s(settings.serving.batch_wait_s)

    @serve.batch  # type: ignore[untyped-decorator]
    async def answer(self, queries: list[Query]) -> list[dict[str, Any]]:
        """Answers to the queries of one batch."""
        return self._snapshot.answer(queries)

    async def versions(self) -> dict[str, str]:
        """The artifacts that this replica serves, as `versions_of`."""
        return self._snapshot.versions

    async def check_health(self) -> None:
        """Raise an error if the model does not work; Serve calls this and replaces a replica that raises."""
        self._snapshot.check()


def versions_of(settings: Settings, model: Manifest, semantic_ids: Manifest) -> dict[str, str]:
    """The artifacts that an answer is made from, as the answer names them.

    Args:
        settings: with the date.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs.
    """
    return {
        "model_version": model.run_id,
        "semantic_ids_version": semantic_ids.run_id,
        "date": settings.date,
    }
