"""Evaluations of one night or of several -> JSON, and one Markdown table beside published rows.

    python jobs/compare.py --date 2026-11-25 --json F.json --markdown docs/results/amazon.md beauty=data/amazon/beauty

Another date of a root is a table of its own: `"beauty masked=data/amazon/beauty@2026-11-26"`. The first word is
the data set, whose published rows stand below ours. Sets may be evaluated on different days and machines.

On a page with the lines `<!-- results -->` and `<!-- /results -->`, the text outside of these lines stays, and so do
tables of other names between them. The JSON file keeps the values of other names.
"""

import sys

from tiger_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
