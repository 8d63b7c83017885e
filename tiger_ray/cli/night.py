"""Run stages of a night, and then show some lists and the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def run_baseline() -> None:
    """Evaluate `baseline.kind` beside the model of a night, with the settings of the command line, and exit."""
    run_job(_evaluate_baseline)


def _evaluate_baseline(settings: Settings, storage: Storage) -> None:
    from tiger_ray.stages import baselines

    inputs = {name: storage.resolve(name, settings.date) for name in baselines.INPUTS}
    baselines.run_baseline(settings, storage, **inputs)


def run_and_show(settings: Settings, storage: Storage, *names: str) -> None:
    """Run stages in the order of the night; then print some lists, and the metrics of the model.

    Args:
        settings: of the whole night.
        storage: where artifacts live.
        names: stages to run; empty: all.

    Raises:
        TigerError: whatever a stage refuses or fails with.
    """
    # Import after the settings are read, so that a mistyped setting is refused at once.
    from tiger_ray.report.tables import examples_table, metrics_table
    from tiger_ray.stages.night import run_night

    results = run_night(settings, storage, names)
    if "recommendations" in results:
        shown = ("catalog", "semantic_ids", "sequences", "recommendations")
        manifests = [
            results[name].manifest if name in results else storage.resolve(name, settings.date)
            for name in shown
        ]
        print(f"\n{examples_table(storage, *manifests)}")
    if "evaluation" in results:
        model = results["model"].manifest if "model" in results else storage.resolve("model", settings.date)
        print(f"\n{metrics_table(results['evaluation'].manifest, model)}")
    elif "recommendations" in results:
        print(f"\n{metrics_table(None, storage.resolve('model', settings.date))}")
