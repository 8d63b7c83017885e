"""The metadata of each artifact as a type: a manifest that lacks a field, or has a wrong one, names the field.

The fields are checked when a stage publishes, and again when a later stage or another night reads. A field
with a default is newer than the artifact: manifests without it stay readable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.store import InputFile
from tiger_ray.errors import ArtifactError

Count = Annotated[int, Field(ge=0)]


IdType = Literal["string", "large_string", "int64"]


Holdout = Literal["leave_one_out", "time", "none"]


_OF_DECODER = ("beam_width", "items", "temperature", "model_history")


_METRIC = re.compile(r"[a-z_]+@\d+")


class Metadata(BaseModel):
    """The metadata of an artifact; frozen. Fields that this version does not know are ignored.

    >>> EmbeddingsMetadata.check({"summary": "9 items x 4", "dim": 4, "encoder": "5e3f", "newer": 1}).dim
    4
    """

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    has_metrics: ClassVar[bool] = False
    """Metrics such as `ndcg@10` may stand beside the fields."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The metadata of a manifest, checked.

        Raises:
            ArtifactError: a field is missing or of a wrong type; names artifact, date, run and field, and how to
                restore the manifest.
        """
        try:
            return cls.check(manifest.metadata)
        except ValidationError as error:
            raise manifest.damaged(_problem(error)) from None

    @classmethod
    def fits(cls, manifest: Manifest) -> bool:
        """True if `of` can read the manifest."""
        try:
            cls.of(manifest)
        except ArtifactError:
            return False
        return True

    @classmethod
    def check(cls, metadata: Mapping[str, Any]) -> Self:
        # Through JSON: manifests hold lists and text where the fields are tuples and moments.
        return cls.model_validate_json(json.dumps(metadata), strict=True)


class Published(Metadata):
    """What every published artifact has."""

    summary: str
    """One line for people, which the job prints."""


class CatalogMetadata(Published):
    """The items of a night."""

    items: Count
    """Items in the catalog."""
    empty_text: Count
    """Items without any text."""
    available: Count
    """Items that may be recommended tonight."""
    id_type: IdType
    """Arrow type of `item_id`."""


class EventsMetadata(Published):
    """The events of a night, counted, and the files that hold them."""

    events: Count
    """Events of the wanted kinds, those with a null and those of unknown items included."""
    nulls: Count
    """Events with a null in a column that must have a value."""
    unknown: Count
    """Events without null whose item is not in the catalog."""
    unwanted_kind: Count
    """Rows of other kinds than `events.event_types`."""
    files: tuple[InputFile, ...]
    """The input files in the order of their names: address, size in bytes, version."""
    user_id_type: IdType
    """Arrow type of `user_id`."""
    timestamp_unit: Literal["s", "ms", "us", "ns", "position"]
    """Unit of the timestamps; `position` is a place in the order of events."""


class EmbeddingsMetadata(Published):
    """The embeddings of all items of the catalog."""

    dim: Annotated[int, Field(ge=1)]
    """Width D of an embedding, in float32 values."""
    encoder: str
    """Fingerprint of the encoder: equal fingerprints give equal embeddings for equal texts."""


class QuantizerMetadata(Published):
    """The fitted quantizer."""

    level_sizes: tuple[Annotated[int, Field(ge=1)], ...]
    """Codewords of each level, without the disambiguator."""
    kind: str
    """Setting `quantizer.kind`."""


class RegistryMetadata(Metadata):
    """The registry of Semantic IDs after one append, before a night adds which items are eligible."""

    items: Count
    """Items ever registered, which is one more than the highest item_index."""
    new_items: Count
    """Items that this night appended."""
    disambiguated_share: Annotated[float, Field(ge=0.0, le=1.0)]
    """Share (0 to 1) of the registered items whose disambiguator is not 0."""
    level_sizes: tuple[Annotated[int, Field(ge=1)], ...]
    """Codes of each level, the disambiguator last."""
    space: str
    """The ID space: the first 32 digits of the quantizer's digest, and the sizes of the levels."""
    item_id_type: IdType
    """Arrow type of `item_id`."""
    appended_to: str | None
    """Digest of the registry before this night; null on the first night."""


class SemanticIdsMetadata(RegistryMetadata, Published):
    """The registry of Semantic IDs as it is published for a night."""

    eligible: Count
    """Registered items that may be recommended tonight."""


