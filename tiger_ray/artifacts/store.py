"""A folder or an S3-compatible store: the few operations that publishing needs, and reading input files.

Bulk data goes through pyarrow, conditional writes through boto3 (S3) or hard links and locks (folders).
Nothing is repeated in here: who writes has to know about every lost answer, so `persist` is for the caller.
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


_jitter = random.SystemRandom()


@dataclass(frozen=True)
class InputFile:
    """One file of the user's own data, and which version of it was seen."""

    path: str
    """Address within the filesystem of `input_filesystem`."""
    bytes: int
    version: str
    """ETag on S3, modification time in nanoseconds in a folder."""


@dataclass(frozen=True)
class Stored:
    """A small object as it was read, with the tag that a conditional write may name."""

    data: bytes
    etag: str


class TryAgain(StorageError):
    """The request had no lasting effect that we know of, and may be repeated."""


class NoAnswer(TryAgain):
    """Timeout, throttling, conflict or server error: it may have happened or not."""


class Outrun(TryAgain):
    """The condition of a conditional write did not hold."""


def persist(action: Callable[[], T], deadline_s: float) -> T:
    """Repeat `action` while the store gives no definite answer, up to the deadline."""
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
    """("s3", "bucket/prefix") or ("local", "/absolute/path"), neither with a slash at its end."""
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

    All raise `NoAnswer` where repeating may help, and StorageError where it will not.
    """

    def get(self, key: str) -> Stored | None:
        """The whole object and its tag."""

    def read(self, key: str, parse: Callable[[Any], T]) -> T:
        """What `parse` makes of the opened object; FileNotFoundError if there is none."""

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write the object; no reader ever sees a part of it."""

    def put_if(self, key: str, data: bytes, etag: str | None) -> None:
        """Write if the object has this tag, or, for None, does not exist; otherwise `Outrun`."""

    def find(self, prefix: str) -> list[InputFile]:
        """The object of this name, or all objects in the folder of this name."""

    def delete(self, key: str) -> None:
        """Remove a probe."""

    def clock(self) -> float:
        """Seconds since 1970 by the clock of the store."""
