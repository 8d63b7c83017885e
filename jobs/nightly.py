"""The whole night: catalog and events in, recommendations of every user out.

    python jobs/nightly.py --config jobs/nightly.yaml --date 2026-11-23
    ray job submit --working-dir . -- python jobs/nightly.py --config jobs/nightly.yaml --date 2026-11-23

Stages that are already published from the same inputs and settings are skipped; after a crash the same command
continues where the last one ended. Exit codes: 0 published, 2 settings, 3 input, 4 quality gate, 5 the date is taken,
6 storage or cluster, 7 commit unknown (run again), 130 interrupted.
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
