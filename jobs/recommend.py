"""Users -> top-K items in Parquet, for one night; after a crash the same command scores only the missing files.

python jobs/recommend.py --config jobs/nightly.yaml --date 2026-11-23
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "recommendations", *sys.argv[1:]]))
