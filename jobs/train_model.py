"""Histories -> model, for one night; run again after a crash, it resumes.

python jobs/train_model.py --config jobs/nightly.yaml --date 2026-11-23
"""

from tiger_ray.cli.night import run_stages

if __name__ == "__main__":
    run_stages("model")
