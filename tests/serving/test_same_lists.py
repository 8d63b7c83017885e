"""The endpoint answers with the list that the night writes for the same history, whatever the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.published_worlds import INELIGIBLE, NUM_ITEMS, STRING, World, make_world, user_id
from tiger_ray.serving.http import Query
from tiger_ray.stages import recommendations

TOP_K = 7
NUM_USERS = 40


def drawn_histories(seed: int) -> list[list[int]]:
    """Histories with repeats and items that may not be recommended; some are empty, one holds nearly all items."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, NUM_ITEMS, rng.integers(0, 9)).tolist() for _ in range(NUM_USERS - 2)]
    return [[], *histories, rng.permutation(NUM_ITEMS)[: NUM_ITEMS - 4].tolist()]


def rows_of_the_night(world: World) -> list[dict[str, Any]]:
    """Rows that the night writes, by the object that its actors run; no Ray."""
    run = world.storage.begin("recommendations", "0" * 64)
    work = recommendations._ScoreShard(run, world.storage, world.settings, world.manifests)
    written = work(next(e for e in world.manifests["sequences"].files if e.name.startswith("shard-")))
    return run.read_table(written).to_pylist()


def answers_of_the_endpoint(
    world: World, histories: list[list[int]], id_type: pa.DataType, batches: list[list[int]]
) -> list[dict[str, Any]]:
    """Answers to the same users, asked in these batches."""
    snapshot = world.snapshot()
    answers: dict[int, dict[str, Any]] = {}
    for users in batches:
        queries = [
            Query([world.item_ids[item] for item in histories[user]], TOP_K, user_id(user, id_type))
            for user in users
        ]
        answers.update(zip(users, snapshot.answer(queries), strict=True))
    return [answers[user] for user in range(len(histories))]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("exclude_history", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sample", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize(
    ("id_type", "buckets"), [(STRING, 0), (pa.int64(), 5)], ids=["no user token", "user token"]
)
def test_night_and_endpoint_give_the_same_list(
    tmp_path: Path, seed: int, exclude_history: bool, sample: bool, id_type: pa.DataType, buckets: int
) -> None:
    histories = drawn_histories(seed)
    world = make_world(tmp_path, id_type, buckets, histories=histories).changed(
        recommendations={"exclude_history": exclude_history, "top_k": TOP_K}, decoding={"sample": sample}
    )
    rows = rows_of_the_night(world)
    assert {source for row in rows for source in row["sources"]} == {"generated", "fallback"}

    together = [list(range(len(histories)))]
    shuffled = np.random.default_rng(seed).permutation(len(histories))
    for batches in (together, [part.tolist() for part in np.array_split(shuffled, 9)]):
        answers = answers_of_the_endpoint(world, histories, id_type, batches)
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            items = answer["items"]
            assert row["user_id"] == user_id(number, id_type)
            assert [item["item_id"] for item in items] == row["item_ids"]
            assert [item["semantic_id"] for item in items] == row["semantic_ids"]
            assert [answer["source"]] * len(items) == row["sources"]
            assert not {*row["item_ids"]} & {world.item_ids[item] for item in INELIGIBLE}
            scores = [item["score"] for item in items]
            if batches is together:
                assert scores == row["scores"], "the same batch gives the same bits"
            np.testing.assert_allclose(scores, row["scores"], rtol=1e-5, atol=1e-5)
