"""Section `baseline`: one baseline, for a comparison."""

from __future__ import annotations

from typing import Literal

from tiger_ray.settings.base import Section


class BaselineSettings(Section):
    """The baseline that jobs/baseline.py evaluates beside the model of the night."""

    kind: Literal["popularity", "neighbours", "sasrec"] = "sasrec"
    """`popularity`: the most frequent items; `neighbours`: items whose embedding is nearest to that of the last item;
    `sasrec`: the model of section `sasrec`."""
    index: Literal["exact", "ivf", "hnsw"] = "exact"
    """How `sasrec` finds items: `exact` compares with all items, `ivf` and `hnsw` use an index of FAISS (extra
    `studies`)."""
