"""A manifest that is damaged anywhere in its metadata names the field, whoever reads it."""

import copy
import json
import re
from types import NoneType
from typing import get_args

import pytest
from pydantic import BaseModel

from tests.manifests import METADATA, PROTOCOL, RUN, TIME_SPLIT, entry_of, manifest_of, metadata_of
from tiger_ray.artifacts.metadata import (
    MODELS,
    CatalogMetadata,
    EvaluationMetadata,
    RecommendationsMetadata,
    SequencesMetadata,
    TrainedMetadata,
    check_metadata,
    model_of,
)
from tiger_ray.errors import ArtifactError

OPTIONAL = {
    "evaluation.periods",
    "evaluation.training",
    "evaluation.tied_share",
    "evaluation.protocol.encoder",
}
"""Fields that a manifest may lack: a newer version added them, or another ranker has them."""


def complete(artifact):
    found = metadata_of(artifact)
    if artifact == "sequences":
        found |= TIME_SPLIT
    if artifact == "evaluation":
        found["protocol"]["encoder"] = "hashing"
    return found


def nested_in(field):
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def fields_of(model, above=()):
    for name, field in model.model_fields.items():
        yield (*above, name)
        inner = nested_in(field)
        if inner is not None:
            yield from fields_of(inner, (*above, name))


FIELDS = [(artifact, path) for artifact in METADATA for path in fields_of(model_of(artifact))]
FIELDS += [
    ("evaluation", (who, f"{name}@{k}"))
    for who in ("model", "popularity")
    for name in ("recall", "ndcg")
    for k in (5, 10)
]
FIELDS += [("events", ("files", 0, name)) for name in ("path", "bytes", "version")]


def name_of(value):
    return value if isinstance(value, str) else ".".join(map(str, value))


def holder(metadata, path):
    for name in path[:-1]:
        metadata = metadata[name]
    return metadata


def test_every_artifact_has_an_example_with_every_field():
    assert {artifact.partition("-")[0] for artifact in METADATA} == set(MODELS)
    for artifact, path in FIELDS:
        assert path[-1] in holder(complete(artifact), path) or isinstance(path[-1], int), (artifact, path)


@pytest.mark.parametrize(("artifact", "path"), FIELDS, ids=name_of)
def test_a_manifest_without_a_field_names_the_field(artifact, path):
    metadata = complete(artifact)
    del holder(metadata, path)[path[-1]]
    manifest = manifest_of(artifact, metadata)
    if ".".join(map(str, (artifact, *path))) in OPTIONAL:
        assert model_of(artifact).of(manifest) is not None
        return
    with pytest.raises(ArtifactError) as refused:
        model_of(artifact).of(manifest)
    assert re.search(rf"\b{re.escape(str(path[-1]))}\b", str(refused.value))
    assert "missing" in str(refused.value)


@pytest.mark.parametrize(("artifact", "path"), FIELDS, ids=name_of)
def test_a_field_of_a_wrong_type_is_named_with_its_value(artifact, path):
    metadata = complete(artifact)
    holder(metadata, path)[path[-1]] = ["wrong"]
    with pytest.raises(ArtifactError) as refused:
        model_of(artifact).of(manifest_of(artifact, metadata))
    assert f"metadata.{'.'.join(map(str, path))}" in str(refused.value)
    assert "'wrong'" in str(refused.value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [("9", "'9'"), (9.0, "9.0"), (True, "True"), (-1, "-1"), (None, "None")],
)
def test_a_count_is_a_whole_number_and_nothing_that_looks_like_one(value, problem):
    damaged = manifest_of("catalog", metadata_of("catalog", items=value))
    with pytest.raises(ArtifactError, match=rf"metadata\.items is {re.escape(problem)}: Input should be "):
        CatalogMetadata.of(damaged)


def test_the_error_says_which_manifest_is_damaged_and_how_to_restore_it():
    metadata = metadata_of("catalog")
    del metadata["items"]
    with pytest.raises(ArtifactError) as refused:
        CatalogMetadata.of(manifest_of("catalog", metadata))
    assert str(refused.value) == (
        f"the manifest of catalog of 2026-11-23 (run {RUN}) is damaged: metadata.items is missing. To restore it, "
        f"remove catalog/_runs/{RUN}/_manifest.json below storage.root, and run the night of 2026-11-23 again with "
        "--storage.replace true"
    )
    with pytest.raises(
        ArtifactError, match=r"below catalog/_heads of storage\.root; restore that file from a backup"
    ):
        CatalogMetadata.of(manifest_of("catalog", metadata, date=""))


