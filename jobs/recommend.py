"""Users -> top-K items in Parquet, for one night; run again after a crash, it scores what is missing.

python jobs/recommend.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.stages import gate, recommendations

    inputs = [storage.resolve(name, settings.date) for name in ("model", "semantic_ids", "sequences")]
    gate.require_evaluated(settings, storage, inputs[0])
    recommendations.run(settings, storage, *inputs)


if __name__ == "__main__":
    run_job(main)
