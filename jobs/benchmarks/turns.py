"""Run rivals in turns, so that a disturbance of the machine affects all rivals."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from tiger_ray.core.precision import dtype_of

ROUNDS = 5
CORES = len(os.sched_getaffinity(0))
DTYPES = {"fp32": torch.float32}
if dtype_of("bf16", torch.device("cpu")) is torch.bfloat16:
    DTYPES["bf16"] = torch.bfloat16  # other processors emulate bf16, which would slow down every side
FASTEST = list(DTYPES)[-1]
T = TypeVar("T")


def alternate(
    sides: Mapping[T, tuple[float, Callable[[], Any]]], rounds: int = ROUNDS
) -> dict[T, list[float]]:
    """Units of work per second of each side, by round; sides are (units, work), and the first round only warms up."""
    rates: dict[T, list[float]] = {name: [] for name in sides}
    assert torch.get_num_threads() == CORES, "another library has changed the number of torch threads"
    for number in range(rounds + 1):
        for name, (units, work) in sides.items():
            start = time.perf_counter()
            work()
            if number:
                rates[name].append(units / (time.perf_counter() - start))
    return rates


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Ratios of the rates of two sides, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def fastest(runs: dict[Any, Callable[[], Any]]) -> Any:
    """The rival whose better run of two takes the least time."""
    rates = alternate({rival: (1, run) for rival, run in runs.items()}, rounds=2)
    return max(rates, key=lambda rival: max(rates[rival]))
