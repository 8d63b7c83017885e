"""What a night would do: a table of its stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings
    from tiger_ray.stages.plan import Planned

STYLES = {
    "computes": "yellow",
    "reuses": "green",
    "skips": "green",
    "left out": "dim",
    "refuses": "red",
}


def show_plan(settings: Settings, storage: Storage, console: Console | None = None) -> None:
    """Print the plan of a night.

    Args:
        settings: of the whole night.
        storage: where artifacts live.
        console: None: stdout.

    Raises:
        TigerError: the night would end with this error.
    """
    from tiger_ray.stages.plan import plan_night

    planned = plan_night(settings, storage)
    table = Table(title=f"Night of {settings.date}, {storage.root}", title_justify="left")
    for name in ("stage", "tonight", "why"):
        table.add_column(name, overflow="fold")
    for name in ("rows in", "bytes in", "last run", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in planned:
        cost = one.last.cost if one.last else {}
        table.add_row(
            one.stage.name,
            f"[{STYLES[one.verdict]}]{one.verdict}[/]",
            escape(_why(one)),
            "" if one.rows_in is None else f"{one.rows_in:,}",
            "" if one.bytes_in is None else readable_bytes(one.bytes_in),
            f"{cost['seconds']:,.1f} s" if cost else "",
            readable_bytes(cost["peak_memory_bytes"]) if cost.get("peak_memory_bytes") else "",
        )
    (console or Console()).print(table)
    for one in planned:
        if one.error is not None:
            raise one.error


def _why(one: Planned) -> str:
    """The reasons, the first few of many; an error is printed in full below the table."""
    if one.error is not None:
        return "see below"
    shown = list(one.why[:4])
    if len(one.why) > len(shown):
        shown.append(f"and {len(one.why) - len(shown)} more")
    return "; ".join(shown)


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
