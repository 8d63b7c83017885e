"""Validation during training: the current model ranks a fixed sample of users as the finished model would.

The target is each user's validation event, which training does not see; the test target is never read.

B users, C cells of a count by rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from tiger_ray.evaluation import metrics
from tiger_ray.rankers.base import Histories, Ranker

TOP = 10
"""K of the metrics."""


@dataclass(frozen=True)
class Validation:
    """One worker's part of the sample of users.

    >>> empty = np.zeros(0, np.int64)
    >>> histories = Histories(np.zeros(0, np.int32), empty)
    >>> sample = Validation(histories, empty, make_ranker=lambda model, device: ...)
    >>> sample.metrics(nn.Identity(), torch.device("cpu"))
    {}
    """

    histories: Histories
    """Events before each user's target, at least one per user."""
    target_B: npt.NDArray[np.int64]
    """item_index of each user's validation event."""
    make_ranker: Callable[[Any, torch.device], Ranker]
    """Makes a ranker of the current model, in evaluation mode, on a device."""

    def metrics(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Recall, NDCG and MRR at 10 of the current model, over the users of all workers; empty without users.

        Source: TIGER, Rajput et al. 2023, section 4: full ranking, at item level.
        """
        rank_B = np.zeros(0, np.int64)
        if len(self.target_B):
            was_training = model.training
            ranker = self.make_ranker(model.eval(), device)
            rank_B = metrics.ranks(ranker.recommend(self.histories, TOP).item_BK, self.target_B)
            model.train(was_training)
        count_C = torch.from_numpy(metrics.rank_counts(rank_B, TOP)).to(device)
        if dist.is_initialized():
            dist.all_reduce(count_C)
        found = metrics.metrics(count_C.cpu().numpy(), (TOP,))
        return found if found.pop("users") else {}
