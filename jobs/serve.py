"""The HTTP endpoint for one night's model, until Ctrl-C or SIGTERM.

    python jobs/serve.py --config jobs/nightly.yaml --date 2026-11-23 --serving.host 0.0.0.0

It authenticates nobody: listen on a private network, or behind a gateway that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiger_ray.cli.job import run_job

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings


def main(settings: Settings, storage: Storage) -> None:
    from tiger_ray.serving import app as serving

    inputs = [storage.resolve(name, settings.date) for name in ("model", "semantic_ids", "sequences")]
    serving.run(settings, storage, *inputs)


if __name__ == "__main__":
    run_job(main)
