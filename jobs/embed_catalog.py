"""Catalog -> items -> embeddings, for one night.

python jobs/embed_catalog.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.job import run_job

if TYPE_CHECKING:
    from tiger_ray.config import Settings
    from tiger_ray.storage import Storage


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray import catalog, embeddings

    items = catalog.run(settings, storage).manifest
    embeddings.run(settings, storage, items)


if __name__ == "__main__":
    run_job(main)
