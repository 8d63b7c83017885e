"""The model of one night -> a folder that Hugging Face transformers reads, with a model card.

python jobs/export_model.py --config jobs/nightly.yaml --date 2026-11-23 --export.to FOLDER
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.report import export

    inputs = [storage.resolve(name, settings.date) for name in ("model", "semantic_ids")]
    print(export.run(settings, storage, *inputs))


if __name__ == "__main__":
    run_job(main)
