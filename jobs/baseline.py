"""A baseline beside the night's model: the same users, targets and counts.

python jobs/baseline.py --config jobs/amazon.yaml --config jobs/sasrec.yaml --date 2026-11-23
python jobs/baseline.py --config jobs/amazon.yaml --date 2026-11-23 --baseline.kind neighbours

The night must have got as far as its histories (jobs/build_sequences.py); jobs/compare.py shows all together.
"""

from tiger_ray.cli.night import run_baseline

if __name__ == "__main__":
    run_baseline()
