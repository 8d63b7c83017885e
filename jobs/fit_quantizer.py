"""Embeddings -> quantizer, once per ID space.

python jobs/fit_quantizer.py --config jobs/nightly.yaml --date 2026-11-23
"""

from tiger_ray.cli.night import run_stages

if __name__ == "__main__":
    run_stages("quantizer")
