"""A world of 40 items and a random model, published without training: scoring every item tells the right lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from tests.worlds import MONDAY, publish
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.lineage import registry_of
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import stable_hash
from tiger_ray.ids import semantic_ids
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary, pad_histories
from tiger_ray.serving.replica import Snapshot
from tiger_ray.settings.model import ModelSettings
from tiger_ray.settings.settings import Settings

DATE = MONDAY
NUM_ITEMS, INELIGIBLE = 40, (3, 17, 30)
LEVEL_SIZES = (6, 6, 16)
STRING = pa.string()


class World(NamedTuple):
    """Published artifacts, and what they were made of."""

    settings: Settings
    storage: Storage
    manifests: dict[str, Manifest]
    network: TigerModel
    codes_NI: np.ndarray
    item_ids: list[Any]

    @property
    def artifacts(self) -> tuple[Any, ...]:
        return (self.settings, self.storage, *self.manifests.values())

    def changed(self, **sections: dict[str, Any]) -> World:
        """The same artifacts with other settings."""
        updates = {name: getattr(self.settings, name).model_copy(update=v) for name, v in sections.items()}
        return self._replace(settings=self.settings.model_copy(update=updates))

    def snapshot(self, **sections: dict[str, Any]) -> Snapshot:
        return Snapshot(self.storage, self.changed(**sections).settings, *self.manifests.values())

    def best(self, history: list[int], bucket: int | None = None) -> list[tuple[Any, float]]:
        """Every eligible item with its score, best first: the oracle."""
        vocabulary = self.network.vocabulary
        tokens_NI = vocabulary.item_tokens(self.codes_NI)
        user = None if bucket is None else torch.tensor([vocabulary.user_offset + bucket])
        history_1T = pad_histories(tokens_NI[history], torch.tensor([len(history)]), user)
        with torch.inference_mode():
            logits_NIV = self.network.logits(history_1T.expand(NUM_ITEMS, -1), tokens_NI)
        log_prob_NIV = logits_NIV.log_softmax(-1)
        score_N = log_prob_NIV.gather(-1, tokens_NI[..., None])[..., 0].sum(-1)
        order = sorted(set(range(NUM_ITEMS)) - set(INELIGIBLE), key=lambda item: -score_N[item])
        return [(self.item_ids[item], float(score_N[item])) for item in order]


def make_world(
    root: Path,
    id_type: pa.DataType = STRING,
    num_user_buckets: int = 0,
    space: str = "space",
    histories: Sequence[Sequence[int]] = (),
) -> World:
    """Publish the world under `root`.

    Args:
        root: a folder.
        id_type: Arrow type of item ids and user ids.
        num_user_buckets: of the model.
        space: ID space that the Semantic IDs say they are of; the model is of `space`.
        histories: item_index of each user's events; user i has the id `user_id(i, id_type)`.
    """
    rng = np.random.default_rng(5)
    item_ids = [f"item-{i:02d}" if id_type == STRING else 10**12 + i for i in range(NUM_ITEMS)]
    codewords = rng.integers(0, 6, (NUM_ITEMS, 2)).astype(np.int16)
    segment = semantic_ids.assign(None, pa.array(item_ids, id_type), codewords, LEVEL_SIZES)
    registry = semantic_ids.SemanticIds.from_segments([segment], LEVEL_SIZES)
    item_ids = registry.item_id.to_pylist()
    eligible = np.ones(NUM_ITEMS, bool)
    eligible[list(INELIGIBLE)] = False

    torch.manual_seed(0)
    small = {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 32, "dropout": 0.0}
    model_settings = ModelSettings(**small, num_user_buckets=num_user_buckets)
    network = TigerModel(model_settings, Vocabulary(LEVEL_SIZES, num_user_buckets)).eval()

    storage = Storage(str(root))
    ids = publish(
        storage,
        "semantic_ids",
        {"segment-00000.parquet": segment, "eligible.parquet": pa.table({"eligible": eligible})},
        {
            "items": NUM_ITEMS,
            "level_sizes": list(LEVEL_SIZES),
            "space": space,
            "item_id_type": str(id_type),
            "eligible": int(eligible.sum()),
        },
    )
    popular = [[7, 3, 1, 0, 2], [50, 30, 10, 8, 2], [40, 20, 9, 8, 2]]  # item 3 is not eligible
    popularity = pa.table([pa.array(column) for column in popular], names=schemas.popularity().names)
    manifests = {
        "model": publish(storage, "model", network.to_files(), {"space": "space", "holdout": "none"}),
        "semantic_ids": ids,
        "sequences": publish(
            storage,
            "sequences",
            {
                "popularity.parquet": popularity.cast(schemas.popularity()),
                "shard-00000.parquet": _users(histories, id_type),
            },
            {"user_id_type": str(id_type), "events": 125},  # 25 of items that are not popular
            inputs={"semantic_ids": registry_of(ids).digest},
        ),
    }
    settings = Settings(
        date=DATE,
        storage={"root": str(root)},
        catalog={"uri": "unused"},
        events={"uri": "unused"},
        decoding={"beam_width": 64},
        serving={
            "max_k": NUM_ITEMS,
            "max_history": 50,
            "max_batch_size": 4,
            "max_queued_requests": 8,
            "request_timeout_s": 10.0,
        },
    )
    return World(settings, storage, manifests, network, registry.codes_NI, item_ids)


def user_id(number: int, id_type: pa.DataType = STRING) -> Any:
    return f"user-{number}" if id_type == STRING else 10**9 + number


def _users(histories: Sequence[Sequence[int]], id_type: pa.DataType) -> pa.Table:
    """A user shard, as `schemas.sequences`."""
    ids = pa.array([user_id(number, id_type) for number in range(len(histories))], id_type)
    hashes = stable_hash(ids) if histories else np.zeros(0, np.uint64)
    return pa.table([ids, pa.array(hashes), list(histories)], schema=schemas.sequences(id_type))
