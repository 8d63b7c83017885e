"""`tiger-ray compare`: evaluations of one night or of several -> JSON, and one Markdown table per data set."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import SettingsError
from tiger_ray.report import comparison

BEGIN, END = "<!-- results -->", "<!-- /results -->"
"""Lines of a page between which the tables stand."""


def compare(
    roots: Sequence[str], *, date: str, reference: str, json_file: Path | None, page: Path | None
) -> None:
    """Print one table per data set, and write tables and values into files.

    Args:
        roots: NAME=ROOT or NAME=ROOT@DATE each.
        date: night of the evaluations, for a root without DATE.
        reference: artifact that is paired with all others, one of `comparison.LABELS`.
        json_file: file for every value; data sets of other names in the file stay.
        page: Markdown page; text outside of `BEGIN` and `END` stays, and so do tables of other names.

    Raises:
        SettingsError: a root or the reference is malformed, or the page has no place for the tables.
        ArtifactError: no evaluation is published for a root and date.
        DataError: evaluations are not of the same protocol, users and targets.
    """
    if reference not in comparison.LABELS:
        raise SettingsError(f"--reference {reference!r} is none of {', '.join(comparison.LABELS)}")
    if page is not None:
        _split(page)
    lines = files("tiger_ray.report").joinpath("published.csv").read_text(encoding="utf-8").splitlines()
    published = list(csv.DictReader(lines))
    rows = {}
    for pair in roots:
        name, _, root = pair.partition("=")
        if not root:
            raise SettingsError(f"{pair!r} is not NAME=ROOT or NAME=ROOT@DATE")
        if name in rows:
            raise SettingsError(f"{name!r} is given twice; add a word, as in {name + ' masked'!r}")
        dated = re.fullmatch(r"(.+)@(\d{4}-\d\d-\d\d)", root)
        root, night = dated.groups() if dated else (root, date)
        rows[name] = comparison.rows_of(Storage(root), night, reference)
    tables = {}
    for name, ours in rows.items():
        theirs = [comparison.published_row(line) for line in published if line["dataset"] == name.split()[0]]
        tables[name] = comparison.markdown(ours, theirs, reference)
    print(_join(tables))
    if page is not None:
        _write_between(page, tables)
    if json_file is not None:
        found = json.loads(json_file.read_text(encoding="utf-8")) if json_file.exists() else {}
        found |= {name: comparison.as_json(ours) for name, ours in rows.items()}
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _join(tables: Mapping[str, str]) -> str:
    """The tables one below the other, each under its name."""
    return "\n\n".join(f"**{name}**\n\n{table}" for name, table in tables.items())


def _write_between(page: Path, tables: Mapping[str, str]) -> None:
    """Put the tables between the marks of a page, in place of those of the same names, or make the page of them."""
    before, between, after = _split(page)
    _, *there = re.split(r"^\*\*(.+)\*\*$", between, flags=re.MULTILINE)
    kept = dict(zip(there[::2], map(str.strip, there[1::2]), strict=True))
    page.write_text(f"{before}{BEGIN}\n\n{_join(kept | dict(tables))}\n\n{END}{after}", encoding="utf-8")


def _split(page: Path) -> tuple[str, str, str]:
    """The text of a page before, between and after the marks."""
    if not page.exists():
        return "", "", "\n"
    whole = page.read_text(encoding="utf-8")
    if BEGIN not in whole or END not in whole:
        raise SettingsError(f"{page} exists and has no lines {BEGIN} and {END} to write between; add them")
    before, _, rest = whole.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before, between, after
