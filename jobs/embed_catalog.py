"""Catalog -> items -> embeddings, for one night.

python jobs/embed_catalog.py --config jobs/nightly.yaml --date 2026-11-23
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "catalog", "embeddings", *sys.argv[1:]]))
