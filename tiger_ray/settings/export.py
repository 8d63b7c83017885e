"""Section `export`: the exported model."""

from __future__ import annotations

from tiger_ray.settings.base import Section, operational


class ExportSettings(Section):
    """The model as a folder for other tools."""

    to: str | None = operational(None)
    """Local folder to write, new or empty; required by `tiger-ray export`."""
