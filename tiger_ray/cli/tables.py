"""Tables for people: boxes and colours on a terminal, plain aligned text in a file or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLOURS = {
    **dict.fromkeys(("ok", "computed", "reused", "reuses", "skips"), "green"),
    **dict.fromkeys(("warn", "computes"), "yellow"),
    **dict.fromkeys(("FAILED", "refuses"), "bold red"),
    **dict.fromkeys(("not checked", "left out"), "dim"),
}
"""Cells with exactly these words are coloured on a terminal."""


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Iterable[str] = (),
    console: Console | None = None,
) -> None:
    """Print one table.

    Args:
        title: line above the table; empty: no line.
        columns: headings.
        rows: one value per column; None prints as an empty cell.
        right: headings of columns that are aligned on the right, such as numbers.
        console: where to print; None: standard output.
    """
    console = console or Console(highlight=False)
    aligned = set(right)
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    if not console.is_terminal:
        _print_plain(console, title, columns, cells, aligned)
        return
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in aligned else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    console.print(table)


def _print_plain(
    console: Console, title: str, columns: Sequence[str], cells: list[list[str]], aligned: set[str]
) -> None:
    """Lines of any length, so that a search finds a whole message in one line."""
    lines = [list(columns), *cells] if any(columns) else cells
    widths = [max((len(line[place]) for line in lines), default=0) for place in range(len(columns))]
    if title:
        console.file.write(f"{title}\n")
    for line in lines:
        padded = [
            cell.rjust(width) if name in aligned else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ]
        console.file.write("  ".join(padded).rstrip() + "\n")


def readable_bytes(count: int) -> str:
    """A number of bytes with three digits and a unit of 1000.

    >>> readable_bytes(1_234_567)
    '1.23 MB'
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