def test_a_setting_an_input_or_a_fact_that_is_missing_is_named():
    manifest = manifest_of(
        "sequences", settings={"seed": 3, "sequences": {"test_from": None}}, inputs={"events": "e"}
    )
    assert (manifest.setting("seed"), manifest.setting("sequences", "test_from")) == (3, None)
    assert manifest.setting("sequences") == {"test_from": None}
    for names in (("sequences", "max_events"), ("model", "d_model"), ("seed", "value")):
        with pytest.raises(
            ArtifactError, match=rf"sequences of 2026-11-23 .* settings\.{'.'.join(names)} is missing"
        ):
            manifest.setting(*names)
    assert manifest.input("events") == "e"
    with pytest.raises(ArtifactError, match=r"sequences of 2026-11-23 .* inputs\.semantic_ids is missing"):
        manifest.input("semantic_ids")
    entry = entry_of("shard-00000.parquet", users=2, events=5)
    assert entry.fact("events") == 5
    with pytest.raises(
        ArtifactError,
        match=rf"file _runs/{RUN}/a-0/shard-00000\.parquet has no fact 'examples_time', only events, users\. To restore "
        rf"it, remove _manifest\.json from _runs/{RUN}, and run the night again",
    ):
        entry.fact("examples_time")


def test_what_is_copied_from_an_evaluation_is_what_it_holds():
    metadata = metadata_of("evaluation")
    found = EvaluationMetadata.of(manifest_of("evaluation", metadata))
    assert json.dumps(found.model.as_dict(), sort_keys=True) == json.dumps(metadata["model"], sort_keys=True)
    assert json.dumps(found.protocol.as_dict(), sort_keys=True) == json.dumps(PROTOCOL, sort_keys=True)
    # a baseline says other things of itself, and has no decoder
    own = {
        name: PROTOCOL[name]
        for name in PROTOCOL
        if name not in ("beam_width", "items", "temperature", "model_history")
    }
    own |= {"encoder": "hashing", "probes": 8}
    other = manifest_of("evaluation-neighbours", {**metadata, "protocol": own})
    assert EvaluationMetadata.of(other).protocol.as_dict() == own


def test_last_nights_evaluation_is_read_whatever_its_protocol_was():
    metadata = metadata_of("recommendations")
    metadata["evaluation"]["protocol"] = {"split": "of an older version"}
    last = RecommendationsMetadata.of(manifest_of("recommendations", metadata)).evaluation
    assert last.protocol == {"split": "of an older version"}
    assert last.by_name["ndcg@10"] == 0.25
    assert (
        RecommendationsMetadata.of(
            manifest_of("recommendations", {**metadata, "evaluation": None})
        ).evaluation
        is None
    )


def test_users_and_examples_are_those_of_the_holdout():
    found = SequencesMetadata.of(manifest_of("sequences", metadata_of("sequences", **TIME_SPLIT)))
    assert [found.examples(holdout) for holdout in ("none", "leave_one_out", "time")] == [22, 12, 10]
    assert [found.held_out_users("time", split) for split in ("validation", "test")] == [3, 2]
    assert found.held_out_users("leave_one_out", "test") == 4
    assert SequencesMetadata.of(manifest_of("sequences")).examples("time") is None


@pytest.mark.parametrize("artifact", METADATA)
def test_complete_metadata_is_published_as_it_is(artifact):
    metadata = complete(artifact)
    before = copy.deepcopy(metadata)
    assert check_metadata(artifact, metadata) == metadata == before


def test_metadata_with_an_unknown_or_a_wrong_field_is_not_published():
    with pytest.raises(
        ArtifactError, match=r"the stage of catalog returned .* metadata\.itmes is not a field"
    ):
        check_metadata("catalog", metadata_of("catalog", itmes=3))
    with pytest.raises(ArtifactError, match=r"the stage of quantizer returned .* metadata\.kind is missing"):
        check_metadata("quantizer", {"summary": "", "level_sizes": [4]})
    assert check_metadata("model", metadata_of("model", **{"recall@20": 0.75}))["recall@20"] == 0.75
    # an artifact of one's own has the fields it likes, and a summary
    assert check_metadata("study", {"summary": "", "anything": 1}) == {"summary": "", "anything": 1}
    with pytest.raises(ArtifactError, match=r"metadata\.summary is missing"):
        check_metadata("study", {"anything": 1})


def test_the_models_of_baselines_know_no_id_space():
    assert model_of("model-sasrec-softmax") is TrainedMetadata
    assert model_of("evaluation-sasrec-softmax-hnsw") is EvaluationMetadata


@pytest.mark.parametrize(("artifact", "path"), FIELDS, ids=name_of)
def test_every_field_is_described(artifact, path):
    model = model_of(artifact)
    for name in path:
        if name not in getattr(model, "model_fields", {}):
            return  # a metric, or a part of a dataclass
        field = model.model_fields[name]
        assert field.description
        assert field.annotation is not NoneType
        model = nested_in(field)
