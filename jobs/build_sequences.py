"""Events -> one history per user, for one night.

python jobs/build_sequences.py --config jobs/nightly.yaml --date 2026-11-23
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "events", "sequences", *sys.argv[1:]]))
