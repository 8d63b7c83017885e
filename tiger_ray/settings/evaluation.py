"""Section `evaluation`: metrics, and the thresholds of the quality gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tiger_ray.settings.base import Count, Section, Share, operational


class EvaluationSettings(Section):
    """Full ranking, item level, on the event that training never saw."""

    split: Literal["test", "validation"] = "test"
    """Which hidden event is the target: the one that `training.holdout` keeps for the test, or for validation."""
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (5, 10)
    """Cut-offs of Recall@K and NDCG@K."""
    max_users: Count | None = None
    """Evaluate about so many users, chosen by a hash of the user; empty: everybody."""
    exclude_history: bool = False
    """Mask each user's history: none of its items is ranked, and a target that is among them cannot be hit."""
    max_history: Count | None = None
    """Most recent events that a ranker is given; it may read fewer (`model.max_history`). Empty: all."""
    unseen_targets: Literal["keep", "drop"] = "keep"
    """Targets without an event that training saw: count them, as misses most of the time, or leave their users out."""
    min_ratio_to_popularity: Annotated[float, Field(ge=0.0)] = operational(1.0)
    """Quality gate: NDCG at the largest K must be at least this many times popularity's."""
    max_drop: Share = operational(0.2)
    """Quality gate: share of the last published NDCG that a new night may lose."""

    @model_validator(mode="after")
    def _whole_histories_are_masked(self) -> EvaluationSettings:
        if self.exclude_history and self.max_history is not None:
            raise ValueError(
                f"evaluation.exclude_history masks whole histories, but evaluation.max_history is {self.max_history} and "
                "a ranker would only be given their ends. Leave evaluation.max_history empty; model.max_history and "
                "sasrec.max_history already limit what a model reads"
            )
        return self
