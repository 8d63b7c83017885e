"""The model and its rivals are evaluated on the same users and targets, and one table shows them beside each other."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.worlds import MONDAY, TUESDAY, Night, published_dates, run, tiny_settings
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cli.main import main
from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.published import evaluation as published_evaluation
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.report import comparison
from tiger_ray.settings.settings import Settings
from tiger_ray.stages import baselines
from tiger_ray.stages.evaluation import STAGE as EVALUATION_STAGE

pytestmark = pytest.mark.ray


KINDS = ("popularity", "neighbours", "sasrec")
SASREC = {"d_model": 16, "d_ff": 16, "num_layers": 1, "dropout": 0.0, "max_history": 8}
TRAINING = {"optimizer": "adamw", "learning_rate": 0.01, "num_steps": 40, "validation_users": 100}


class Rivals:
    """Baselines of the night, published under a copy of its root."""

    def __init__(self, night: Night, root: str) -> None:
        self.night, self.root, self.storage = night, root, Storage(root)
        self.data = night.settings.catalog.uri.removesuffix("/catalog")

    def settings(self, kind: str, **changed: Any) -> Settings:
        date = changed.pop("date", MONDAY)
        sections = {"baseline": {"kind": kind}, "sasrec": SASREC, "training": TRAINING, **changed}
        return tiny_settings(self.root, self.data, date, **sections)

    def run(self, kind: str, **changed: Any) -> Manifest:
        inputs = {name: self.night[name] for name in baselines.INPUTS}
        return baselines.run_baseline(self.settings(kind, **changed), self.storage, **inputs).manifest

    def lists(self, evaluated: Manifest) -> Any:
        tables = [
            self.storage.read_table(evaluated, entry) for entry in published_evaluation.list_shards(evaluated)
        ]
        return pa.concat_tables(tables)


@pytest.fixture(scope="module")
def rivals(night: Night, copy_of_night: Any) -> Rivals:
    return Rivals(night, copy_of_night())


@pytest.fixture(scope="module")
def evaluated(night: Night, rivals: Rivals) -> dict[str, Manifest]:
    return {"model": night["evaluation"], **{kind: rivals.run(kind) for kind in KINDS}}


def loop(lists: Any, ks: tuple[int, ...]) -> dict[str, float]:
    """Recall and NDCG by their definitions, a user at a time."""
    sums = dict.fromkeys([f"{name}@{k}" for k in ks for name in ("recall", "ndcg")], 0.0)
    for row in lists.to_pylist():
        for k in ks:
            for place, item in enumerate(row["items"][:k], start=1):
                if item == row["target"]:
                    sums[f"recall@{k}"] += 1
                    sums[f"ndcg@{k}"] += 1 / math.log2(place + 1)
    return {name: value / lists.num_rows for name, value in sums.items()}


def test_all_rank_the_same_targets_of_the_same_users(rivals: Rivals, evaluated: dict[str, Manifest]) -> None:
    ours = rivals.lists(evaluated["model"]).select(["user_hash", "target", "history_length"])
    assert ours.num_rows == evaluated["model"].metadata["model"]["users"] > 250
    for kind in KINDS:
        theirs = rivals.lists(evaluated[kind])
        assert theirs.select(ours.column_names).equals(ours), kind
        assert evaluated[kind].metadata["protocol"]["split"] == "leave-one-out, test"


@pytest.mark.parametrize("who", ["model", *KINDS])
def test_published_metrics_equal_a_loop_over_the_published_lists(
    rivals: Rivals, evaluated: dict[str, Manifest], who: str
) -> None:
    found = published_evaluation.load_metrics(rivals.storage, evaluated[who])["model"]
    expected = loop(rivals.lists(evaluated[who]), (5, 10))
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-9), name
        assert found[name]["low"] <= value <= found[name]["high"]
        assert evaluated[who].metadata["model"][name] == found[name]["value"]


def test_popularity_is_the_same_as_a_rival_and_beside_every_other(evaluated: dict[str, Manifest]) -> None:
    own = evaluated["popularity"].metadata["model"]
    assert own["recall@10"] > 0
    for manifest in evaluated.values():
        assert manifest.metadata["popularity"] == own


def test_only_eligible_items_are_shown_and_none_twice(
    night: Night, rivals: Rivals, evaluated: dict[str, Manifest]
) -> None:
    eligible_N = load_semantic_ids(night.storage, night["semantic_ids"]).eligible_N
    for who, manifest in evaluated.items():
        shown = published_evaluation.load_metrics(rivals.storage, manifest)["shown"]
        assert shown["invalid_share"] == 0, who
        item_BP = schemas.matrix_of(rivals.lists(manifest).column("items"))
        assert eligible_N[item_BP[item_BP >= 0]].all()
        assert shown["coverage"] == len(np.unique(item_BP[item_BP >= 0])) / eligible_N.sum()


def test_sasrec_learns_by_the_workers_of_the_model_and_is_kept(
    rivals: Rivals, evaluated: dict[str, Manifest]
) -> None:
    model = rivals.storage.resolve("model-sasrec-softmax", MONDAY)
    curve = json.loads(rivals.storage.read_file(model, "curve.json"))["points"]
    assert [point["step"] for point in curve] == [30, 40]
    assert curve[-1]["loss"] < 0.9 * math.log(122)  # better than guessing among the items
    assert evaluated["sasrec"].inputs["model"] == model.digest
    chosen = max(curve, key=lambda point: point["ndcg@10"])["step"]
    said = f"step {chosen} of 40, batches of {model.settings['training']['global_batch_size']}, seed 0"
    assert evaluated["sasrec"].metadata["training"] == said
    settings = rivals.settings("sasrec")
    stage = baselines.sasrec_stage(settings.sasrec)
    again = run(stage, settings, rivals.storage, rivals.night["sequences"], rivals.night["semantic_ids"])
    assert again.status == "skipped"


def test_a_masked_history_is_never_shown_and_its_targets_are_counted(rivals: Rivals, night: Night) -> None:
    masked = rivals.run("neighbours", date=TUESDAY, evaluation={"exclude_history": True, "ks": [10]})
    histories = {row["user_hash"]: row["history"] for row in night.rows("sequences", "shard-").to_pylist()}
    rows = rivals.lists(masked).to_pylist()
    repeated = 0
    for row in rows:
        before = histories[row["user_hash"]][:-1]
        assert row["target"] == histories[row["user_hash"]][-1]
        assert not {*before} & {*row["items"]}
        repeated += row["target"] in before
    assert published_evaluation.load_metrics(rivals.storage, masked)["targets_in_history"] == repeated
    assert masked.metadata["protocol"]["history_masked"] is True


def test_the_table_has_every_ranker_its_difference_and_the_published_rows(
    rivals: Rivals, evaluated: dict[str, Manifest], tmp_path: Path, capsys: Any
) -> None:
    page, file = tmp_path / "page.md", tmp_path / "all.json"
    old = "**beauty once**\n\nlast night\n\n**toys**\n\n| of another machine |\n"
    page.write_text(f"before\n<!-- results -->\n{old}\n<!-- /results -->\nafter\n")
    file.write_text('{"toys": []}')
    words = ["--date", TUESDAY, "--json", str(file), "--markdown", str(page)]
    words += [f"beauty once={rivals.root}@{MONDAY}"]
    assert main(["compare", *words]) == 0

    text = page.read_text()
    assert text.startswith("before\n<!-- results -->\n")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "last night" not in text
    tables, _, others = (
        text.partition("<!-- results -->")[2].partition("<!-- /results")[0].partition("**toys**")
    )
    assert tables.strip() in capsys.readouterr().out
    assert others.strip() == "| of another machine |"
    assert json.loads(file.read_text())["toys"] == []
    for label in ("TIGER |", "SASRec, softmax |", "popularity |", "TIGER, paper (table 1) | 0.0454 | 0.0321"):
        assert f"| {label}" in text
    assert f"training {evaluated['sasrec'].metadata['training']} |" in text
    assert "cosine to the last item's content embedding, encoder hashing |" in text
    rows = {row["method"]: row for row in json.loads(file.read_text())["beauty once"]}
    reference = evaluated["sasrec"].metadata["model"]
    for label, who in (("TIGER", "model"), ("popularity", "popularity")):
        own = evaluated[who].metadata["model"]
        assert rows[label]["difference"]["ndcg@10"]["value"] == pytest.approx(
            own["ndcg@10"] - reference["ndcg@10"], abs=1e-9
        )
    assert rows["SASRec, softmax"]["difference"] is None


def test_evaluations_of_other_users_are_not_compared(rivals: Rivals, evaluated: dict[str, Manifest]) -> None:
    fewer = rivals.run("popularity", date=TUESDAY, evaluation={"max_users": 50})
    with pytest.raises(ArtifactError, match=r"cannot be compared: evaluation\.max_users None and 50"):
        published_evaluation.paired_counts(rivals.storage, evaluated["model"], fewer, 10)
    other_histories = fewer.model_copy(update={"settings": evaluated["model"].settings})
    with pytest.raises(DataError, match="are not of the same users and targets"):
        published_evaluation.paired_counts(rivals.storage, evaluated["model"], other_histories, 10)


def test_a_model_of_other_histories_is_not_evaluated(night: Night, rivals: Rivals) -> None:
    inputs = {**night["model"].inputs, "sequences": "0" * 64}
    model = night["model"].model_copy(update={"inputs": inputs})
    with pytest.raises(ArtifactError, match="was trained on other histories"):
        run(
            EVALUATION_STAGE,
            night.settings,
            rivals.storage,
            model,
            night["semantic_ids"],
            night["sequences"],
            night["catalog"],
        )
    assert ("evaluation", TUESDAY) not in published_dates(rivals.storage)


def test_a_comparison_of_nothing_says_which_job_to_run(rivals: Rivals) -> None:
    with pytest.raises(
        ArtifactError, match=r"no evaluation is published under .* run `tiger-ray run evaluation`"
    ):
        comparison.rows_of(rivals.storage, "2020-01-01", "evaluation-sasrec-softmax")
