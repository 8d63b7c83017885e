"""Histories -> model, for one night; after a crash the same command resumes.

python jobs/train_model.py --config jobs/nightly.yaml --date 2026-11-23
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "model", *sys.argv[1:]]))
