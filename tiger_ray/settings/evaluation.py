"""Section `evaluation`: metrics, and the thresholds of the quality gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tiger_ray.settings.base import Count, Section, Share, operational


class EvaluationSettings(Section):
    """Full ranking of all items, measured on events that training never saw."""

    split: Literal["test", "validation"] = "test"
    """Target event: the one that `training.holdout` keeps for the test, or the one it keeps for validation."""
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (5, 10)
    """Cut-offs of Recall@K and NDCG@K."""
    max_users: Count | None = None
    """Evaluate about this number of users, chosen by a hash of the user. Empty: all users."""
    exclude_history: bool = False
    """Mask each user's history: its items are not ranked, so a target that is among them counts as a miss."""
    max_history: Count | None = None
    """Most recent events that a ranker gets; a model may read fewer (`model.max_history`). Empty: all."""
    unseen_targets: Literal["keep", "drop"] = "keep"
    """Targets whose item has no event in the training: `keep` counts them (mostly as misses), `drop` leaves their users
    out."""
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
