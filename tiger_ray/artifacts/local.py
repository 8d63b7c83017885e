"""A store in a local folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from tiger_ray.artifacts.store import InputFile, Outrun, Store, Stored, T
from tiger_ray.errors import StorageError

BROKEN_SYMLINK = "broken symlink"
"""Version that `find` gives to a symlink whose target does not exist."""


class LocalStore(Store):
    """A folder; a write is a temporary file plus a rename or a hard link.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     store = LocalStore(folder)
    ...     store.put_if("a.txt", b"first", None)
    ...     try:
    ...         store.put_if("a.txt", b"second", None)
    ...     except Outrun:
    ...         store.get("a.txt").data
    b'first'
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> Stored | None:
        with _os_errors("read", self.folder / key):
            try:
                data = (self.folder / key).read_bytes()
            except FileNotFoundError:
                return None
        return Stored(data, hashlib.sha256(data).hexdigest())

    def read(self, key: str, parse: Callable[[Any], T]) -> T:
        with _os_errors("read", self.folder / key), pa.OSFile(str(self.folder / key)) as source:
            return parse(source)

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self.folder / key
        with _os_errors("write", path), _temporary_file(path, data) as temporary:
            os.replace(temporary, path)

    def put_if(self, key: str, data: bytes, etag: str | None) -> None:
        path = self.folder / key
        with _os_errors("write", path), _temporary_file(path, data) as temporary:
            if etag is None:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    raise Outrun(f"{path} exists") from None
            else:
                with _locked(path.with_name(f".{path.name}.lock")):
                    there = self.get(key)
                    if there is None or there.etag != etag:
                        raise Outrun(f"{path} was changed by another job")
                    os.replace(temporary, path)

    def find(self, prefix: str) -> list[InputFile]:
        top = self.folder / prefix
        with _os_errors("list", top):
            if top.is_file():
                paths = [top]
            else:
                paths = list(_files_below(top))
            found = []
            for path in paths:
                key = path.relative_to(self.folder).as_posix()
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    if path.is_symlink():
                        found.append(InputFile(key, 0, BROKEN_SYMLINK))
                    continue  # else another writer's temporary file
                found.append(InputFile(key, stat.st_size, str(stat.st_mtime_ns)))
        return found

    def delete(self, key: str) -> None:
        with _os_errors("delete", self.folder / key):
            (self.folder / key).unlink(missing_ok=True)
            (self.folder / f".{key}.lock").unlink(missing_ok=True)

    def clock(self) -> float:
        path = self.folder / "clock"
        with _os_errors("write", path), _temporary_file(path, b"") as temporary:
            return temporary.stat().st_mtime


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files, also in linked folders; a link to a folder above is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(Path(entry.path), (*above, real))
        else:
            yield Path(entry.path)


@contextmanager
def _temporary_file(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A temporary file with this content beside `path`: its content is on disk before the caller renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_OS_ADVICE = {
    errno.EACCES: "grant this user access to the folder, or change storage.root",
    errno.EPERM: "grant this user access to the folder, or use one on a filesystem with hard links",
    errno.EROFS: "the filesystem is read-only; change storage.root",
    errno.ENOSPC: "the disk is full; free space or change storage.root",
    errno.EDQUOT: "the disk quota is used up; free space or change storage.root",
    errno.ENOTDIR: "a part of the path is a file, not a folder; change storage.root",
    errno.EOPNOTSUPP: "the filesystem lacks hard links or locks; use another disk or s3://",
}


@contextmanager
def _os_errors(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # pyarrow raises OSError without errno for damaged content.
        if error.errno is None or (verb == "read" and isinstance(error, FileNotFoundError)):
            raise
        advice = _OS_ADVICE.get(error.errno, "correct the path")
        raise StorageError(f"cannot {verb} {path}: {os.strerror(error.errno)}; {advice}") from None
