"""Section `sasrec`: SASRec, a baseline and a tower."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tiger_ray.settings.base import Count, Section


class SasrecSettings(Section):
    """A transformer over item ids, trained by section `training` (jobs/sasrec.yaml has settings for Amazon Beauty)."""

    loss: Literal["softmax", "binary"] = "softmax"
    """`softmax`: cross-entropy over all items; `binary`: the paper's loss, each target against one random item."""
    num_layers: Count = 2
    """Transformer layers."""
    d_model: Count = 64
    """Width of items, positions and hidden states."""
    num_heads: Count = 1
    """Attention heads; they divide `d_model`."""
    d_ff: Count = 64
    """Width of the feed-forward layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of activations dropped in training."""
    max_history: Count = 50
    """Most recent items of a history that the model reads."""
    output_map: bool = False
    """Add a linear map between the history and the items, so that the items of the history need not rank first: better
    where the history is not excluded, worse where it is."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> SasrecSettings:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"sasrec.num_heads {self.num_heads} does not divide sasrec.d_model {self.d_model}"
            )
        return self
