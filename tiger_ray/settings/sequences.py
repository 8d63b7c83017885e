"""Section `sequences`: histories and holdouts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tiger_ray.settings.base import Count, Moment, Section


class SequencesSettings(Section):
    """Events to one history per user."""

    num_shards: Count = 8
    """Files of the histories; users are scored, and scoring resumes, file by file."""
    max_events: Annotated[int, Field(ge=3)] = 1000
    """Most recent events kept per user; bounds the cost of a bot."""
    validation_from: Moment | None = None
    """Start of the validation period of `training.holdout: time`: a day or a time, in UTC unless it names a zone."""
    test_from: Moment | None = None
    """Start of the test period, which ends with the last event; given together with `validation_from`."""

    @model_validator(mode="after")
    def _moments_are_in_order(self) -> SequencesSettings:
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("sequences.validation_from and sequences.test_from must be given together")
        if self.validation_from and self.test_from and self.validation_from >= self.test_from:
            raise ValueError(
                f"sequences.validation_from {self.validation_from} must be before sequences.test_from {self.test_from}"
            )
        return self
