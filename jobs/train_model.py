"""Histories -> model, for one night; run again after a crash, it resumes.

python jobs/train_model.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.stages import model as training

    inputs = [storage.resolve(name, settings.date) for name in ("sequences", "semantic_ids")]
    training.run(settings, storage, *inputs)


if __name__ == "__main__":
    run_job(main)
