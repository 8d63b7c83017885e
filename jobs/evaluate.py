"""Model -> recall, NDCG and exposure, beside popularity, for one night.

python jobs/evaluate.py --config jobs/nightly.yaml --date 2026-11-23
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "evaluation", *sys.argv[1:]]))
