"""The model of one night -> a folder that Hugging Face transformers reads, with a model card.

python jobs/export_model.py --config jobs/nightly.yaml --date 2026-11-23 --export.to FOLDER
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
