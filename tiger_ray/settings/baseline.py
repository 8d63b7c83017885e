"""Section `baseline`: one baseline, for a comparison."""

from __future__ import annotations

from typing import Literal

from tiger_ray.settings.base import Section


class BaselineSettings(Section):
    """What jobs/baseline.py evaluates beside the model of the night; read by nothing else."""

    kind: Literal["popularity", "neighbours", "sasrec"] = "sasrec"
    """Most popular items; nearest neighbours of the last item by content embedding; SASRec."""
    index: Literal["exact", "ivf", "hnsw"] = "exact"
    """How `sasrec` finds items: by comparing with all, or by an index of FAISS (extra `studies`)."""
