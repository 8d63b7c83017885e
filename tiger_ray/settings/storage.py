"""Section `storage`: where artifacts are published, and how long a job keeps trying."""

from __future__ import annotations

from pydantic import Field

from tiger_ray.settings.base import Positive, Section, operational


class StorageSettings(Section):
    """Where artifacts are published."""

    root: str = Field(min_length=1)
    """Folder or `s3://bucket/prefix` of all artifacts; every node must reach it."""
    replace: bool = operational(False)
    """Replace artifacts of this date that were published with other inputs or settings; otherwise the job refuses."""
    commit_deadline_s: Positive = operational(300.0)
    """Seconds to keep trying a request that the store does not answer. If the unanswered request publishes, the job
    then ends with exit code 7."""
