"""Embeddings -> quantizer, once per ID space.

python jobs/fit_quantizer.py --config jobs/nightly.yaml --date 2026-11-23
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "quantizer", *sys.argv[1:]]))
