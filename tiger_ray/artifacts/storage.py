"""Artifacts in a local folder or an S3-compatible store, published exactly once.

Layout below ROOT/<artifact>/ (readers look only for manifests; no file is ever deleted):

    _claims/<fingerprint>.json                the run that computes this fingerprint, also after a crash
    _runs/<run_id>/<attempt>-<digest>/<name>  data; the digest in the path prevents overwriting by a late writer
    _runs/<run_id>/_done/<name>.json          the entry of the first finished file with that name; later writers use it
    _runs/<run_id>/checkpoint-D/<name>        checkpoints and similar folders: replaced often, never published
    _runs/<run_id>/_manifest.json             the run is complete and may be published under any date
    _heads/<name>.json                        newest link of a chain, moved by compare-and-swap
    date=D/_manifest.json                     one conditional write, which publishes the artifact
    latest.json                               a hint, moved by compare-and-swap, never to an older date

Every machine takes credentials, endpoint and region from the usual AWS variables or its instance role; they are
never stored, pickled or printed.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from tiger_ray.artifacts.faults import crash_point
from tiger_ray.artifacts.manifest import DATE, FORMAT_VERSION, FileEntry, Manifest, _Value, manifest_json
from tiger_ray.artifacts.objects import Objects
from tiger_ray.artifacts.opening import open_store
from tiger_ray.artifacts.run import Run, require_name
from tiger_ray.artifacts.store import NoAnswer, Outrun, Store, persist
from tiger_ray.core.hashing import canonical_json
from tiger_ray.errors import ArtifactError, CommitUnknownError, PublishError, StorageError
from tiger_ray.settings.base import calendar_day

T = TypeVar("T")


_CHECK_TIMEOUT_S = 3.0


_CHECK_DEADLINE_S = 6.0


class Storage(Objects):
    """A root below which artifacts are computed, published and read; a pickle holds no connection.

    Args:
        root: folder or `s3://bucket/prefix` that every node reaches.
        commit_deadline_s: seconds to repeat a request that the store does not answer.

    Raises:
        SettingsError: the root is neither a folder nor an S3 address, or holds credentials.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     storage = Storage(folder)
    ...     run = storage.begin("catalog", "f" * 64)
    ...     files = [run.write_file("notes.txt", b"content")]
    ...     manifest = storage.publish(run, date="2026-11-23", files=files, settings={}, inputs={}, metadata={})
    ...     storage.read_file(storage.resolve("catalog"), "notes.txt")
    b'content'
    """

    def check(self) -> None:
        """Write, read, list, conditionally write and delete a probe, before anything expensive starts.

        Raises:
            StorageError: an operation fails, or gets no answer for about 10 s; the message says which
                permission, bucket, folder or endpoint to change.
        """
        store = open_store(self.root, _CHECK_TIMEOUT_S)
        persist(lambda: _probe(store, self.root), _CHECK_DEADLINE_S)

    def clock_offset_s(self, now: Callable[[], float] = time.time) -> float:
        """Seconds by which this machine's clock is ahead of the store's; S3 tells whole seconds.

        Args:
            now: this machine's clock, seconds since 1970.

        Raises:
            StorageError: within about 10 s; the store cannot be reached or read.
        """
        store = open_store(self.root, _CHECK_TIMEOUT_S)
        before = now()
        theirs = persist(store.clock, _CHECK_DEADLINE_S)
        return (before + now()) / 2 - theirs

    def begin(self, artifact: str, fingerprint: str) -> Run:
        """Claim a run for this fingerprint, or continue the run that an earlier job claimed."""
        require_name("artifact", artifact)
        key = f"{artifact}/_claims/{fingerprint}.json"
        claim = self.create(key, canonical_json({"run_id": secrets.token_hex(16)}))
        return Run(self, artifact, self._parse_claim(key, claim), secrets.token_hex(4), fingerprint)

    def completed(self, artifact: str, fingerprint: str) -> Manifest | None:
        """The manifest, without a date, of the complete and intact run of this fingerprint; None without one."""
        claim_key = f"{artifact}/_claims/{fingerprint}.json"
        claim = self.get(claim_key)
        if claim is None:
            return None
        key = f"{artifact}/_runs/{self._parse_claim(claim_key, claim.data)}/_manifest.json"
        stored = self.get(key)
        if stored is None:
            return None
        manifest = self._parse_manifest(key, stored.data, artifact, "")
        return manifest if self.is_intact(manifest) else None

    def is_intact(self, manifest: Manifest) -> bool:
        """True if all files of the manifest exist, each with its size."""
        return self._intact(manifest.artifact, manifest.files)

    def published(self, artifact: str, date: str) -> Manifest | None:
        """The manifest that is published for this date; None without one."""
        key = _manifest_key(artifact, date)
        stored = self.get(key)
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
            run: the run that wrote the files.
            date: night, YYYY-MM-DD.
            files: entries of all files of the artifact.
            settings: of the computation, ready for JSON.
            inputs: artifact -> digest, for all artifacts that the run was computed from.
            metadata: deterministic facts about the content, ready for JSON.
            replace: replace another run that is published for this date.

        Returns:
            The published manifest: of this run, or of an equal run that was published first.

        Raises:
            PublishError: another run is published for this date; nothing was changed.
            CommitUnknownError: the store gave no answer; the next run finds out whether the date is published.
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

        data = self.create(key, manifest_json(manifest), still_good)
        complete = self._parse_manifest(key, data, run.artifact, "")
        return self.publish_again(complete, date, replace=replace)

    def publish_again(self, manifest: Manifest, date: str, *, replace: bool = False) -> Manifest:
        """Publish a complete run for `date` and move `latest.json`; without effect if it is published already.

        Args:
            manifest: result of `completed`.
            date: night, YYYY-MM-DD.
            replace: replace another run that is published for this date.

        Returns:
            The published manifest.

        Raises:
            PublishError: another run is published for this date; nothing was changed.
            CommitUnknownError: the store gave no answer; the next run finds out whether the date is published.
        """
        published = self._commit(manifest.model_copy(update={"date": date}), replace)
        crash_point(f"{manifest.artifact}.published")
        self._move_latest(published)
        return published

    def point_latest(self, artifact: str, date: str) -> str | None:
        """Make `latest.json` name this date, also an earlier one; nothing is written besides, and nothing deleted.

        A reader without a date gets the artifact of this date from now on. A night that publishes the artifact for a
        later date, or publishes that later date again, moves `latest.json` forward as always.

        Args:
            artifact: name of the artifact.
            date: night, YYYY-MM-DD, for which the artifact is published.

        Returns:
            The date that `latest.json` named before; None if there was none, or a damaged one.

        Raises:
            ArtifactError: nothing is published for the date, or a file of what is published is missing.
            PublishError: another job moved `latest.json` meanwhile; nothing was changed.
        """
        manifest = self.resolve(artifact, date)
        if not self.is_intact(manifest):
            raise ArtifactError(
                f"{self.uri(artifact)} of {date} lacks files that its manifest names, so latest.json was not moved; "
                "`tiger-ray storage verify` names them, another date may be whole"
            )
        key = f"{artifact}/latest.json"
        data = canonical_json({"date": date, "run_id": manifest.run_id})
        at_start = self.get(key)

        def move() -> None:
            # Read before every write: an earlier write of ours may have landed though its answer was lost.
            there = self.store.get(key)
            if there is not None and there.data == data:
                return
            if (None if there is None else there.data) != (None if at_start is None else at_start.data):
                now = "" if there is None else _date_in(there.data)
                raise PublishError(
                    f"{self.uri(key)} was moved by another job meanwhile and names {now or 'no date'} now; nothing was "
                    "changed. Run the rollback again if it is still wanted"
                )
            self.store.put_if(key, data, None if there is None else there.etag)

        self.persist(move)
        return None if at_start is None else _date_in(at_start.data) or None

    # Chains

    def head(self, artifact: str, name: str) -> Manifest | None:
        """The newest link of a chain of runs, in which each run adds to the previous run; None before the first."""
        key = _head_key(artifact, name)
        stored = self.get(key)
        return None if stored is None else self._parse_manifest(key, stored.data, artifact, "")

    def move_head(self, name: str, before: Manifest | None, after: Manifest) -> bool:
        """Make `after` the newest link of a chain if `before` still is.

        Args:
            name: of the chain.
            before: the newest link as this job knows it; None for an empty chain.
            after: the new link.

        Returns:
            True if `after` is the newest link; False if another job added a link, and nothing was changed.
        """
        key = _head_key(after.artifact, name)
        expected, data = None if before is None else manifest_json(before), manifest_json(after)

        def move() -> bool:
            there = self.store.get(key)
            # Read before every write: an earlier write of ours may have landed though its answer was lost.
            if there is not None and there.data == data:
                return True
            if (None if there is None else there.data) != expected:
                return False
            self.store.put_if(key, data, None if there is None else there.etag)
            return True

        return self.persist(move)

    # Reading

    def resolve(self, artifact: str, date: str | None = None) -> Manifest:
        """The manifest published for `date`, or for the latest date.

        Raises:
            ArtifactError: the artifact is not published for the date, or this version cannot read the manifest.
            SettingsError: the date is not a day.
        """
        wanted = date or self.latest_date(artifact)
        manifest = self.published(artifact, wanted) if wanted else None
        if manifest is None:
            latest = self.latest_date(artifact) if date else None
            raise ArtifactError(
                f"no {artifact} is published{f' for {wanted}' if wanted else ''} under {self.root}"
                f"{f'; the latest is of {latest}' if latest else ''}. Run the stage that writes {artifact} "
                "first, or correct storage.root or the date"
            )
        return manifest

    def _commit(self, mine: Manifest, replace: bool) -> Manifest:
        key = _manifest_key(mine.artifact, mine.date)
        data = manifest_json(mine)
        at_start = self.get(key)
        replaceable = at_start.etag if at_start is not None and replace else None
        unanswered = False

        def commit() -> Manifest:
            nonlocal unanswered
            # Read before every write: an earlier write of ours may have landed though its answer was lost.
            there = self.store.get(key)
            if there is not None:
                held = self._parse_manifest(key, there.data, mine.artifact, mine.date)
                if held.fingerprint == mine.fingerprint and (not replace or held == mine):
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
            return self.persist(commit)
        except StorageError as error:
            if not unanswered:
                raise
            raise CommitUnknownError(
                f"{self.uri(key)} was sent, and no definite answer came within {self.commit_deadline_s:g} s: "
                "the date may or may not be published. Nothing was deleted; run the same night again to find "
                f"out. The last answer: {error}"
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
        data = canonical_json({"date": published.date, "run_id": published.run_id})

        def move() -> None:
            there = self.store.get(key)
            if there is not None and (there.data == data or _date_in(there.data) > published.date):
                return
            self.store.put_if(key, data, None if there is None else there.etag)

        self.persist(move)

    def latest_date(self, artifact: str) -> str | None:
        """The date in `latest.json`; None if the artifact was never published.

        Raises:
            ArtifactError: `latest.json` is damaged.
        """
        require_name("artifact", artifact)
        stored = self.get(f"{artifact}/latest.json")
        if stored is None:
            return None
        date = _date_in(stored.data)
        if not date:
            raise ArtifactError(f"{self.uri(artifact)}/latest.json is damaged; publishing repairs it")
        return date

    def _intact(self, artifact: str, entries: Iterable[FileEntry]) -> bool:
        entries = list(entries)
        folders = {"/".join(entry.path.split("/")[:2]) for entry in entries}
        sizes = {
            found.path: found.bytes
            for folder in folders
            for found in self.persist(partial(self.store.find, f"{artifact}/{folder}"))
        }
        return all(sizes.get(f"{artifact}/{entry.path}") == entry.bytes for entry in entries)

    def _parse_claim(self, key: str, data: bytes) -> str:
        try:
            return _Claim.model_validate_json(data).run_id
        except ValidationError:
            raise ArtifactError(f"{self.uri(key)} is damaged: the claim names no run") from None

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


class _Claim(_Value):
    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")


class _Version(BaseModel):
    format_version: int


def _manifest_key(artifact: str, date: str) -> str:
    require_name("artifact", artifact)
    return f"{artifact}/date={calendar_day(date)}/_manifest.json"


def _head_key(artifact: str, name: str) -> str:
    require_name("artifact", artifact)
    require_name("head", name)
    return f"{artifact}/_heads/{name}.json"


def _date_in(latest: bytes) -> str:
    """The date in a `latest.json`; empty, hence before every date, for a damaged file."""
    try:
        date = json.loads(latest)["date"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return date if isinstance(date, str) and DATE.fullmatch(date) else ""


def _probe(store: Store, root: str) -> None:
    key = f".probe-{secrets.token_hex(8)}"
    first, second = b"first", b"second"
    problem = None
    try:
        store.get(key)
        store.put_if(key, first, None)
        stored = store.get(key)
        if stored is None or stored.data != first or not store.find(key):
            raise StorageError(
                f"{root} does not return the object that was just written; use a store with consistent reads"
            )
        if _accepts(store, key, second, None):
            problem = "If-None-Match: * (create only if absent)"
        elif _accepts(store, key, second, '"0123456789abcdef0123456789abcdef"'):
            problem = "If-Match (replace only the version that was read)"
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
            "Two jobs could then publish one date; use a store with conditional writes, such as AWS S3 or MinIO"
        )


def _accepts(store: Store, key: str, data: bytes, etag: str | None) -> bool:
    try:
        store.put_if(key, data, etag)
    except Outrun:
        return False
    return True
