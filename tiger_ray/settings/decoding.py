"""Section `decoding`: constrained beam search."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tiger_ray.settings.base import Count, Workers


class DecodingSettings(Workers):
    """Constrained beam search, shared by evaluation, recommendations and serving."""

    beam_width: Count = 20
    """Candidates kept per level W; at least the number of items asked for."""
    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Divides the logits: above 1 the probabilities even out, below 1 they sharpen."""
    sample: bool = False
    """Draw each user's items without replacement instead of taking the most probable ones, each codeword by its
    probability; `seed` and the user decide, and a higher temperature makes the draw more diverse."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products. bf16 is about twice as fast where the CPU or GPU knows it (elsewhere it is
    fp32, which is said); items of nearly equal score may then change places with the users they are decoded with."""
    batch_tokens: Count | None = None
    """History tokens and beams of the users decoded at once, which sets memory: about 30 kB each at
    levels of 256 codewords, for each thread of a CPU; empty: 4,096 on a CPU and 262,144 on a GPU."""
