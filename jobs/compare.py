"""Evaluations of one night or of several -> JSON, and one Markdown table beside published rows.

    python jobs/compare.py --date 2026-11-25 --json F.json --markdown README.md beauty=data/amazon/beauty

Another date of a root is a table of its own: `"beauty masked=data/amazon/beauty@2026-11-26"`. The first word is
the data set, whose published rows stand below ours.
A page that has the lines `<!-- results -->` and `<!-- /results -->` keeps what is outside of them, and between
them the tables of other names; so does the JSON. Sets may be evaluated on different days and machines.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tiger_ray.errors import TigerError

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def main() -> None:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.report import comparison

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("roots", nargs="+", metavar="NAME=ROOT[@DATE]", help="data set and its storage.root")
    parser.add_argument("--date", required=True, help="of the evaluations")
    parser.add_argument(
        "--reference",
        default="evaluation-sasrec-softmax",
        choices=comparison.LABELS,
        help="paired with all others",
    )
    parser.add_argument("--json", type=Path, help="file for everything")
    parser.add_argument("--markdown", type=Path, help="page for the tables")
    words = parser.parse_args()
    with Path(__file__).with_name("published.csv").open(encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    rows = {}
    for pair in words.roots:
        name, _, root = pair.partition("=")
        if not root:
            parser.error(f"{pair!r} is not NAME=ROOT or NAME=ROOT@DATE")
        if name in rows:
            parser.error(f"{name!r} is there twice; add a word, as in {name + ' masked'!r}")
        dated = re.fullmatch(r"(.+)@(\d{4}-\d\d-\d\d)", root)
        root, date = dated.groups() if dated else (root, words.date)
        rows[name] = comparison.rows_of(Storage(root), date, words.reference)
    tables = {}
    for name, ours in rows.items():
        theirs = [comparison.published_row(line) for line in published if line["dataset"] == name.split()[0]]
        tables[name] = comparison.markdown(ours, theirs, words.reference)
    print(joined(tables))
    if words.markdown:
        write_between(words.markdown, tables)
    if words.json:
        found = json.loads(words.json.read_text(encoding="utf-8")) if words.json.exists() else {}
        found |= {name: comparison.as_json(ours) for name, ours in rows.items()}
        words.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def joined(tables: Mapping[str, str]) -> str:
    """One table below the other, each with its name."""
    return "\n\n".join(f"**{name}**\n\n{table}" for name, table in tables.items())


def write_between(page: Path, tables: Mapping[str, str]) -> None:
    """Put the tables between the marks of a page, in place of those of the same names, or make the page of them."""
    before, between, after = "", "", "\n"
    if page.exists():
        whole = page.read_text(encoding="utf-8")
        if BEGIN not in whole or END not in whole:
            raise SystemExit(f"{page} exists and has no lines {BEGIN} and {END} to write between; add them")
        before, _, rest = whole.partition(BEGIN)
        between, _, after = rest.partition(END)
    _, *there = re.split(r"^\*\*(.+)\*\*$", between, flags=re.MULTILINE)
    kept = dict(zip(there[::2], map(str.strip, there[1::2]), strict=True))
    page.write_text(f"{before}{BEGIN}\n\n{joined(kept | tables)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except TigerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
