"""Embeddings -> Semantic IDs, appended to the registry, for one night.

python jobs/assign_semantic_ids.py --config jobs/nightly.yaml --date 2026-11-23
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "semantic_ids", *sys.argv[1:]]))
