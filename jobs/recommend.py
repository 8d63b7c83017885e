"""Users -> top-K items in Parquet, for one night; run again after a crash, it scores what is missing.

python jobs/recommend.py --config jobs/nightly.yaml --date 2026-11-23
"""

from tiger_ray.cli.night import run_stages

if __name__ == "__main__":
    run_stages("recommendations")
