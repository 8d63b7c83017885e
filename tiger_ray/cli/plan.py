"""Print the plan of a night as a table of its stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from tiger_ray.cli.tables import readable_bytes, show_table

if TYPE_CHECKING:
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.settings.settings import Settings
    from tiger_ray.stages.plan import PlannedStage

COLUMNS = ("stage", "tonight", "rows in", "bytes in", "last run", "memory", "why")


def show_plan(settings: Settings, storage: Storage, console: Console | None = None) -> None:
    """Print the plan of a night.

    Args:
        settings: of the whole night.
        storage: where artifacts live.
        console: where to print; None: standard output.

    Raises:
        TigerError: the night would end with this error.
    """
    from tiger_ray.stages.plan import plan_night

    planned = plan_night(settings, storage)
    show_table(
        f"night {settings.date}, {storage.root}",
        COLUMNS,
        map(_row, planned),
        right=COLUMNS[2:6],
        console=console,
    )
    for one in planned:
        if one.error is not None:
            raise one.error


def _row(one: PlannedStage) -> tuple[str | None, ...]:
    cost = one.last.cost if one.last else {}
    return (
        one.stage.name,
        one.verdict,
        None if one.rows_in is None else f"{one.rows_in:,}",
        None if one.bytes_in is None else readable_bytes(one.bytes_in),
        f"{cost['seconds']:,.1f} s" if cost else None,
        readable_bytes(cost["peak_memory_bytes"]) if cost.get("peak_memory_bytes") else None,
        _why(one),
    )


def _why(one: PlannedStage) -> str:
    """The first few reasons; an error is printed in full below the table."""
    if one.error is not None:
        return "see below"
    shown = list(one.why[:4])
    if len(one.why) > len(shown):
        shown.append(f"and {len(one.why) - len(shown)} more")
    return "; ".join(shown)
