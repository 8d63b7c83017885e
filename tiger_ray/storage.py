"""Artifacts in a local folder or an S3-compatible store, published exactly once.

Layout below ROOT/<artifact>/ (only the manifests are ever looked for; nothing is ever deleted):

    _claims/<fingerprint>.json                the run that computes these inputs and settings, crash or not
    _runs/<run_id>/<attempt>-<digest>/<name>  data; the digest keeps a late writer from overwriting
    _runs/<run_id>/_done/<name>.json          the first finished file of that name; later ones adopt it
    _runs/<run_id>/checkpoint-D/<name>        and other folders beside: replaced again and again, never published
    _runs/<run_id>/_manifest.json             the run is complete and may be published under any date
    _heads/<name>.json                        newest link of a chain, moved by compare-and-swap
    date=D/_manifest.json                     one conditional write: the only moment that publishes anything
    latest.json                               a hint, moved by compare-and-swap, never to an older date

Credentials, endpoint and region come from the usual AWS variables or an instance role on every machine by
itself; they are never stored, pickled or printed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tiger_ray.errors import (
    ArtifactError,
    CommitUnknownError,
    PublishError,
    StorageError,
)
from tiger_ray.faults import crash_point
from tiger_ray.stores import (
    TIMEOUT_S,
    NoAnswer,
    Outrun,
    Store,
    Stored,
    open_store,
    parse_uri,
    persist,
)

FORMAT_VERSION = 1

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_ENTRY_PATH = re.compile(r"_runs/[0-9a-f]{32}(/[A-Za-z0-9][A-Za-z0-9._=+-]*)+")
_SOFTWARE = ("tiger-ray", "numpy", "pyarrow", "ray", "torch")
_CHECK_TIMEOUT_S = 3.0
_CHECK_DEADLINE_S = 6.0


# Values


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Value):
    """One file of a run: where it is, and what it must contain."""

    path: str
    """Address relative to ROOT/<artifact>."""
    bytes: int = Field(ge=0)
    rows: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    facts: dict[str, int] = {}
    """Counts that the writer of the file made on the way."""

    @property
    def name(self) -> str:
        """The file's name within its run."""
        return self.path.rsplit("/", 1)[-1]

    @field_validator("path")
    @classmethod
    def _path_stays_inside_runs(cls, path: str) -> str:
        if not _ENTRY_PATH.fullmatch(path):
            raise ValueError(f"{path!r} does not lie inside _runs/<run id>/")
        return path


