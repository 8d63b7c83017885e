"""Objects below a root: verified reads, and writes that survive a lost answer.

`Storage` publishes, and `Run` writes the files of one computation; both use this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.opening import open_store
from tiger_ray.artifacts.store import TIMEOUT_S, Outrun, Store, Stored, parse_uri, persist
from tiger_ray.errors import ArtifactError

T = TypeVar("T")

RESTORE = "To compute and publish it again: --storage.replace true"


class Objects:
    """Reads and writes below a root; cheap to pickle, because a pickle holds no connection.

    Args:
        root: folder or `s3://bucket/prefix` that every node reaches.
        commit_deadline_s: seconds to repeat a request that the store does not answer.

    Raises:
        SettingsError: the root is neither a folder nor an S3 address, or holds credentials.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     objects = Objects(folder)
    ...     [objects.create("a.json", content) for content in (b"first", b"second")]
    [b'first', b'first']
    """

    def __init__(self, root: str, *, commit_deadline_s: float = 300.0) -> None:
        scheme, path = parse_uri(root)
        self.root = f"s3://{path}" if scheme == "s3" else path
        self.commit_deadline_s = commit_deadline_s

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "commit_deadline_s": self.commit_deadline_s}

    @cached_property
    def store(self) -> Store:
        """The connection of this process, opened on first use."""
        return open_store(self.root, TIMEOUT_S)

    def uri(self, key: str) -> str:
        """Full address of a key below the root, for messages."""
        return f"{self.root}/{key}"

    def persist(self, action: Callable[[], T]) -> T:
        """Repeat `action` while the store gives no definite answer, for at most `commit_deadline_s` seconds."""
        return persist(action, self.commit_deadline_s)

    def get(self, key: str) -> Stored | None:
        """A small object with its tag; None if it does not exist."""
        return self.persist(lambda: self.store.get(key))

    def create(self, key: str, data: bytes, still_good: Callable[[bytes], bool] | None = None) -> bytes:
        """Write an object unless it exists; the first writer wins.

        Args:
            key: of the object.
            data: the content.
            still_good: called with the content of an existing object; False replaces that object. None keeps
                every existing object.

        Returns:
            The content of the object afterwards.
        """

        def create() -> bytes:
            with suppress(Outrun):
                self.store.put_if(key, data, None)
                return data
            held = self.store.get(key)
            if held is None:
                raise Outrun(f"the store refused to create {self.uri(key)}, which does not exist")
            if held.data == data or still_good is None or still_good(held.data):
                return held.data
            self.store.put_if(key, data, held.etag)
            return data

        return self.persist(create)

    def read_table(
        self, manifest: Manifest, file: str | FileEntry, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A Parquet file of a run. With all columns the digest is verified, with some columns the size.

        Args:
            manifest: of the run.
            file: entry or name of the file.
            columns: names of the columns to read; None for all.

        Raises:
            ArtifactError: the file is missing or damaged, or lacks a column.
        """
        entry = manifest.file(file) if isinstance(file, str) else file

        def parse(source: Any) -> pa.Table:
            self._require_size(manifest, entry, source.size())
            if columns is None:
                source = pa.BufferReader(self._require_digest(manifest, entry, source.read_buffer()))
            parquet = pq.ParquetFile(source)
            absent = [name for name in columns or () if name not in parquet.schema_arrow.names]
            if absent:
                raise ArtifactError(
                    f"{self._file_uri(manifest, entry)} has no column {absent[0]!r}, "
                    f"only {', '.join(parquet.schema_arrow.names)}"
                )
            names = parquet.schema_arrow.names if columns is None else list(columns)
            # Read row groups one by one: Arrow refuses lists of text beyond 2 GiB.
            groups = [parquet.read_row_group(i, names) for i in range(parquet.num_row_groups)]
            return pa.concat_tables(groups or [parquet.schema_arrow.empty_table()]).select(names)

        try:
            return self._read(manifest, entry, parse)
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(
                f"{self._file_uri(manifest, entry)} is not readable as Parquet: {error}"
            ) from None

    def read_file(self, manifest: Manifest, file: str | FileEntry) -> bytes:
        """The bytes of a file of a run, after verifying size and digest.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        entry = manifest.file(file) if isinstance(file, str) else file

        def parse(source: Any) -> bytes:
            self._require_size(manifest, entry, source.size())
            data: bytes = self._require_digest(manifest, entry, source.read())
            return data

        return self._read(manifest, entry, parse)

    def _read(self, manifest: Manifest, entry: FileEntry, parse: Callable[[Any], T]) -> T:
        try:
            return self.persist(lambda: self.store.read(f"{manifest.artifact}/{entry.path}", parse))
        except FileNotFoundError:
            raise ArtifactError(
                f"{self._file_uri(manifest, entry)} is missing, though the manifest names it. {RESTORE}"
            ) from None

    def _require_size(self, manifest: Manifest, entry: FileEntry, size: int) -> None:
        if size != entry.bytes:
            uri = self._file_uri(manifest, entry)
            raise ArtifactError(f"{uri} has {size} bytes, its manifest says {entry.bytes}. {RESTORE}")

    def _require_digest(self, manifest: Manifest, entry: FileEntry, data: T) -> T:
        found = hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]
        if found != entry.sha256:
            uri = self._file_uri(manifest, entry)
            raise ArtifactError(f"{uri} has SHA-256 {found}, its manifest says {entry.sha256}. {RESTORE}")
        return data

    def _file_uri(self, manifest: Manifest, entry: FileEntry) -> str:
        return self.uri(f"{manifest.artifact}/{entry.path}")
