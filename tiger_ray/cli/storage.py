"""`tiger-ray storage`: list the artifacts below the root, verify their files, set the latest date back."""

from __future__ import annotations

from collections.abc import Sequence

from tiger_ray.artifacts.inventory import Holding, holdings, verify
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cli.job import open_storage
from tiger_ray.cli.tables import readable_bytes, show_table
from tiger_ray.errors import ArtifactError


def list_artifacts(words: Sequence[str]) -> None:
    """Print one line per artifact: dates, runs, files, bytes, latest date."""
    _, storage = open_storage(words)
    held = _require_some(storage)
    rows = [
        (
            each.artifact,
            len(each.dates),
            each.dates[0] if each.dates else "",
            _latest(storage, each.artifact),
            each.runs,
            f"{each.files:,}",
            readable_bytes(each.bytes),
        )
        for each in held
    ]
    columns = ("artifact", "dates", "first", "latest", "runs", "files", "bytes")
    show_table(storage.root, columns, rows, right=("dates", "runs", "files", "bytes"))


def verify_artifacts(words: Sequence[str], artifact: str | None, *, digests: bool) -> None:
    """Compare every published file with its manifest.

    Args:
        words: settings.
        artifact: name of the only artifact to verify; None: all.
        digests: also read every file and compare its SHA-256.

    Raises:
        ArtifactError: a file or a manifest is damaged; names the first ten.
    """
    _, storage = open_storage(words)
    held = _require_some(storage, artifact)
    found = verify(storage, held, digests=digests)
    if found.damage:
        shown = "\n".join(f"  {text}" for text in found.damage[:10])
        more = f"\n  and {len(found.damage) - 10:,} more" if len(found.damage) > 10 else ""
        raise ArtifactError(
            f"{len(found.damage):,} of {found.files:,} published files below {storage.root} are damaged:\n"
            f"{shown}{more}\nTo compute and publish one night again: tiger-ray run --date DATE --storage.replace true"
        )
    dates = sum(len(each.dates) for each in held)
    compared = "size and SHA-256" if digests else "size (SHA-256 with --digests)"
    print(
        f"{found.files:,} files, {readable_bytes(found.bytes)}, of {dates:,} published manifests of {len(held)} "
        f"artifacts are whole: {compared}"
    )


def roll_back(words: Sequence[str], date: str, artifact: str) -> None:
    """Make `latest.json` of an artifact name an earlier night.

    Args:
        words: settings.
        date: night, YYYY-MM-DD, for which the artifact is published.
        artifact: name of the artifact.

    Raises:
        ArtifactError: nothing whole is published for this date.
    """
    _, storage = open_storage(words)
    before = storage.point_latest(artifact, date)
    print(
        f"the latest {artifact} is that of {date} now (before: {before or 'none'}). Nothing was deleted: every date can "
        f"still be read by its name, and the next night published after {before or date} becomes the latest again"
    )


def _require_some(storage: Storage, artifact: str | None = None) -> list[Holding]:
    found = holdings(storage)
    if not found:
        raise ArtifactError(
            f"no artifact lies below {storage.root}; correct storage.root, or run a night first"
        )
    chosen = [each for each in found if artifact in (None, each.artifact)]
    if not chosen:
        names = ", ".join(each.artifact for each in found)
        raise ArtifactError(f"no artifact {artifact!r} lies below {storage.root}, only {names}")
    return chosen


def _latest(storage: Storage, artifact: str) -> str:
    try:
        return storage.latest_date(artifact) or ""
    except ArtifactError:
        return "damaged"
