"""Training that begins with the last night's model, or says why it does not."""

import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.worlds import MONDAY, TUESDAY, WEDNESDAY, Night, published_dates, run, run_night, tiny_settings
from tiger_ray.artifacts import lineage
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import ArtifactError
from tiger_ray.published import model as published_model
from tiger_ray.settings.settings import Settings
from tiger_ray.stages.model import STAGE as MODEL_STAGE

pytestmark = pytest.mark.ray


RATE = 1e-6
ONE_STEP = {
    "warm_start": True,
    "num_steps": 1,
    "optimizer": "adamw",
    "learning_rate": RATE,
    "warmup_steps": 0,
    "validation_users": 0,
}


def settings_of(night: Night, root: str, date: str, **changed: Any) -> Settings:
    data = night.settings.catalog.uri.removesuffix("/catalog")
    return tiny_settings(root, data, date, **{"training": ONE_STEP, **changed})


def weights(storage: Storage, model: Manifest) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(storage.read_file(model, "model.safetensors"))


def first_loss(storage: Storage, model: Manifest) -> float:
    return json.loads(storage.read_file(model, "curve.json"))["points"][0]["loss"]


def test_a_warm_start_begins_with_the_last_model_and_tonights_settings(night: Night, night_root: str) -> None:
    storage = Storage(night_root)
    settings = settings_of(night, night_root, TUESDAY, model={"dropout": 0.05, "max_history": 6})
    inputs = (night["sequences"], night["semantic_ids"])
    tuesday = run(MODEL_STAGE, settings, storage, *inputs)

    assert tuesday.status == "computed"
    model = tuesday.manifest
    assert model.inputs["warm_start"] == night["model"].digest
    assert f"begun with the model of {MONDAY}" in model.metadata["summary"]
    before, after = weights(storage, night["model"]), weights(storage, model)
    assert before.keys() == after.keys()
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < change < 2 * RATE, "one step of Adam moves a weight by the learning rate"
    config = json.loads(storage.read_file(model, "config.json"))["tiger_ray"]["model"]
    assert (config["dropout"], config["max_history"]) == (0.05, 6)

    vocabulary_size = len(before["shared.weight"])
    last = json.loads(storage.read_file(night["model"], "curve.json"))["points"][-1]["loss"]
    assert first_loss(storage, model) < 1.25 * last < 0.8 * math.log(vocabulary_size)

    assert run(MODEL_STAGE, settings, storage, *inputs).status == "skipped"


def test_the_first_night_of_a_warm_start_trains_from_scratch_and_says_so(
    night: Night, night_root: str, s3_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(night_root)
    bucket = night_root.removeprefix("s3://").split("/")[0]
    for file in storage.store.find("model"):
        s3_client.delete_object(Bucket=bucket, Key=f"prefix/{file.path}")
    settings = settings_of(night, night_root, WEDNESDAY)
    model = run(MODEL_STAGE, settings, storage, night["sequences"], night["semantic_ids"]).manifest
    assert "training.warm_start: no model of the last 31 days, so training starts from scratch" in caplog.text
    assert "warm_start" not in model.inputs
    assert "begun with" not in model.metadata["summary"]
    assert first_loss(storage, model) > 0.9 * math.log(len(weights(storage, model)["shared.weight"]))


def test_the_last_model_is_of_an_earlier_date_at_most_a_month_ago(night: Night, night_root: str) -> None:
    storage = Storage(night_root)
    assert published_model.last_model(storage, MONDAY) is None
    for date in (TUESDAY, "2026-12-24"):
        assert published_model.last_model(storage, date) == night["model"]
    assert published_model.last_model(storage, "2026-12-25") is None
    storage.publish_again(night["model"], WEDNESDAY)
    for date, expected in ((TUESDAY, MONDAY), (WEDNESDAY, MONDAY), ("2026-11-26", WEDNESDAY)):
        found = published_model.last_model(storage, date)
        assert found is not None
        assert found.date == expected


def test_a_model_of_another_shape_is_no_warm_start(night: Night, night_root: str) -> None:
    settings = settings_of(night, night_root, TUESDAY, model={"d_ff": 48, "num_layers": 2, "dropout": 0.2})
    storage = Storage(night_root)
    with pytest.raises(
        ArtifactError,
        match=rf"training\.warm_start: the model of {MONDAY} has another shape "
        r"\(model\.num_layers 1 -> 2, model\.d_ff 64 -> 48\)\. Set training\.warm_start to false",
    ) as refused:
        run(MODEL_STAGE, settings, storage, night["sequences"], night["semantic_ids"])
    assert refused.value.exit_code == 3
    assert ("model", TUESDAY) not in published_dates(storage)


def test_a_model_of_another_id_space_is_no_warm_start(night: Night, night_root: str) -> None:
    settings = settings_of(night, night_root, TUESDAY, quantizer={"version": 2, "level_sizes": [12, 12, 12]})
    other = run_night(settings, until="sequences")
    with pytest.raises(
        ArtifactError,
        match=rf"training\.warm_start: the model of {MONDAY} writes Semantic IDs of ID space .*, tonight's "
        r"are of .*\. Set training\.warm_start to false",
    ) as refused:
        run(MODEL_STAGE, settings, other.storage, other["sequences"], other["semantic_ids"])
    assert refused.value.exit_code == 3
    assert ("model", TUESDAY) not in published_dates(other.storage)


def test_a_model_that_saw_what_tonight_hides_is_no_warm_start(night: Night) -> None:
    """A refit on all events, then a night with evaluation: the model has seen tonight's test events."""
    settings = settings_of(night, night.settings.storage.root, TUESDAY)
    last, semantic_ids = night["model"], night["semantic_ids"]
    lineage.require_same_model(last, settings, semantic_ids)
    refit = last.model_copy(update={"metadata": {**last.metadata, "holdout": "none"}})
    with pytest.raises(
        ArtifactError,
        match=rf"the model of {MONDAY} was trained with training\.holdout 'none', tonight's is 'leave_one_out': the model may "
        r"have seen events that are hidden tonight",
    ):
        lineage.require_same_model(refit, settings, semantic_ids)
    everything = settings_of(
        night, night.settings.storage.root, TUESDAY, training={**ONE_STEP, "holdout": "none"}
    )
    lineage.require_same_model(refit, everything, semantic_ids)
    lineage.require_same_model(last, everything, semantic_ids)


@pytest.mark.parametrize(
    ("moment", "refused"),
    [
        ("2026-03-01", True),
        ("2026-05-01T11:59:59Z", True),
        ("2026-05-01T12:00:00Z", False),
        ("2026-06-01", False),
    ],
)
def test_a_period_that_begins_before_that_of_the_last_model_is_no_warm_start(
    night: Night, moment: str, refused: bool
) -> None:

    def split_at(moment: str) -> Settings:
        return settings_of(
            night,
            night.settings.storage.root,
            TUESDAY,
            training={**ONE_STEP, "holdout": "time"},
            sequences={"validation_from": moment, "test_from": "2026-07-01"},
        )

    last, before = night["model"], split_at("2026-05-01T12:00:00Z").resolved()
    timed = last.model_copy(update={"metadata": {**last.metadata, "holdout": "time"}, "settings": before})
    settings = split_at(moment)
    if not refused:
        lineage.require_same_model(timed, settings, night["semantic_ids"])
        return
    with pytest.raises(
        ArtifactError,
        match=r"trained with sequences\.validation_from 2026-05-01T12:00:00Z, tonight's is 2026-0",
    ):
        lineage.require_same_model(timed, settings, night["semantic_ids"])
