"""All sections of the settings, and the rules that hold between sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tiger_ray.settings.base import calendar_day
from tiger_ray.settings.baseline import BaselineSettings
from tiger_ray.settings.catalog import CatalogSettings
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.embeddings import EmbeddingsSettings
from tiger_ray.settings.evaluation import EvaluationSettings
from tiger_ray.settings.events import EventsSettings
from tiger_ray.settings.export import ExportSettings
from tiger_ray.settings.model import ModelSettings
from tiger_ray.settings.quantizer import QuantizerSettings
from tiger_ray.settings.ray import RaySettings
from tiger_ray.settings.recommendations import RecommendationsSettings
from tiger_ray.settings.sasrec import SasrecSettings
from tiger_ray.settings.semantic_ids import SemanticIdsSettings
from tiger_ray.settings.sequences import SequencesSettings
from tiger_ray.settings.serving import ServingSettings
from tiger_ray.settings.storage import StorageSettings
from tiger_ray.settings.training import TrainingSettings


class Settings(BaseSettings):
    """Settings of the nightly job and of each of its stages.

    >>> uris = {"storage": {"root": "out"}, "catalog": {"uri": "items"}, "events": {"uri": "events"}}
    >>> Settings(date="2026-11-23", decoding={"beam_width": 50}, **uris).decoding.beam_width
    50
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=True,
    )

    date: str
    """The night, YYYY-MM-DD; it names the published artifacts and never comes from a clock."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all random numbers; a quantizer keeps the seed of its fit."""
    storage: StorageSettings
    ray: RaySettings = RaySettings()
    catalog: CatalogSettings
    events: EventsSettings
    embeddings: EmbeddingsSettings = EmbeddingsSettings()
    quantizer: QuantizerSettings = QuantizerSettings()
    semantic_ids: SemanticIdsSettings = SemanticIdsSettings()
    sequences: SequencesSettings = SequencesSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    decoding: DecodingSettings = DecodingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    baseline: BaselineSettings = BaselineSettings()
    sasrec: SasrecSettings = SasrecSettings()
    recommendations: RecommendationsSettings = RecommendationsSettings()
    export: ExportSettings = ExportSettings()
    serving: ServingSettings = ServingSettings()

    @field_validator("date")
    @classmethod
    def _date_is_a_calendar_day(cls, value: str) -> str:
        return calendar_day(value)

    @model_validator(mode="after")
    def _sections_agree(self) -> Settings:
        widest = max(self.recommendations.top_k, self.serving.max_k, *self.evaluation.ks)
        if self.decoding.beam_width < widest:
            raise ValueError(
                f"decoding.beam_width is {self.decoding.beam_width}, but {widest} items are asked for by "
                "recommendations.top_k, serving.max_k or evaluation.ks; raise decoding.beam_width"
            )
        if self.embeddings.encoder == "catalog" and self.catalog.vector is None:
            raise ValueError("embeddings.encoder is 'catalog', so catalog.vector must name the vector column")
        training = self.training
        if training.global_batch_size < training.num_workers:
            raise ValueError(
                f"training.global_batch_size is {training.global_batch_size} and training.num_workers is "
                f"{training.num_workers}: some workers would have no example; raise the one or lower the other"
            )
        if training.patience and (not training.validation_users or training.holdout == "none"):
            raise ValueError(
                "training.patience waits for a better NDCG@10, which needs training.validation_users above 0 "
                "and training.holdout 'leave_one_out' or 'time'"
            )
        if training.holdout == "time" and self.sequences.validation_from is None:
            raise ValueError(
                "training.holdout is 'time', so sequences.validation_from and sequences.test_from must say where "
                "the validation and the test period begin"
            )
        if self.sequences.validation_from is not None and self.events.timestamp_unit == "position":
            raise ValueError(
                "sequences.validation_from and sequences.test_from are times, but events.timestamp_unit is "
                "'position', which orders the events of one user and holds no times. Name a column with times in "
                "events.timestamp; the positions can still decide ties (events.ties 'column')"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read YAML files and the command line only: an environment variable must not change a night unnoticed."""
        return (init_settings,)

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, ready for JSON; written into each manifest."""
        return self.model_dump(mode="json")
