"""A baseline beside the night's model: the same users, targets and counts.

python jobs/baseline.py --config jobs/amazon.yaml --config jobs/sasrec.yaml --date 2026-11-23
python jobs/baseline.py --config jobs/amazon.yaml --date 2026-11-23 --baseline.kind neighbours

The night must have published its histories (jobs/build_sequences.py); jobs/compare.py puts all evaluations into one
table.
"""

from tiger_ray.cli.night import run_baseline

if __name__ == "__main__":
    run_baseline()
