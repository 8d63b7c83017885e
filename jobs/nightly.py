"""The whole night: catalog and events in, recommendations of every user out.

    python jobs/nightly.py --config jobs/nightly.yaml --date 2026-11-23
    ray job submit --working-dir . -- python jobs/nightly.py --config jobs/nightly.yaml --date 2026-11-23

Stages whose inputs and settings are already published are skipped; after a crash the same command goes on
where the last one ended. Exit codes: 0 published, 2 settings, 3 input, 4 quality gate, 5 the date is taken,
6 storage or cluster, 7 commit unknown (run again), 130 interrupted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.report import tables as report
    from tiger_ray.stages import catalog, events, gate, recommendations, sequences
    from tiger_ray.stages import embeddings as embeddings_stage
    from tiger_ray.stages import evaluation as harness
    from tiger_ray.stages import model as training
    from tiger_ray.stages import quantizer as fitting
    from tiger_ray.stages import semantic_ids as registry

    items = catalog.run(settings, storage).manifest
    checked = events.run(settings, storage, items).manifest
    vectors = embeddings_stage.run(settings, storage, items).manifest
    quantizer = fitting.fit_quantizer(settings, storage, vectors).manifest
    ids = registry.assign_semantic_ids(settings, storage, items, vectors, quantizer).manifest
    histories = sequences.run(settings, storage, checked, ids).manifest
    model = training.run(settings, storage, histories, ids).manifest
    evaluated = None
    if settings.training.holdout != "none":
        evaluated = harness.evaluate(settings, storage, model, ids, histories, items).manifest
        gate.require_gate(settings, storage, evaluated)
    published = recommendations.run(settings, storage, model, ids, histories).manifest
    print()
    print(report.examples_table(storage, items, ids, histories, published))
    print()
    print(report.metrics_table(evaluated, model))


if __name__ == "__main__":
    run_job(main)
