"""Events -> one history per user, for one night.

python jobs/build_sequences.py --config jobs/nightly.yaml --date 2026-11-23
"""

from tiger_ray.cli.night import run_stages

if __name__ == "__main__":
    run_stages("events", "sequences")