class Manifest(_Value):
    """Everything there is to know about one complete run; a file that no manifest names does not exist."""

    format_version: int = FORMAT_VERSION
    artifact: str
    date: str
    """Night it is published for; empty in the manifest of a run that is complete but bound to no date."""
    run_id: str
    fingerprint: str
    files: tuple[FileEntry, ...]
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Digest of every artifact it was made from."""
    metadata: dict[str, Any]
    """Deterministic facts about the content."""
    software: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the content alone, files and metadata; not of the run, the date or any path."""
        return fingerprint(
            {"files": sorted([entry.name, entry.sha256] for entry in self.files), "metadata": self.metadata}
        )

    @property
    def rows(self) -> int:
        """Rows of all files together."""
        return sum(entry.rows for entry in self.files)

    def file(self, name: str) -> FileEntry:
        """The entry of that name; ArtifactError if the run has no such file."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise ArtifactError(
            f"{self.artifact} of {self.date or 'no date'} (run {self.run_id}) has no file {name!r}; "
            f"it has {len(self.files)}: {', '.join(entry.name for entry in self.files[:5])}"
        )


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `parts`: equal parts in any order give the same 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# Publishing


class Storage:
    """A root under which artifacts are computed, published and read; cheap to pickle, holds no connection.

    Args:
        root: folder or `s3://bucket/prefix` that every node reaches.
        commit_deadline_s: seconds to keep trying a request that the store does not answer.

    Raises:
        SettingsError: the root is neither a folder nor an S3 address, or carries credentials.
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
        """Full address of a key below the root, for people."""
        return f"{self.root}/{key}"

    def check(self) -> None:
        """Write, read, list, conditionally write and delete a probe, before anything expensive starts.

        Raises:
            StorageError: within about 10 s; says which permission, bucket, folder or endpoint to change.
        """
        store = open_store(self.root, _CHECK_TIMEOUT_S)
        persist(lambda: _probe(store, self.root), _CHECK_DEADLINE_S)

    def begin(self, artifact: str, fingerprint: str) -> Run:
        """Claim the run that computes this fingerprint, or continue the one that an earlier job left."""
        _require_name("artifact", artifact)
        key = f"{artifact}/_claims/{fingerprint}.json"
        claim = self._create(key, _to_json({"run_id": secrets.token_hex(16)}))
        return Run(self, artifact, self._parse_claim(key, claim), secrets.token_hex(4), fingerprint)

    def completed(self, artifact: str, fingerprint: str) -> Manifest | None:
        """The manifest (without date) of a complete and intact run of this fingerprint, if there is one."""
        claim_key = f"{artifact}/_claims/{fingerprint}.json"
        claim = self._get(claim_key)
        if claim is None:
            return None
        key = f"{artifact}/_runs/{self._parse_claim(claim_key, claim.data)}/_manifest.json"
        stored = self._get(key)
        if stored is None:
            return None
        manifest = self._parse_manifest(key, stored.data, artifact, "")
        return manifest if self.is_intact(manifest) else None

    def is_intact(self, manifest: Manifest) -> bool:
        """All its files are there, each with the size that it says."""
        return self._intact(manifest.artifact, manifest.files)

    def published(self, artifact: str, date: str) -> Manifest | None:
        """What is published for this date, if anything."""
        key = _manifest_key(artifact, date)
        stored = self._get(key)
        return None if stored is None else self._parse_manifest(key, stored.data, artifact, date)

    def publish(
        self,
        run: Run,
        *,
        date: str,
        files: Iterable[FileEntry],
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        metadata: Mapping[str, Any],
        replace: bool = False,
    ) -> Manifest:
        """Declare the run complete and publish it for `date`, exactly once.

        Args:
            run: the run whose files these are.
            date: night, YYYY-MM-DD.
            files: every file of the artifact, all written.
            settings: what the run was computed with, ready for JSON.
            inputs: digest of each artifact it was computed from.
            metadata: deterministic facts about the content, ready for JSON.
            replace: take the place of another run that is published for this date.

        Returns:
            What is published now: this run, or an equal one that was there first.

        Raises:
            PublishError: another run is published for this date; nothing was changed.
            CommitUnknownError: the store gave no answer; the next run finds out whether it is published.
        """
        manifest = run.as_manifest(
            files, settings=dict(settings), inputs=dict(inputs), metadata=dict(metadata)
        )
        names = {entry.name for entry in manifest.files}
        assert len(names) == len(manifest.files), "a file name occurs twice"
        crash_point(f"{run.artifact}.computed")
        key = f"{run.artifact}/_runs/{run.run_id}/_manifest.json"

        def still_good(data: bytes) -> bool:
            held = self._parse_manifest(key, data, run.artifact, "")
            return self._intact(run.artifact, held.files)

        data = self._create(key, _manifest_json(manifest), still_good)
        complete = self._parse_manifest(key, data, run.artifact, "")
        return self.publish_again(complete, date, replace=replace)

    def publish_again(self, manifest: Manifest, date: str, *, replace: bool = False) -> Manifest:
        """Publish a complete run for `date` and move `latest.json`; harmless if it is published already.

        Raises: as `publish`.
        """
        published = self._commit(manifest.model_copy(update={"date": date}), replace)
        crash_point(f"{manifest.artifact}.published")
        self._move_latest(published)
        return published

    # Chains

    def head(self, artifact: str, name: str) -> Manifest | None:
        """The newest link of a chain of runs, each of which adds to the one before; none before the first."""
        key = _head_key(artifact, name)
        stored = self._get(key)
        return None if stored is None else self._parse_manifest(key, stored.data, artifact, "")

    def move_head(self, name: str, before: Manifest | None, after: Manifest) -> bool:
        """Make `after` the newest link if `before` still is.

        Returns:
            Whether it is now; if not, somebody else's link is there, and nothing was changed.
        """
        key = _head_key(after.artifact, name)
        expected, data = None if before is None else _manifest_json(before), _manifest_json(after)

        def move() -> bool:
            there = self.store.get(key)
            # Read before every write: an earlier write of ours may have landed though its answer was lost.
            if there is not None and there.data == data:
                return True
            if (None if there is None else there.data) != expected:
                return False
            self.store.put_if(key, data, None if there is None else there.etag)
            return True

        return self._persist(move)

    # Reading

    def resolve(self, artifact: str, date: str | None = None) -> Manifest:
        """The manifest published for `date`, or for the latest date.

        Raises:
            ArtifactError: nothing is published there, or this version cannot read it.
        """
        wanted = date or self._latest_date(artifact)
        manifest = self.published(artifact, wanted) if wanted else None
        if manifest is None:
            latest = self._latest_date(artifact) if date else None
            raise ArtifactError(
                f"no {artifact} is published{f' for {wanted}' if wanted else ''} under {self.root}"
                f"{f'; the latest is of {latest}' if latest else ''}. Run the stage that writes {artifact} "
                "first, or correct storage.root or the date"
            )
        return manifest

    def read_table(
        self, manifest: Manifest, file: str | FileEntry, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A Parquet file of a run; the digest is verified when all columns are read, else the size.

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
            # one by one: read together, lists of text beyond 2 GiB are refused by Arrow
            groups = [parquet.read_row_group(i, names) for i in range(parquet.num_row_groups)]
            return pa.concat_tables(groups or [parquet.schema_arrow.empty_table()]).select(names)

        try:
            return self._read(manifest, entry, parse)
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(
                f"{self._file_uri(manifest, entry)} is not readable as Parquet: {error}"
            ) from None

    def read_file(self, manifest: Manifest, file: str | FileEntry) -> bytes:
        """The bytes of a file of a run, size and digest verified.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        entry = manifest.file(file) if isinstance(file, str) else file

        def parse(source: Any) -> bytes:
            self._require_size(manifest, entry, source.size())
            data: bytes = self._require_digest(manifest, entry, source.read())
            return data

        return self._read(manifest, entry, parse)

    def _read(self, manifest: Manifest, entry: FileEntry, parse: Callable[[Any], _T]) -> _T:
        try:
            return self._persist(lambda: self.store.read(f"{manifest.artifact}/{entry.path}", parse))
        except FileNotFoundError:
            raise ArtifactError(
                f"{self._file_uri(manifest, entry)} is missing, though the manifest names it. {_RESTORE}"
            ) from None

    def _require_size(self, manifest: Manifest, entry: FileEntry, size: int) -> None:
        if size != entry.bytes:
            uri = self._file_uri(manifest, entry)
            raise ArtifactError(f"{uri} has {size} bytes, its manifest says {entry.bytes}. {_RESTORE}")

    def _require_digest(self, manifest: Manifest, entry: FileEntry, data: _T) -> _T:
        found = hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]
        if found != entry.sha256:
            uri = self._file_uri(manifest, entry)
            raise ArtifactError(f"{uri} has SHA-256 {found}, its manifest says {entry.sha256}. {_RESTORE}")
        return data

    def _file_uri(self, manifest: Manifest, entry: FileEntry) -> str:
        return self.uri(f"{manifest.artifact}/{entry.path}")

    # The protocol

    def _persist(self, action: Callable[[], _T]) -> _T:
        return persist(action, self.commit_deadline_s)

    def _get(self, key: str) -> Stored | None:
        return self._persist(lambda: self.store.get(key))

    def _create(self, key: str, data: bytes, still_good: Callable[[bytes], bool] | None = None) -> bytes:
        """Put `data` unless something good is there; returns what is there then. The first writer wins."""

        def create() -> bytes:
            with suppress(Outrun):
                self.store.put_if(key, data, None)
                return data
            held = self.store.get(key)
            if held is None:
                raise Outrun(f"{self.uri(key)} was refused as existing, but does not exist")
            if held.data == data or still_good is None or still_good(held.data):
                return held.data
            self.store.put_if(key, data, held.etag)
            return data

        return self._persist(create)

    def _commit(self, mine: Manifest, replace: bool) -> Manifest:
        key = _manifest_key(mine.artifact, mine.date)
        data = _manifest_json(mine)
        at_start = self._get(key)
        replaceable = at_start.etag if at_start is not None and replace else None
        unanswered = False

        def commit() -> Manifest:
            nonlocal unanswered
            # Read before every write: an earlier write of ours may have landed though its answer was lost.
            there = self.store.get(key)
            if there is not None:
                held = self._parse_manifest(key, there.data, mine.artifact, mine.date)
                if held.fingerprint == mine.fingerprint and (not replace or held.files == mine.files):
                    return held
                if there.etag != replaceable:
                    raise PublishError(self._refusal(held, mine, replace))
            try:
                self.store.put_if(key, data, None if there is None else there.etag)
            except NoAnswer:
                unanswered = True
                raise
            return mine

        try:
            return self._persist(commit)
        except StorageError as error:
            if not unanswered:
                raise
            raise CommitUnknownError(
                f"{self.uri(key)} was sent, and no definite answer came within {self.commit_deadline_s:g} s: "
                "it may or may not be published. Nothing was deleted; run the same night again to find out. "
                f"The last answer: {error}"
            ) from None

    def _refusal(self, held: Manifest, mine: Manifest, replace: bool) -> str:
        taken = (
            f"{self.uri(mine.artifact)} of {mine.date} is published by run {held.run_id}, made from other "
            f"inputs or settings (fingerprint {held.fingerprint[:12]}, here {mine.fingerprint[:12]}); "
            "nothing was changed"
        )
        if replace:
            return f"{taken}. Another job published it while this one was running"
        return f"{taken}. To put run {mine.run_id} in its place: --storage.replace true"

    def _move_latest(self, published: Manifest) -> None:
        key = f"{published.artifact}/latest.json"
        data = _to_json({"date": published.date, "run_id": published.run_id})

        def move() -> None:
            there = self.store.get(key)
            if there is not None and (there.data == data or _pointed_date(there.data) > published.date):
                return
            self.store.put_if(key, data, None if there is None else there.etag)

        self._persist(move)

    def _latest_date(self, artifact: str) -> str | None:
        _require_name("artifact", artifact)
        stored = self._get(f"{artifact}/latest.json")
        if stored is None:
            return None
        date = _pointed_date(stored.data)
        if not date:
            raise ArtifactError(f"{self.uri(artifact)}/latest.json is damaged; publishing repairs it")
        return date

    def _intact(self, artifact: str, entries: Iterable[FileEntry]) -> bool:
        entries = list(entries)
        folders = {"/".join(entry.path.split("/")[:2]) for entry in entries}
        sizes = {
            found.path: found.bytes
            for folder in folders
            for found in self._persist(partial(self.store.find, f"{artifact}/{folder}"))
        }
        return all(sizes.get(f"{artifact}/{entry.path}") == entry.bytes for entry in entries)

    def _parse_claim(self, key: str, data: bytes) -> str:
        try:
            return _Claim.model_validate_json(data).run_id
        except ValidationError:
            raise ArtifactError(f"{self.uri(key)} is damaged: it names no run") from None

    def _parse_manifest(self, key: str, data: bytes, artifact: str, date: str) -> Manifest:
        try:
            version = _Version.model_validate_json(data).format_version
            if version > FORMAT_VERSION:
                raise ArtifactError(
                    f"{self.uri(key)} has format version {version}, and this tiger_ray reads none above "
                    f"{FORMAT_VERSION}: upgrade tiger_ray"
                )
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise ArtifactError(f"{self.uri(key)} is not a manifest: {place}: {problem['msg']}") from None
        if (manifest.artifact, manifest.date) != (artifact, date):
            held = f"{manifest.artifact} of {manifest.date or 'no date'}"
            raise ArtifactError(f"{self.uri(key)} holds the manifest of {held}")
        return manifest


@dataclass(frozen=True)
class Run:
    """One computation of one fingerprint, to be handed to workers; every file it writes is immutable."""

    storage: Storage = field(compare=False)
    artifact: str
    run_id: str
    attempt: str
    """Random per job: tells the files of two jobs on one run apart."""
    fingerprint: str

    def write_table(
        self, name: str, table: pa.Table, facts: Mapping[str, int] | None = None, group_rows: int = 2**20
    ) -> FileEntry:
        """Write a Parquet file (zstd), equal bytes for equal rows, and record it as done.

        Args:
            group_rows: rows of each row group, whose columns of text must stay below 2 GiB.

        Returns:
            The entry to publish: this file, or the one of that name that was finished first.
        """
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
            for start in range(0, table.num_rows, group_rows):
                # Chunks decide page boundaries, and two equal tables may be chunked differently.
                writer.write_table(table[start : start + group_rows].combine_chunks())
        return self._write(name, memoryview(sink.getvalue()), table.num_rows, facts or {})

    def write_file(self, name: str, data: bytes, rows: int = 0) -> FileEntry:
        """Write any other file and record it as done; returns as `write_table`."""
        return self._write(name, data, rows, {})

    def read_table(self, entry: FileEntry, columns: Sequence[str] | None = None) -> pa.Table:
        """A finished Parquet file of this run, as `Storage.read_table`."""
        return self.storage.read_table(self.as_manifest([entry]), entry, columns)

    def read_file(self, entry: FileEntry) -> bytes:
        """The bytes of a finished file of this run, as `Storage.read_file`."""
        return self.storage.read_file(self.as_manifest([entry]), entry)

    def as_manifest(self, files: Iterable[FileEntry], **content: Any) -> Manifest:
        """The run with these files, bound to no date."""
        return Manifest(
            artifact=self.artifact,
            date="",
            run_id=self.run_id,
            fingerprint=self.fingerprint,
            files=tuple(sorted(files, key=lambda entry: entry.name)),
            **({"settings": {}, "inputs": {}, "metadata": {}, "software": _software()} | content),
        )

    def finished(self) -> dict[str, FileEntry]:
        """Files of this run that any job finished and that are still there, by name."""
        store = self.storage.store
        found = self.storage._persist(lambda: store.find(f"{self.artifact}/_runs/{self.run_id}"))
        sizes = {file.path: file.bytes for file in found}
        done = [key for key in sizes if key.startswith(self._done_key("")) and key.endswith(".json")]
        with ThreadPoolExecutor(16) as threads:
            stored = list(threads.map(self.storage._get, done))
        entries = [self._parse_entry(key, item.data) for key, item in zip(done, stored, strict=True) if item]
        there = [entry for entry in entries if sizes.get(f"{self.artifact}/{entry.path}") == entry.bytes]
        return {entry.name: entry for entry in there}

    def write_beside(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Write, or write again, files into a folder of this run; they are never published.

        Raises:
            StorageError: the store refused, or gave no answer for so long; what was there before still is.
        """
        _require_name("folder", folder)
        for name, data in files.items():
            _require_name("file", name)
            key = f"{self.artifact}/_runs/{self.run_id}/{folder}/{name}"
            self.storage._persist(partial(self.storage.store.put, key, data))

    def read_beside(self, folder: str, name: str) -> bytes | None:
        """What `write_beside` wrote last in any attempt, if anything."""
        key = f"{self.artifact}/_runs/{self.run_id}/{folder}/{name}"

        def read() -> bytes | None:
            try:
                data: bytes = self.storage.store.read(key, lambda source: source.read())
            except FileNotFoundError:
                return None
            return data

        return self.storage._persist(read)

    def _write(self, name: str, data: bytes | memoryview, rows: int, facts: Mapping[str, int]) -> FileEntry:
        _require_name("file", name)
        sha256 = hashlib.sha256(data).hexdigest()
        path = f"_runs/{self.run_id}/{self.attempt}-{sha256[:16]}/{name}"
        entry = FileEntry(path=path, bytes=len(data), rows=rows, sha256=sha256, facts=dict(facts))
        storage = self.storage
        storage._persist(lambda: storage.store.put(f"{self.artifact}/{path}", data))
        key = self._done_key(f"{name}.json")

        def still_good(data: bytes) -> bool:
            held = self._parse_entry(key, data)
            return held.bytes in [found.bytes for found in storage.store.find(f"{self.artifact}/{held.path}")]

        return self._parse_entry(key, storage._create(key, _to_json(entry.model_dump()), still_good))

    def _done_key(self, name: str) -> str:
        return f"{self.artifact}/_runs/{self.run_id}/_done/{name}"

    def _parse_entry(self, key: str, data: bytes) -> FileEntry:
        try:
            return FileEntry.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(f"{self.storage.uri(key)} is damaged: {error.errors()[0]['msg']}") from None


_RESTORE = "To compute and publish it again: --storage.replace true"


class _Claim(_Value):
    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")


class _Version(BaseModel):
    format_version: int


def _manifest_key(artifact: str, date: str) -> str:
    _require_name("artifact", artifact)
    if not _DATE.fullmatch(date):
        raise ArtifactError(f"date must be a day like 2026-11-23, not {date!r}")
    return f"{artifact}/date={date}/_manifest.json"


def _head_key(artifact: str, name: str) -> str:
    _require_name("artifact", artifact)
    _require_name("head", name)
    return f"{artifact}/_heads/{name}.json"


def _require_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{what} name {name!r} must be letters, digits and any of . _ = + -")


def _to_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _manifest_json(manifest: Manifest) -> bytes:
    return _to_json(manifest.model_dump(mode="json"))


def _pointed_date(latest: bytes) -> str:
    """The date in a `latest.json`; empty, hence older than any, if it is damaged."""
    try:
        date = json.loads(latest)["date"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return date if isinstance(date, str) and _DATE.fullmatch(date) else ""


@lru_cache
def _software() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _SOFTWARE:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _probe(store: Store, root: str) -> None:
    key = f".probe-{secrets.token_hex(8)}"
    first, second = b"first", b"second"
    problem = None
    try:
        store.get(key)
        store.put_if(key, first, None)
        stored = store.get(key)
        if stored is None or stored.data != first or not store.find(key):
            raise StorageError(f"{root} does not give back what was just written; it needs consistent reads")
        if _accepts(store, key, second, None):
            problem = "If-None-Match: * (create only if absent)"
        elif _accepts(store, key, second, '"0123456789abcdef0123456789abcdef"'):
            problem = "If-Match (replace only what was seen)"
        else:
            store.put_if(key, second, stored.etag)
            store.put(key, first)
            store.read(key, lambda source: source.read())
    except StorageError:
        with suppress(StorageError):
            store.delete(key)
        raise
    store.delete(key)
    if problem:
        raise StorageError(
            f"the store of {root} ignores conditional writes: it overwrote an object in spite of {problem}. "
            "Two jobs could then publish one date; use a store that has them, such as AWS S3 or MinIO"
        )


def _accepts(store: Store, key: str, data: bytes, etag: str | None) -> bool:
    try:
        store.put_if(key, data, etag)
    except Outrun:
        return False
    return True
