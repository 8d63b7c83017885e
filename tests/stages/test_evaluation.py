"""Who is asked about, with which history, and what is written of the lists: the shard of the evaluation, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.manifests import manifest_of, metadata_of
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import TigerError
from tiger_ray.evaluation.tally import sum_of
from tiger_ray.rankers.base import Found, Histories, Rules
from tiger_ray.settings.evaluation import EvaluationSettings
from tiger_ray.stages import evaluation
from tiger_ray.stages.evaluation import RankerSpec

NUM_ITEMS = 9
HISTORIES = [
    [0, 1],  # two events: nothing is held out
    [2, 3, 4],
    [5, 6, 5, 7, 5],  # the target is in the history, twice
    [],
    [1, 2, 0, 8],  # the target is in no training event
    [4],
]
EVALUATED = (1, 2, 4)
EVENTS_N = np.array([3, 2, 2, 1, 4, 1, 1, 0, 0])


class History:
    """Recommends the history itself, newest first and with its repeats, whatever the rules say."""

    def __init__(self, rules: Rules) -> None:
        pass

    def recommend(self, histories: Histories, k: int) -> Found:
        found_BK = np.full((len(histories), k), -1)
        for user, history in enumerate(histories.lists()):
            shown = history[::-1][:k]
            found_BK[user, : len(shown)] = shown
        score_BK = np.where(found_BK < 0, -np.inf, -np.arange(k, dtype=np.float64))
        return Found.of(found_BK, score_BK.astype(np.float32))


class Nothing:
    """Has no item for anybody."""

    def __init__(self, rules: Rules) -> None:
        pass

    def recommend(self, histories: Histories, k: int) -> Found:
        return Found.nothing(len(histories), k)


def lists_of(
    tmp_path, monkeypatch, ranker, histories=HISTORIES, share=1.0, **changed
) -> list[dict[str, Any]]:
    storage = Storage(str(tmp_path))
    run = storage.begin("sequences", "0" * 64)
    table = pa.table(
        [
            [str(user) for user in range(len(histories))],
            pa.array(range(len(histories)), pa.uint64()),
            histories,
        ],
        schema=schemas.sequences(pa.string()),
    )
    entry = run.write_table("shard-00000.parquet", table)
    eligible = SimpleNamespace(eligible_N=np.ones(NUM_ITEMS, bool))
    monkeypatch.setattr(evaluation, "load_semantic_ids", lambda *_: eligible)
    evaluated = storage.begin("evaluation", "1" * 64)
    rank = evaluation._RankShard(
        evaluated,
        SimpleNamespace(evaluation=EvaluationSettings(**{"ks": (2, 4), **changed})),
        {"sequences": run.as_manifest([entry]), "semantic_ids": None},
        RankerSpec(ranker, {}, {}, "leave_one_out", {}, {}, name="fake"),
        share,
        EVENTS_N,
        {},
    )
    return evaluated.read_table(rank(entry)).to_pylist()


def test_a_model_that_returns_the_history_hits_only_targets_that_are_in_it(tmp_path, monkeypatch):
    rows = lists_of(tmp_path, monkeypatch, History)
    assert [row["user_hash"] for row in rows] == list(EVALUATED)
    for row, user in zip(rows, EVALUATED, strict=True):
        *history, target = HISTORIES[user]
        assert row["target"] == target
        assert row["history_length"] == len(history)
        assert row["target_in_history"] == (target in history)
        shown = [*history[::-1], *[-1] * 4][:4]
        assert row["items"] == shown
        assert (target in shown) == (user == 2)


def test_a_ranker_that_shows_what_was_to_be_masked_ends_the_evaluation(tmp_path, monkeypatch):
    with pytest.raises(
        TigerError, match=r"evaluation-fake: 9 items of their histories came out for 3 of 3 users"
    ):
        lists_of(tmp_path, monkeypatch, History, exclude_history=True)
    rows = lists_of(tmp_path / "other", monkeypatch, Nothing, exclude_history=True)
    assert [row["items"] for row in rows] == [[-1] * 4] * 3


def test_a_ranker_is_given_the_end_of_the_history_and_the_target_is_sought_in_all_of_it(
    tmp_path, monkeypatch
):
    rows = lists_of(tmp_path, monkeypatch, History, max_history=2)
    assert [row["items"] for row in rows] == [[3, 2, -1, -1], [7, 5, -1, -1], [0, 2, -1, -1]]
    assert [row["target_in_history"] for row in rows] == [False, True, False]


def test_targets_that_training_never_saw_are_kept_or_dropped(tmp_path, monkeypatch):
    assert EVENTS_N[[HISTORIES[user][-1] for user in EVALUATED]].tolist() == [4, 1, 0]
    rows = lists_of(tmp_path, monkeypatch, Nothing, unseen_targets="drop")
    assert [row["user_hash"] for row in rows] == [1, 2]
    assert (
        lists_of(tmp_path / "other", monkeypatch, Nothing)[2]["popularity_rank"] == 5
    )  # one more than places


@pytest.mark.parametrize("unseen", ["keep", "drop"])
def test_a_shard_of_nobody_to_evaluate_has_no_rows(tmp_path, monkeypatch, unseen):
    for number, histories in enumerate(([[]], [[1], [2, 3]], [])):
        found = lists_of(tmp_path / str(number), monkeypatch, History, histories, unseen_targets=unseen)
        assert found == []


def test_a_share_of_the_users_is_about_that_share(tmp_path, monkeypatch):
    rows = lists_of(tmp_path, monkeypatch, Nothing, [[1, 2, 3]] * 2000, share=0.3)
    assert 500 < len(rows) < 700


def test_parts_are_added_up_as_they_come():
    alive: list[int] = []

    class Part:
        def __init__(self) -> None:
            alive.append(id(self))

        def __add__(self, other: Part) -> Part:
            assert len(alive) <= 3
            return Part()

        def __del__(self) -> None:
            alive.remove(id(self))

    assert sum_of(Part() for _ in range(50)) is not None
    assert sum_of(iter([3])) == 3


def test_why_nobody_is_left_is_said():
    sequences = manifest_of("sequences", metadata_of("sequences", users=7, test_users_leave_one_out=0))
    chosen = SimpleNamespace(evaluation=EvaluationSettings(max_users=1))
    assert "none of 7 users has the events that training.holdout" in evaluation._explain_no_users(
        chosen, "leave_one_out", sequences
    )
    sequences.metadata["test_users_leave_one_out"] = 5
    said = evaluation._explain_no_users(chosen, "leave_one_out", sequences)
    assert (
        said
        == "none of 5 users with a test event is left to evaluate after evaluation.max_users 1; change that"
    )
