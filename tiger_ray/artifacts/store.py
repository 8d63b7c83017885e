"""A folder or an S3-compatible store: the few operations that publishing needs, and reading input files.

Bulk data goes through pyarrow, conditional writes through boto3 (S3) or hard links and locks (folders). A store
never retries: the caller must know about every lost answer (see `persist`).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

from tiger_ray.errors import SettingsError, StorageError

T = TypeVar("T")


TIMEOUT_S = 30.0
"""Seconds that one request may take."""


_jitter = random.SystemRandom()


@dataclass(frozen=True)
class InputFile:
    """One file of the user's data, in the version that was listed.

    >>> before, now = InputFile("events/a.parquet", 100, "1"), InputFile("events/a.parquet", 100, "2")
    >>> before == now
    False
    """

    path: str
    """Address within the filesystem of `input_filesystem`."""
    bytes: int
    version: str
    """ETag on S3; modification time in nanoseconds in a folder."""


@dataclass(frozen=True)
class Stored:
    """The content of a small object, and its tag for a conditional write.

    >>> Stored(b"{}", etag="abc").etag
    'abc'
    """

    data: bytes
    etag: str


class TryAgain(StorageError):
    """The request may be repeated: it had no effect, or an unknown effect."""


class NoAnswer(TryAgain):
    """Timeout, throttling, conflict or server error: the request may have had its effect or not."""


class Outrun(TryAgain):
    """The condition of a conditional write did not hold: another writer was faster."""


def persist(action: Callable[[], T], deadline_s: float) -> T:
    """Repeat `action` while it raises `TryAgain`, for at most `deadline_s` seconds; give its result.

    Raises:
        TryAgain: of the last attempt.
    """
    give_up = time.monotonic() + deadline_s
    pause_s = 0.05
    while True:
        try:
            return action()
        except TryAgain:
            pause_s = min(2 * pause_s, 10.0)
            wait_s = _jitter.uniform(0.2, 1.0) * pause_s
            if time.monotonic() + wait_s > give_up:
                raise
            time.sleep(wait_s)


def parse_uri(uri: str) -> tuple[str, str]:
    """("s3", "bucket/prefix") or ("local", "/absolute/path"), without a slash at the end.

    Raises:
        SettingsError: another scheme, no bucket, or credentials, a port or a query in the address.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "local", os.path.abspath(os.path.expanduser(uri))
    if scheme == "file":
        return "local", os.path.abspath(unquote(rest))
    if scheme != "s3":
        raise SettingsError(f"{scheme}:// is not supported: use a folder or s3://bucket/prefix")
    bucket = rest.partition("/")[0]
    if "@" in bucket or ":" in bucket:
        raise SettingsError(
            "an s3:// address must not hold credentials or a port: set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, or use an instance role"
        )
    if "?" in rest:
        raise SettingsError(
            f"s3://{rest.partition('?')[0]} must end there: the endpoint and region after `?` come from "
            "AWS_ENDPOINT_URL and AWS_REGION"
        )
    if not bucket:
        raise SettingsError(f"{uri!r} names no bucket: use s3://bucket/prefix")
    return "s3", "/".join(part for part in rest.split("/") if part)


class Store(Protocol):
    """The few operations that publishing needs; keys are relative to the root.

    All operations raise `NoAnswer` if repeating may help, and StorageError if repeating does not help.

    >>> from tempfile import TemporaryDirectory
    >>> from tiger_ray.artifacts.opening import open_store
    >>> with TemporaryDirectory() as folder:
    ...     store: Store = open_store(folder, TIMEOUT_S)
    ...     store.put("a/b.txt", b"content")
    ...     [file.path for file in store.find("a")], store.get("a/b.txt").data
    (['a/b.txt'], b'content')
    """

    def get(self, key: str) -> Stored | None:
        """The object and its tag; None if it does not exist."""

    def read(self, key: str, parse: Callable[[Any], T]) -> T:
        """Open the object and return the result of `parse`.

        Raises:
            FileNotFoundError: the object does not exist.
        """

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write the object; no reader ever sees a part of it."""

    def put_if(self, key: str, data: bytes, etag: str | None) -> None:
        """Write the object unless another writer changed it.

        Args:
            key: of the object.
            data: the content.
            etag: tag that the object must have; None: the object must not exist.

        Raises:
            Outrun: the object has another tag, or exists.
        """

    def find(self, prefix: str) -> list[InputFile]:
        """The object with this name, or all objects in the folder with this name."""

    def delete(self, key: str) -> None:
        """Remove an object; only the self-test of the storage does so."""

    def clock(self) -> float:
        """Seconds since 1970 by the clock of the store."""
