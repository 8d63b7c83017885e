"""Embeddings -> Semantic IDs, appended to the registry, for one night.

python jobs/assign_semantic_ids.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.stages import semantic_ids as registry

    inputs = [storage.resolve(name, settings.date) for name in ("catalog", "embeddings", "quantizer")]
    registry.assign_semantic_ids(settings, storage, *inputs)


if __name__ == "__main__":
    run_job(main)