class SequencesMetadata(Published):
    """The histories of all users. The fields that default to null belong to the time split, and come together."""

    users: Count
    """Users, those without history included."""
    user_id_type: IdType
    """Arrow type of `user_id`."""
    events: Count
    """Events in all histories."""
    users_without_history: Count
    """Users whose events all have nulls or unknown items."""
    examples_none: Count
    """Training examples when nothing is held out (`training.holdout` none)."""
    examples_leave_one_out: Count
    """Training examples of holdout leave_one_out."""
    validation_users_leave_one_out: Count
    """Users with a validation event, for holdout leave_one_out."""
    test_users_leave_one_out: Count
    """Users with a test event, for holdout leave_one_out."""
    validation_tied_leave_one_out: Count
    """Users whose validation event has the moment of a neighbouring event, so that `events.ties` chose it."""
    test_tied_leave_one_out: Count
    """Users whose test event has the moment of the event before it, so that `events.ties` chose it."""
    examples_time: Count | None = None
    """Training examples of holdout time."""
    validation_users_time: Count | None = None
    """Users with a validation event, for holdout time."""
    test_users_time: Count | None = None
    """Users with a test event, for holdout time."""
    validation_tied_time: Count | None = None
    """Users whose validation event of the time split has the moment of the next event."""
    test_tied_time: Count | None = None
    """Users whose test event of the time split has the moment of the next event."""
    validation_from: str | None = None
    """Start of the validation period, ISO 8601 in UTC."""
    test_from: str | None = None
    """Start of the test period, ISO 8601 in UTC."""

    @model_validator(mode="after")
    def _time_split_is_whole(self) -> Self:
        split = {name: getattr(self, name) for name in type(self).model_fields if _of_time_split(name)}
        missing = [name for name, value in split.items() if value is None]
        if missing and len(missing) < len(split):
            raise ValueError(f"{', '.join(missing)} missing, but other fields of the time split are there")
        return self

    def examples(self, holdout: str) -> int | None:
        """Training examples that a holdout leaves; None: the histories have no moments of the time split."""
        return {
            "none": self.examples_none,
            "leave_one_out": self.examples_leave_one_out,
            "time": self.examples_time,
        }[holdout]

    def held_out_users(self, holdout: str, split: str) -> int:
        """Users with an event held out.

        Args:
            holdout: leave_one_out, or time if the histories have its moments (`require_holdout`).
            split: validation or test.
        """
        return self._count(f"{split}_users_{holdout}")

    def tied_users(self, holdout: str, split: str) -> int:
        """Users whose held-out event `events.ties` chose among events of one moment; arguments as `held_out_users`."""
        return self._count(f"{split}_tied_{holdout}")

    def _count(self, name: str) -> int:
        found: int | None = getattr(self, name)
        assert found is not None, "`require_holdout` comes first"
        return found


class TrainedMetadata(Published):
    """A trained model, be it TIGER or a baseline; its validation metrics stand beside, such as `ndcg@10`."""

    has_metrics = True

    holdout: Holdout
    """Which events training did not see: setting `training.holdout`."""
    step: Count
    """Optimizer steps of the checkpoint that became the model."""
    loss: float
    """Mean training loss since the checkpoint before, in nats per predicted token (TIGER) or item (SASRec)."""


class ModelMetadata(TrainedMetadata):
    """The TIGER model."""

    space: str
    """The ID space that the model writes."""
    level_sizes: tuple[Annotated[int, Field(ge=1)], ...]
    """Codes of each level of the ID space, the disambiguator last."""


class Metrics(BaseModel):
    """Metrics of a ranker by name, such as `recall@10`, each a mean over the users.

    >>> Metrics.model_validate({"users": 2, "recall@10": 0.5}).by_name
    {'recall@10': 0.5}
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, float] = Field(init=False)

    users: Count
    """Users that were evaluated."""

    @property
    def by_name(self) -> dict[str, float]:
        """Only the metrics."""
        return dict(self.__pydantic_extra__)

    def as_dict(self) -> dict[str, Any]:
        """Users and metrics, ready for JSON."""
        return {"users": self.users, **self.by_name}


class Protocol(BaseModel):
    """How a ranker was evaluated; evaluations of one protocol can be compared. A ranker may add fields of its own.

    >>> fields = {"split": "leave-one-out, test", "ranking": "full", "history_masked": False, "max_history": None}
    >>> Protocol(**fields, ties="hash", unseen_targets="keep", users="all", depth=3).as_dict()["depth"]
    3
    """

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    split: str
    """Holdout and split, such as `leave-one-out, test`."""
    ranking: str
    """Which items are ranked, and by what."""
    history_masked: bool
    """True if the lists leave out the items of the user's history."""
    max_history: Annotated[int, Field(ge=1)] | None
    """Most events of a history that any ranker reads; null: all."""
    ties: str
    """What orders events of equal timestamps: a column of the input, or `events.ties`."""
    unseen_targets: Literal["keep", "drop"]
    """`drop` if users are left out whose target is the item of no training event."""
    users: str
    """All users, or the size of the sample."""
    beam_width: Annotated[int, Field(ge=1)] | None = None
    """Beams of the decoder (TIGER)."""
    items: str | None = None
    """`drawn`, or `most probable` (TIGER)."""
    temperature: float | None = None
    """Temperature of the decoder (TIGER)."""
    model_history: Annotated[int, Field(ge=1)] | None = None
    """Events of a history that the model reads (TIGER and SASRec)."""
    encoder: str | None = None
    """Encoder of the embeddings (neighbours)."""

    def as_dict(self) -> dict[str, Any]:
        """The fields that were given, ready for JSON."""
        return self.model_dump(mode="json", exclude_unset=True)


