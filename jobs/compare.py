"""Evaluations of one night or of several -> JSON, and one Markdown table beside published rows.

    python jobs/compare.py --date 2026-11-25 --json F.json --markdown docs/results/amazon.md beauty=data/amazon/beauty

Another date of a root is a table of its own: `"beauty masked=data/amazon/beauty@2026-11-26"`. The first word is
the data set, whose published rows stand below ours.
A page that has the lines `<!-- results -->` and `<!-- /results -->` keeps what is outside of them, and between
them the tables of other names; so does the JSON. Sets may be evaluated on different days and machines.
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
