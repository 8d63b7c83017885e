"""The specification of a training: the model, its task, and its ranker for validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiger_ray.rankers.base import Ranker
from tiger_ray.training.collate import Collate


@dataclass(frozen=True)
class TrainSpec:
    """A model to train, its collate function, and its ranker for validation.

    >>> from tiger_ray.model.sasrec import SasrecModel
    >>> from tiger_ray.settings.sasrec import SasrecSettings
    >>> from tiger_ray.training.collate import sasrec_collate
    >>> model = SasrecModel(SasrecSettings(), num_items=100)
    >>> spec = TrainSpec(model, sasrec_collate(model), make_ranker=lambda model, device: ..., max_history=50)
    >>> spec.id_length
    1
    """

    model: Any
    """A module whose `to_files` gives `MODEL_FILES`."""
    collate: Collate
    """Turns a batch into the model's inputs."""
    make_ranker: Callable[[Any, torch.device], Ranker]
    """Makes a ranker of the current model, in evaluation mode, on a device."""
    max_history: int
    """Most recent items of a history that the model reads."""
    id_length: int = 1
    """Tokens per item."""
    user_token: bool = False
    """True for one more token per history."""
