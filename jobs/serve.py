"""The HTTP endpoint for one night's model, until Ctrl-C or SIGTERM.

    python jobs/serve.py --config jobs/nightly.yaml --date 2026-11-23 --serving.host 0.0.0.0

The endpoint has no authentication: run it on a private network, or behind a gateway that authenticates.
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
