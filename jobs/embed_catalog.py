"""Catalog -> items -> embeddings, for one night.

python jobs/embed_catalog.py --config jobs/nightly.yaml --date 2026-11-23
"""

from tiger_ray.cli.night import run_stages

if __name__ == "__main__":
    run_stages("catalog", "embeddings")
