"""The whole night: catalog and events in, recommendations of every user out.

    python jobs/nightly.py --config jobs/nightly.yaml --date 2026-11-23
    ray job submit --working-dir . -- python jobs/nightly.py --config jobs/nightly.yaml --date 2026-11-23

Stages whose inputs and settings are already published are skipped; after a crash the same command goes on
where the last one ended. Exit codes: 0 published, 2 settings, 3 input, 4 quality gate, 5 the date is taken,
6 storage or cluster, 7 commit unknown (run again), 130 interrupted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.job import run_job

if TYPE_CHECKING:
    from tiger_ray.config import Settings
    from tiger_ray.storage import Storage


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray import (
        catalog,
        embeddings,
        events,
        fitting,
        harness,
        recommendations,
        registry,
        report,
        sequences,
        training,
    )

    items = catalog.run(settings, storage).manifest
    checked = events.run(settings, storage, items).manifest
    vectors = embeddings.run(settings, storage, items).manifest
    quantizer = fitting.fit_quantizer(settings, storage, vectors).manifest
    ids = registry.assign_semantic_ids(settings, storage, items, vectors, quantizer).manifest
    histories = sequences.run(settings, storage, checked, ids).manifest
    model = training.run(settings, storage, histories, ids).manifest
    evaluated = None
    if settings.training.holdout != "none":
        evaluated = harness.evaluate(settings, storage, model, ids, histories, items).manifest
        recommendations.require_quality(settings, storage, evaluated)
    published = recommendations.run(settings, storage, model, ids, histories).manifest
    print()
    print(report.examples_table(storage, items, ids, histories, published))
    print()
    print(report.metrics_table(evaluated, model))


if __name__ == "__main__":
    run_job(main)
