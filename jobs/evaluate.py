"""Model -> Recall, NDCG and what it shows, beside popularity, for one night.

python jobs/evaluate.py --config jobs/nightly.yaml --date 2026-11-23
"""

from tiger_ray.cli.night import run_stages

if __name__ == "__main__":
    run_stages("evaluation")
