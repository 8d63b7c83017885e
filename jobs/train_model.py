"""Histories -> model, for one night; run again after a crash, it resumes.

python jobs/train_model.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.job import run_job

if TYPE_CHECKING:
    from tiger_ray.config import Settings
    from tiger_ray.storage import Storage


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray import training

    inputs = [storage.resolve(name, settings.date) for name in ("sequences", "semantic_ids")]
    training.run(settings, storage, *inputs)


if __name__ == "__main__":
    run_job(main)
