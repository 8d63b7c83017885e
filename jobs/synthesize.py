"""Write a planted world to try the pipeline on: a catalog, events, and the best recall anybody can reach.

python jobs/synthesize.py --out demo/data --items 800 --users 4000 --seed 7
"""

import argparse
import sys

from tiger_ray.errors import TigerError
from tiger_ray.synthetic import world as synthetic


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder or s3://bucket/prefix")
    parser.add_argument("--items", type=int, default=800, help="items, a multiple of 20 (default 800)")
    parser.add_argument("--users", type=int, default=4000, help="users (default 4000)")
    parser.add_argument("--min-events", type=int, default=6, help="fewest events of a user (default 6)")
    parser.add_argument("--max-events", type=int, default=20, help="most events of a user (default 20)")
    parser.add_argument(
        "--files", type=int, default=1, help="files of the catalog and of the events (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and its users (default 0)")
    args = parser.parse_args()
    try:
        world = synthetic.World.build(args.items, args.seed)
        written = synthetic.write(
            args.out,
            world,
            num_users=args.users,
            seed=args.seed,
            min_events=args.min_events,
            max_events=args.max_events,
            num_files=args.files,
        )
    except TigerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(written.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
