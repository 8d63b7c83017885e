"""Which artifacts fit each other: each rule on manifests alone, with both sides and the remedy in its error."""

import hashlib
import json
import re

import pytest

from tests.manifests import PROTOCOL, RUN, TIME_SPLIT, entry_of, manifest_of, metadata_of
from tiger_ray.artifacts import lineage
from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.settings.settings import Settings

OTHER = "f" * 32


def registry(**changed):
    files = (
        entry_of("segment-00001-shard-00000.parquet", "2"),
        entry_of("eligible.parquet", "3"),
        entry_of("segment-00000-shard-00000.parquet", "1"),
    )
    return manifest_of("semantic_ids", metadata_of("semantic_ids", **changed), files=files)


def digest_by_hand(files, metadata):
    """SHA-256 of the canonical JSON of names, sums and metadata."""
    text = json.dumps({"files": files, "metadata": metadata}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


SEGMENTS = [["segment-00000-shard-00000.parquet", "1" * 64], ["segment-00001-shard-00000.parquet", "2" * 64]]
KEPT = {"items": 9, "level_sizes": [4, 4, 8], "space": "abc-4x4x8", "item_id_type": "string"}


def test_the_registry_is_the_segments_in_order_and_four_facts():
    found = lineage.registry_of(registry())
    assert [entry.name for entry in found.files] == [name for name, _ in SEGMENTS]
    assert found.metadata == KEPT
    assert found.digest == digest_by_hand(SEGMENTS, KEPT)


@pytest.mark.parametrize(
    "changed", [{"eligible": 0}, {"new_items": 0}, {"summary": "other"}, {"appended_to": "0" * 64}]
)
def test_what_a_night_adds_to_the_registry_leaves_it_the_same(changed):
    assert lineage.registry_of(registry(**changed)).digest == lineage.registry_of(registry()).digest


@pytest.mark.parametrize(
    "changed", [{"items": 10}, {"space": "x"}, {"level_sizes": [4, 8]}, {"item_id_type": "int64"}]
)
def test_other_items_or_codes_are_another_registry(changed):
    assert lineage.registry_of(registry(**changed)).digest != lineage.registry_of(registry()).digest


def test_histories_of_another_registry_are_refused():
    ours = digest_by_hand(SEGMENTS, KEPT)
    sequences = manifest_of("sequences", inputs={"semantic_ids": ours})
    lineage.require_same_registry(sequences, registry())
    lineage.require_same_registry(sequences, registry(eligible=1))
    theirs = "0" * 64
    with pytest.raises(
        ArtifactError,
        match=rf"sequences of 2026-11-23 \(run {RUN}\) are histories of the registry {theirs[:12]}: they were not built on "
        rf"Semantic IDs {RUN} of 2026-11-23, which are the registry {ours[:12]}\. .*run `tiger-ray run events sequences`",
    ):
        lineage.require_same_registry(manifest_of("sequences", inputs={"semantic_ids": theirs}), registry())


def test_a_catalog_with_ids_of_another_type_is_refused():
    lineage.require_same_id_type(manifest_of("catalog"), registry())
    numbers = manifest_of("catalog", metadata_of("catalog", id_type="int64"))
    with pytest.raises(
        DataError,
        match=rf"item_id is int64 in catalog of 2026-11-23 .* registry of Semantic IDs \(run {RUN}\) was started with "
        r"string; .* raising quantizer\.version",
    ):
        lineage.require_same_id_type(numbers, registry())


def test_a_model_of_another_id_space_is_refused():
    model = manifest_of("model")
    lineage.require_same_id_space(model, registry())
    with pytest.raises(
        ArtifactError,
        match=rf"model of 2026-11-23 \(run {RUN}\) was trained on ID space abc-4x4x8, but Semantic IDs {RUN} of 2026-11-23 "
        r"are of def-4x4x8; .*run `tiger-ray run model`",
    ):
        lineage.require_same_id_space(model, registry(space="def-4x4x8"))


def test_only_histories_that_know_the_moments_can_be_split_by_time():
    without = manifest_of("sequences")
    for holdout in ("leave_one_out", "none"):
        lineage.require_holdout(without, holdout)
    lineage.require_holdout(manifest_of("sequences", metadata_of("sequences", **TIME_SPLIT)), "time")
    with pytest.raises(
        ArtifactError,
        match=rf"sequences of 2026-11-23 \(run {RUN}\) were built without sequences\.validation_from and "
        r"sequences\.test_from, which training\.holdout 'time' needs; set both and build the histories again: run `tiger-ray run events sequences`",
    ):
        lineage.require_holdout(without, "time")


def test_moments_without_an_example_before_them_are_moments_all_the_same():
    counted = metadata_of("sequences", **{**TIME_SPLIT, "examples_time": 0})
    lineage.require_holdout(manifest_of("sequences", counted), "time")


def test_a_model_of_other_histories_is_refused():
    sequences = manifest_of("sequences")
    ours = digest_by_hand([], sequences.metadata)
    lineage.require_same_histories(manifest_of("model", inputs={"sequences": ours}), sequences)
    with pytest.raises(
        ArtifactError,
        match=rf"model of 2026-11-23 \(run {OTHER}\) was trained on other histories \(000000000000\) than sequences of "
        rf"2026-11-23 \(run {RUN}\) \({ours[:12]}\): .*run `tiger-ray run model`",
    ):
        lineage.require_same_histories(
            manifest_of("model", inputs={"sequences": "0" * 64}, run_id=OTHER), sequences
        )


def test_an_evaluation_belongs_to_the_model_whose_digest_it_names():
    model = manifest_of("model")
    digest = digest_by_hand([], model.metadata)
    assert lineage.is_of_model(manifest_of("evaluation", inputs={"model": digest}), model)
    assert not lineage.is_of_model(manifest_of("evaluation", inputs={"model": "0" * 64}), model)


def evaluation(artifact="evaluation", split="leave-one-out, test", **section):
    settings = {"evaluation": {"ks": [5, 10], "exclude_history": False, "max_drop": 0.2, **section}}
    metadata = metadata_of(artifact)
    metadata["protocol"]["split"] = split
    return manifest_of(
        artifact, metadata, settings=settings, run_id=OTHER if artifact != "evaluation" else RUN
    )


def test_evaluations_by_other_rules_are_not_compared():
    other = "evaluation-popularity"
    lineage.require_same_protocol(evaluation(), evaluation(other))
    lineage.require_same_protocol(evaluation(), evaluation(other, max_drop=0.9))  # changes no list
    lineage.require_same_protocol(evaluation(), evaluation(other, max_history=None))  # newer, and off
    both = (
        rf"evaluation of 2026-11-23 \(run {RUN}\) and evaluation-popularity of 2026-11-23 \(run {OTHER}\) cannot be "
        "compared: "
    )
    for section, said in (
        ({"ks": [5]}, r"evaluation\.ks \[5, 10\] and \[5\]; evaluate both with the same"),
        ({"max_history": 7}, r"evaluation\.max_history None and 7; evaluate"),
        (
            {"exclude_history": True},
            r"evaluation\.exclude_history False and True; .*run `tiger-ray run evaluation`, or jobs/baseline\.py",
        ),
    ):
        with pytest.raises(ArtifactError, match=both + said):
            lineage.require_same_protocol(evaluation(), evaluation(other, **section))
    with pytest.raises(
        ArtifactError,
        match=both
        + r"training\.holdout gave the splits 'leave-one-out, test' and 'time, test'; evaluate both with the "
        r"same training\.holdout",
    ):
        lineage.require_same_protocol(evaluation(), evaluation(other, split="time, test"))
    assert PROTOCOL["split"] == "leave-one-out, test"


def tonight(model=None, holdout="leave_one_out", **sequences):
    return Settings(
        date="2026-11-24",
        storage={"root": "/r"},
        catalog={"uri": "/c"},
        events={"uri": "/e"},
        model=model or {},
        training={"holdout": holdout},
        sequences=sequences,
    )


def last_model(settings, **metadata):
    return manifest_of("model", metadata_of("model", **metadata), settings=settings.resolved())


MOMENTS = {"validation_from": "2026-05-01T12:00:00Z", "test_from": "2026-07-01"}


def test_the_last_model_is_one_to_start_from_if_space_holdout_and_shape_are_tonights():
    last = last_model(tonight())
    lineage.require_same_model(last, tonight(), registry())
    lineage.require_same_model(last, tonight(model={"dropout": 0.5, "max_history": 3}), registry())
    lineage.require_same_model(last, tonight(holdout="none"), registry())  # hides nothing
    timed = last_model(tonight(holdout="time", **MOMENTS), holdout="time")
    lineage.require_same_model(timed, tonight(holdout="time", **MOMENTS), registry())
    later = {**MOMENTS, "validation_from": "2026-06-01"}
    lineage.require_same_model(timed, tonight(holdout="time", **later), registry())


@pytest.mark.parametrize(
    ("last", "settings", "ids", "said"),
    [
        (
            last_model(tonight()),
            tonight(),
            registry(space="def"),
            "the model of 2026-11-23 writes Semantic IDs of ID space abc-4x4x8, tonight's are of def",
        ),
        (
            last_model(tonight(), holdout="none"),
            tonight(),
            registry(),
            "the model of 2026-11-23 was trained with training.holdout 'none', tonight's is 'leave_one_out'",
        ),
        (
            last_model(tonight(holdout="time", **MOMENTS), holdout="time"),
            tonight(holdout="time", **{**MOMENTS, "validation_from": "2026-05-01T11:59:59Z"}),
            registry(),
            "was trained with sequences.validation_from 2026-05-01T12:00:00Z, tonight's is 2026-05-01 11:59:59+00:00",
        ),
        (
            last_model(tonight(model={"d_model": 64})),
            tonight(model={"d_model": 32}),
            registry(),
            "the model of 2026-11-23 has another shape (model.d_model 64 -> 32)",
        ),
    ],
    ids=["space", "holdout", "moment", "shape"],
)
def test_a_last_model_that_differs_is_no_warm_start(last, settings, ids, said):
    with pytest.raises(ArtifactError, match=re.escape(said)) as refused:
        lineage.require_same_model(last, settings, ids)
    assert str(refused.value).startswith("training.warm_start: ")
    assert "Set training.warm_start to false for this night" in str(refused.value)
