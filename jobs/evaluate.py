"""Model -> Recall, NDCG and what it shows, beside popularity, for one night.

python jobs/evaluate.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.job import run_job

if TYPE_CHECKING:
    from tiger_ray.config import Settings
    from tiger_ray.storage import Storage


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray import harness, report

    names = ("model", "semantic_ids", "sequences", "catalog")
    model, *others = [storage.resolve(name, settings.date) for name in names]
    evaluated = harness.evaluate(settings, storage, model, *others).manifest
    print(report.metrics_table(evaluated, model))


if __name__ == "__main__":
    run_job(main)
