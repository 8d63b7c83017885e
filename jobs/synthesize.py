"""Write a planted world to try the pipeline on: a catalog, events, and the best recall that any model can reach.

python jobs/synthesize.py --out demo/data --items 800 --users 4000 --seed 7
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
