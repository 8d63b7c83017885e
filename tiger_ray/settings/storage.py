"""Section `storage`: where artifacts lie, and how patient a job is with the store."""

from __future__ import annotations

from pydantic import Field

from tiger_ray.settings.base import Positive, Section, operational


class StorageSettings(Section):
    """Where artifacts are published."""

    root: str = Field(min_length=1)
    """Folder or `s3://bucket/prefix` under which every artifact lives; all nodes must reach it."""
    replace: bool = operational(False)
    """Replace what was published for this date with other inputs or settings; otherwise that is refused."""
    commit_deadline_s: Positive = operational(300.0)
    """Seconds to keep trying the one request that publishes, before giving up with exit code 7."""
