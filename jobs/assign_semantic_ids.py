"""Embeddings -> Semantic IDs, appended to the registry, for one night.

python jobs/assign_semantic_ids.py --config jobs/nightly.yaml --date 2026-11-23
"""

from tiger_ray.cli.night import run_stages

if __name__ == "__main__":
    run_stages("semantic_ids")