class EvaluationMetadata(Published):
    """The evaluation of the night's model, or of a baseline."""

    model: Metrics
    """Metrics of the ranker."""
    popularity: Metrics
    """Metrics of popularity for the same users."""
    protocol: Protocol
    """How both were evaluated."""
    periods: str | None = None
    """The moments of the time split, in words; null for other splits."""
    training: str | None = None
    """The training of the ranker, in words; null for a ranker without training."""
    tied_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Share of all users with a held-out event whose event `events.ties` chose among events of one moment; null in
    evaluations of older versions."""

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """As `Metadata.of`, with the recall and NDCG at each of `evaluation.ks`, and with the decoder of TIGER."""
        found = super().of(manifest)
        for name in _OF_DECODER if manifest.artifact == "evaluation" else ():
            if getattr(found.protocol, name) is None:
                raise manifest.damaged(f"metadata.protocol.{name} is missing")
        names = [
            f"{metric}@{k}" for metric in ("recall", "ndcg") for k in manifest.setting("evaluation", "ks")
        ]
        for who, metrics in (("model", found.model), ("popularity", found.popularity)):
            for name in names:
                if name not in metrics.by_name:
                    raise manifest.damaged(f"metadata.{who}.{name} is missing")
        return found


class LastEvaluation(Metrics):
    """Metrics of the model of some recommendations, kept for the quality gate of the next night."""

    protocol: dict[str, Any]
    """The protocol as the evaluation had it; not checked, because any version may have written it."""


class RecommendationsMetadata(Published):
    """The recommended items of all users."""

    users: Count
    """Users, each with a list."""
    fallback_users: Count
    """Users without history, who get the most popular items."""
    short_lists: Count
    """Users with fewer items than `top_k`."""
    eligible_items: Count
    """Items that may be recommended at all."""
    scoring: str
    """Fingerprint of everything that decides the lists, which is everything except the date."""
    top_k: Annotated[int, Field(ge=1)]
    """Most items per user."""
    form: Literal["wide", "long"]
    """One row per user, or one row per user and item."""
    model_version: str
    """Run of the model."""
    semantic_ids_version: str
    """Run of the Semantic IDs."""
    holdout: Holdout
    """Which events the model did not see in training."""
    evaluation: LastEvaluation | None
    """Metrics of the model; null if the model has no evaluation."""


MODELS: dict[str, type[Published]] = {
    "catalog": CatalogMetadata,
    "events": EventsMetadata,
    "embeddings": EmbeddingsMetadata,
    "quantizer": QuantizerMetadata,
    "semantic_ids": SemanticIdsMetadata,
    "sequences": SequencesMetadata,
    "model": ModelMetadata,
    "evaluation": EvaluationMetadata,
    "recommendations": RecommendationsMetadata,
}
"""Artifact -> its metadata, in the order of the night."""


def model_of(artifact: str) -> type[Published]:
    """The metadata of an artifact; `model-NAME` and `evaluation-NAME` are those of a baseline."""
    if artifact.startswith("model-"):
        return TrainedMetadata
    return MODELS.get(artifact.partition("-")[0], Published)


def check_metadata(artifact: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Check the metadata that a stage is about to publish, and return them unchanged.

    Raises:
        ArtifactError: a field is missing, of a wrong type or unknown.
    """
    model = model_of(artifact)
    try:
        model.check(metadata)
        problem = None
    except ValidationError as error:
        problem = _problem(error)
    for name in metadata:
        if model is Published or name in model.model_fields:
            continue
        if not (model.has_metrics and _METRIC.fullmatch(name)):
            problem = problem or f"metadata.{name} is not a field of {model.__name__}"
    if problem:
        raise ArtifactError(
            f"the stage of {artifact} returned metadata that no later stage could read: {problem}. Nothing was "
            "published; correct what the stage returns, or the fields in tiger_ray/artifacts/metadata.py"
        )
    return dict(metadata)


def _of_time_split(name: str) -> bool:
    return name.endswith(("_time", "_from"))


def _problem(error: ValidationError) -> str:
    """The first field that is wrong, and how."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, ("metadata", *first["loc"])))
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {first['input']!r}: {first['msg']}" if first["loc"] else f"{place}: {first['msg']}"
