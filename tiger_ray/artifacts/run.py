"""One attempt to write an artifact: each file is written once, and a restarted attempt finds finished files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from tiger_ray.artifacts.manifest import NAME, FileEntry, Manifest
from tiger_ray.artifacts.objects import Objects
from tiger_ray.core.hashing import canonical_json
from tiger_ray.errors import ArtifactError

_SOFTWARE = ("tiger-ray", "numpy", "pyarrow", "ray", "torch")


@dataclass(frozen=True)
class Run:
    """One computation of one fingerprint; workers get a copy. Every file of a run is immutable.

    >>> from tempfile import TemporaryDirectory
    >>> from tiger_ray.artifacts.storage import Storage
    >>> with TemporaryDirectory() as folder:
    ...     run = Storage(folder).begin("catalog", "f" * 64)
    ...     entry = run.write_file("notes.txt", b"content")
    ...     list(run.finished()), run.read_file(entry)
    (['notes.txt'], b'content')
    """

    storage: Objects = field(compare=False)
    artifact: str
    run_id: str
    attempt: str
    """Random for each job, so that two jobs on one run write different paths."""
    fingerprint: str

    def write_table(
        self, name: str, table: pa.Table, facts: Mapping[str, int] | None = None, group_rows: int = 2**20
    ) -> FileEntry:
        """Write a Parquet file (zstd) and record it as finished; equal rows give equal bytes.

        Args:
            name: of the file.
            table: the rows.
            facts: counts for the file's entry.
            group_rows: rows of each row group; a text column of a group must stay below 2 GiB.

        Returns:
            The entry to publish: of this file, or of the file with this name that was finished first.
        """
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
            for start in range(0, table.num_rows, group_rows):
                # Combine the chunks: they decide page boundaries, and equal tables may have different chunks.
                writer.write_table(table[start : start + group_rows].combine_chunks())
        return self._write(name, memoryview(sink.getvalue()), table.num_rows, facts or {})

    def write_file(self, name: str, data: bytes, rows: int = 0) -> FileEntry:
        """Write a file of another format and record it as finished.

        Args:
            name: of the file.
            data: the content.
            rows: number of rows for the file's entry.

        Returns:
            The entry to publish: of this file, or of the file with this name that was finished first.
        """
        return self._write(name, data, rows, {})

    def read_table(self, entry: FileEntry, columns: Sequence[str] | None = None) -> pa.Table:
        """A finished Parquet file of this run; see `Objects.read_table`."""
        return self.storage.read_table(self.as_manifest([entry]), entry, columns)

    def read_file(self, entry: FileEntry) -> bytes:
        """The bytes of a finished file of this run; see `Objects.read_file`."""
        return self.storage.read_file(self.as_manifest([entry]), entry)

    def as_manifest(self, files: Iterable[FileEntry], **content: Any) -> Manifest:
        """The manifest of the run with these files, without a date."""
        return Manifest(
            artifact=self.artifact,
            date="",
            run_id=self.run_id,
            fingerprint=self.fingerprint,
            files=tuple(sorted(files, key=lambda entry: entry.name)),
            **({"settings": {}, "inputs": {}, "metadata": {}, "software": software_versions()} | content),
        )

    def finished(self) -> dict[str, FileEntry]:
        """Files of this run that a job finished and that still exist, by name."""
        store = self.storage.store
        found = self.storage.persist(lambda: store.find(f"{self.artifact}/_runs/{self.run_id}"))
        sizes = {file.path: file.bytes for file in found}
        done = [key for key in sizes if key.startswith(self._done_key("")) and key.endswith(".json")]
        with ThreadPoolExecutor(16) as threads:
            stored = list(threads.map(self.storage.get, done))
        entries = [self._parse_entry(key, item.data) for key, item in zip(done, stored, strict=True) if item]
        there = [entry for entry in entries if sizes.get(f"{self.artifact}/{entry.path}") == entry.bytes]
        return {entry.name: entry for entry in there}

    def write_beside(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Write files into a folder of this run, or replace them; such files are never published.

        Raises:
            StorageError: the store refused, or did not answer before the deadline; a file stays as before.
        """
        require_name("folder", folder)
        for name, data in files.items():
            require_name("file", name)
            key = f"{self.artifact}/_runs/{self.run_id}/{folder}/{name}"
            self.storage.persist(partial(self.storage.store.put, key, data))

    def read_beside(self, folder: str, name: str) -> bytes | None:
        """The last content that `write_beside` wrote in any attempt; None if the file does not exist."""
        key = f"{self.artifact}/_runs/{self.run_id}/{folder}/{name}"

        def read() -> bytes | None:
            try:
                data: bytes = self.storage.store.read(key, lambda source: source.read())
            except FileNotFoundError:
                return None
            return data

        return self.storage.persist(read)

    def _write(self, name: str, data: bytes | memoryview, rows: int, facts: Mapping[str, int]) -> FileEntry:
        require_name("file", name)
        sha256 = hashlib.sha256(data).hexdigest()
        path = f"_runs/{self.run_id}/{self.attempt}-{sha256[:16]}/{name}"
        entry = FileEntry(path=path, bytes=len(data), rows=rows, sha256=sha256, facts=dict(facts))
        storage = self.storage
        storage.persist(lambda: storage.store.put(f"{self.artifact}/{path}", data))
        key = self._done_key(f"{name}.json")

        def still_good(data: bytes) -> bool:
            held = self._parse_entry(key, data)
            return held.bytes in [found.bytes for found in storage.store.find(f"{self.artifact}/{held.path}")]

        return self._parse_entry(key, storage.create(key, canonical_json(entry.model_dump()), still_good))

    def _done_key(self, name: str) -> str:
        return f"{self.artifact}/_runs/{self.run_id}/_done/{name}"

    def _parse_entry(self, key: str, data: bytes) -> FileEntry:
        try:
            return FileEntry.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(f"{self.storage.uri(key)} is damaged: {error.errors()[0]['msg']}") from None


def require_name(what: str, name: str) -> None:
    """Refuse a name that is unsafe as a part of a path; `what` is the kind of name, for the message.

    Raises:
        ArtifactError: names the allowed characters.
    """
    if not NAME.fullmatch(name):
        raise ArtifactError(f"{what} name {name!r} must be letters, digits and any of . _ = + -")


@lru_cache
def software_versions() -> dict[str, str]:
    """Package -> version, for Python and the packages that can change the content of an artifact."""
    versions = {"python": platform.python_version()}
    for package in _SOFTWARE:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
