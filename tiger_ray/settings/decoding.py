"""Section `decoding`: constrained beam search."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tiger_ray.settings.base import Count, Workers


class DecodingSettings(Workers):
    """Constrained beam search, shared by evaluation, recommendations and serving."""

    beam_width: Count = 20
    """Candidates W kept at each level; at least the number of items per user."""
    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Divides the logits: above 1 makes the probabilities more equal, below 1 less equal."""
    sample: bool = False
    """Draw each user's items by their probability and without replacement, instead of taking the most probable
    ones. The draw depends on `seed` and on the user; a higher temperature makes it more diverse."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products. bf16 is about twice as fast on a CPU or GPU with bf16 instructions; any other
    device computes in fp32 and logs that. In bf16 the order of items with nearly equal scores may depend on the
    users of the same batch."""
    batch_tokens: Count | None = None
    """History tokens and beams decoded at once. This sets memory: about 30 kB each at levels of 256 codewords, for
    each thread of a CPU. Empty: 4,096 on a CPU and 262,144 on a GPU."""
