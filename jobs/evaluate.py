"""Model -> Recall, NDCG and what it shows, beside popularity, for one night.

python jobs/evaluate.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.report import tables as report
    from tiger_ray.stages import evaluation as harness

    names = ("model", "semantic_ids", "sequences", "catalog")
    model, *others = [storage.resolve(name, settings.date) for name in names]
    evaluated = harness.evaluate(settings, storage, model, *others).manifest
    print(report.metrics_table(evaluated, model))


if __name__ == "__main__":
    run_job(main)
