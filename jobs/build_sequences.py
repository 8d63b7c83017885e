"""Events -> one history per user, for one night.

python jobs/build_sequences.py --config jobs/nightly.yaml --date 2026-11-23
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.stages import events, sequences

    checked = events.run(settings, storage, storage.resolve("catalog", settings.date)).manifest
    sequences.run(settings, storage, checked, storage.resolve("semantic_ids", settings.date))


if __name__ == "__main__":
    run_job(main)
