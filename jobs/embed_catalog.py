"""Catalog -> items -> embeddings, for one night.

python jobs/embed_catalog.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.stages import catalog
    from tiger_ray.stages import embeddings as embeddings_stage

    items = catalog.run(settings, storage).manifest
    embeddings_stage.run(settings, storage, items)


if __name__ == "__main__":
    run_job(main)
