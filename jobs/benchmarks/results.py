"""The format of every benchmark file: hardware, settings, and claims of name, value, unit and spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Claims:
    """Measured claims, printed as they come and written as JSON at the end."""

    def __init__(self) -> None:
        self.settings, self._claims = dict[str, Any](), list[dict[str, Any]]()

    def add(self, name: str, values: float | Sequence[float], unit: str, target: str = "") -> float:
        """Record the median of `values`, with least and largest value as the spread; return the median."""
        several = list(values) if isinstance(values, Sequence) else [values]
        value = statistics.median(several)
        spread = [min(several), max(several)] if len(several) > 1 else None
        self._claims.append({"name": name, "value": value, "unit": unit, "spread": spread})
        shown = f" ({spread[0]:.4g} to {spread[1]:.4g})" if spread else ""
        print(f"{name:<36}{value:>12.4g} {unit}{shown}{f'   target {target}' if target else ''}", flush=True)
        return value

    def write(self, file: str | None) -> None:
        """Write all claims to `file`, if one is given."""
        if file:
            whole = {"hardware": hardware(), "settings": self.settings, "claims": self._claims}
            Path(file).write_text(json.dumps(whole, indent=1) + "\n")


def parser_of(description: str | None, parts: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Parser of the words that every benchmark with several parts has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file to write the claims to")
    parser.add_argument("--only", help=f"parts to run, of {','.join(parts)}")
    parser.add_argument(
        "--beauty", type=Path, help="folder with interactions.parquet; left out, its known lengths"
    )
    return parser


def chosen_parts(
    parser: argparse.ArgumentParser, words: argparse.Namespace, parts: Mapping[str, Any]
) -> list[str]:
    """Names of `--only`, or all parts; an unknown name ends the program."""
    chosen = words.only.split(",") if words.only else list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    return chosen


def run_parts(
    chosen: Sequence[str],
    parts: Mapping[str, Callable[[Claims, Any], None]],
    claims: Claims,
    given: Any,
    file: str | None,
) -> None:
    """Run `parts[name](claims, given)` one after the other, and write all claims after each part."""
    for part in chosen:
        print(f"\n{part}", flush=True)
        start = time.monotonic()
        parts[part](claims, given)
        print(f"{part} took {time.monotonic() - start:.0f} s", flush=True)
        claims.write(file)


def hardware() -> dict[str, Any]:
    """Facts that a reader needs for comparison: processor, cores, memory, accelerator, versions."""
    import numpy
    import pyarrow
    import torch

    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
    }
