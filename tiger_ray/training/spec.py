"""What the workers train, how the workers read examples, and how the model is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiger_ray.rankers.base import Ranker
from tiger_ray.training.collate import Task


@dataclass(frozen=True)
class Trainee:
    """What the workers train, how it reads examples, and how it is judged."""

    model: Any
    """A module with `to_files`, which gives `MODEL_FILES`."""
    task: Task
    make_ranker: Callable[[Any, torch.device], Ranker]
    """Of the model as it is, in evaluation mode."""
    max_history: int
    """Most recent items of a history that it reads."""
    id_length: int = 1
    """Tokens per item."""
    user_token: bool = False
    """There is one more token per history."""
