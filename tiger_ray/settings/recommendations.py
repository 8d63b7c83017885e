"""Section `recommendations`: the published lists."""

from __future__ import annotations

from typing import Literal

from tiger_ray.settings.base import Count, Section


class RecommendationsSettings(Section):
    """What is written for every user."""

    top_k: Count = 10
    """Items per user K."""
    form: Literal["wide", "long"] = "wide"
    """`wide`: one row per user with lists; `long`: one row per user and rank."""
    exclude_history: bool = False
    """Never recommend an item of the user's history."""
