"""The manifest of an artifact: its files, settings, inputs and metadata."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tiger_ray.core.hashing import canonical_json, fingerprint
from tiger_ray.errors import ArtifactError

FORMAT_VERSION = 1


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


_ENTRY_PATH = re.compile(r"_runs/[0-9a-f]{32}(/[A-Za-z0-9][A-Za-z0-9._=+-]*)+")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Value):
    """One file of a run: its address, size and digest.

    >>> path = f"_runs/{'0' * 32}/attempt/part.parquet"
    >>> FileEntry(path=path, bytes=10, rows=1, sha256="0" * 64).name
    'part.parquet'
    """

    path: str
    """Address relative to ROOT/<artifact>."""
    bytes: int = Field(ge=0)
    rows: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    facts: dict[str, int] = {}
    """Counts by the writer of the file."""

    @property
    def name(self) -> str:
        """The file's name within its run."""
        return self.path.rsplit("/", 1)[-1]

    def fact(self, name: str) -> int:
        """One count of the file.

        Raises:
            ArtifactError: the manifest does not have it; names the file, the fact, and how to restore it.
        """
        if name not in self.facts:
            raise ArtifactError(
                f"the manifest is damaged: file {self.path} has no fact {name!r}, only "
                f"{', '.join(sorted(self.facts)) or 'none'}. To restore it, remove _manifest.json from "
                f"{self.path.rsplit('/', 2)[0]}, and run the night again with --storage.replace true"
            )
        return self.facts[name]

    @field_validator("path")
    @classmethod
    def _path_stays_inside_runs(cls, path: str) -> str:
        if not _ENTRY_PATH.fullmatch(path):
            raise ValueError(f"{path!r} does not lie inside _runs/<run id>/")
        return path


class Manifest(_Value):
    """The description of one complete run. Readers ignore files that no manifest names.

    >>> manifest = Manifest(artifact="catalog", date="", run_id="0" * 32, fingerprint="0" * 64, files=(),
    ...     settings={}, inputs={}, metadata={"items": 3}, software={})
    >>> manifest.digest == manifest.model_copy(update={"date": "2026-11-23"}).digest
    True
    """

    format_version: int = FORMAT_VERSION
    artifact: str
    date: str
    """Night that the run is published for; empty in the manifest beside the run's files."""
    run_id: str
    fingerprint: str
    files: tuple[FileEntry, ...]
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Artifact -> digest, for every artifact that the run was computed from."""
    metadata: dict[str, Any]
    """Deterministic facts about the content."""
    software: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the content: files and metadata, without run, date and paths."""
        return fingerprint(
            {"files": sorted([entry.name, entry.sha256] for entry in self.files), "metadata": self.metadata}
        )

    @property
    def rows(self) -> int:
        """Total rows of all files."""
        return sum(entry.rows for entry in self.files)

    @property
    def title(self) -> str:
        """Artifact, date and run, as errors name them."""
        return f"{self.artifact} of {self.date or 'no date'} (run {self.run_id})"

    def file(self, name: str) -> FileEntry:
        """The entry with this name.

        Raises:
            ArtifactError: the run has no such file.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise ArtifactError(
            f"{self.title} has no file {name!r}; "
            f"it has {len(self.files)}: {', '.join(entry.name for entry in self.files[:5])}"
        )

    def setting(self, *names: str) -> Any:
        """One setting that the run was computed with: `setting("sequences", "test_from")`, `setting("seed")`.

        Raises:
            ArtifactError: the manifest does not have it.
        """
        found: Any = self.settings
        for name in names:
            if not isinstance(found, dict) or name not in found:
                raise self.damaged(f"settings.{'.'.join(names)} is missing")
            found = found[name]
        return found

    def input(self, name: str) -> str:
        """Digest of one artifact that the run was computed from.

        Raises:
            ArtifactError: the manifest does not have it.
        """
        if name not in self.inputs:
            raise self.damaged(f"inputs.{name} is missing")
        return self.inputs[name]

    def damaged(self, problem: str) -> ArtifactError:
        """The error for a manifest that lacks what a reader needs; `problem` names the field."""
        if self.date:
            remedy = (
                f"To restore it, remove {self.artifact}/_runs/{self.run_id}/_manifest.json below storage.root, and "
                f"run the night of {self.date} again with --storage.replace true"
            )
        else:
            remedy = (
                f"It is the head of a chain below {self.artifact}/_heads of storage.root; restore that file "
                "from a backup, or start a new registry by raising quantizer.version"
            )
        return ArtifactError(f"the manifest of {self.title} is damaged: {problem}. {remedy}")


def manifest_json(manifest: Manifest) -> bytes:
    """The bytes of a manifest in the store."""
    return canonical_json(manifest.model_dump(mode="json"))
