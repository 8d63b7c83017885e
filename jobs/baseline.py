"""A baseline beside the night's model: the same users, targets and counts.

python jobs/baseline.py --config jobs/amazon.yaml --config jobs/sasrec.yaml --date 2026-11-23
python jobs/baseline.py --config jobs/amazon.yaml --date 2026-11-23 --baseline.kind neighbours

The night must have got as far as its histories (jobs/build_sequences.py); jobs/compare.py shows all together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.stages.baselines import INPUTS, run_baseline

    run_baseline(settings, storage, **{name: storage.resolve(name, settings.date) for name in INPUTS})


if __name__ == "__main__":
    run_job(main)
