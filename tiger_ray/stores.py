"""A folder or an S3-compatible store: the few operations that publishing needs, and reading input files.

Bulk data goes through pyarrow, conditional writes through boto3 (S3) or hard links and locks (folders).
Nothing is repeated in here: who writes has to know about every lost answer, so `persist` is for the caller.
"""

from __future__ import annotations

import email.utils
import errno
import fcntl
import hashlib
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import boto3
import botocore.config
import botocore.exceptions
import pyarrow as pa
import pyarrow.fs

from tiger_ray.errors import DataError, SettingsError, StorageError

_T = TypeVar("_T")
TIMEOUT_S = 30.0
_INPUT_DEADLINE_S = 60.0
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


def persist(action: Callable[[], _T], deadline_s: float) -> _T:
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


def list_inputs(uri: str, suffix: str = ".parquet") -> list[InputFile]:
    """Files to read at `uri`, a file or a folder, in order of their names.

    Args:
        uri: path or `s3://` address.
        suffix: other files of a folder are passed over, and so is every name that starts with `_` or `.`.

    Raises:
        DataError: nothing to read there, a Parquet file of 0 bytes, or a link to nothing.
        StorageError: the store cannot be reached or read.
    """
    store, base, key = _input_store(uri)
    found = persist(lambda: store.find(key), _INPUT_DEADLINE_S)
    files, passed_over, read = [], [], set()
    for file in sorted(found, key=lambda file: file.path):
        below = file.path[len(key) :].lstrip("/")  # empty if the uri names this very file
        hidden = any(part.startswith(("_", ".")) for part in below.split("/"))
        if file.path.endswith("/"):
            continue  # a marker that some tools write for a folder
        if file.version == _LINK_TO_NOTHING and not hidden:
            raise DataError(f"{base}/{file.path} is a link to nothing; mend it or remove it")
        # by a link, one file may lie there under two names
        real = os.path.realpath(f"/{file.path}") if isinstance(store, LocalStore) else file.path
        if hidden or real in read or (below and not below.endswith(suffix)):
            passed_over.append(below)
        else:
            read.add(real)
            files.append(InputFile(f"{base}/{file.path}", file.bytes, file.version))
    if not files:
        others = f"; other files are there, such as {passed_over[0]!r}" if passed_over else ""
        raise DataError(f"no {suffix} file at {uri}{others}. Correct the uri, or write the files first")
    for file in files:
        if file.path.endswith(".parquet") and file.bytes == 0:
            raise DataError(f"{file.path} has 0 bytes, so it is no Parquet file; write it again or remove it")
    return files


def read_input(uri: str, file: InputFile, parse: Callable[[Any], _T]) -> _T:
    """What `parse` makes of an opened file of `list_inputs`.

    Raises:
        FileNotFoundError: it is gone.
        StorageError: the store cannot be reached or read.
    """
    store, base, _ = _input_store(uri)
    return persist(lambda: store.read(file.path.removeprefix(f"{base}/"), parse), _INPUT_DEADLINE_S)


def _input_store(uri: str) -> tuple[Store, str, str]:
    """The store of an input, what its files' paths begin with, and the key of `uri`."""
    scheme, path = parse_uri(uri)
    if scheme == "s3":
        bucket, _, key = path.partition("/")
        return S3Store(bucket, "", TIMEOUT_S), bucket, key
    return LocalStore("/"), "", path.lstrip("/")


def require_unchanged(uri: str, files: Sequence[InputFile], suffix: str = ".parquet") -> None:
    """Refuse input that changed while it was read: what was checked would not be what was read.

    Raises:
        DataError: names a file that came, went or changed.
    """
    now = list_inputs(uri, suffix)
    if list(files) == now:
        return
    before = {file.path: file for file in files}
    changed = [file.path for file in now if before.pop(file.path, None) != file]
    raise DataError(
        f"{uri} changed while it was read: {[*changed, *before][0]}, {len(changed) + len(before):,} of {len(now):,} files. "
        "Nothing was published of it; run the night again when whoever writes there is done"
    )


def input_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of `uri`, without credentials in it, and the path of `uri` within it."""
    scheme, path = parse_uri(uri)
    return (_s3_filesystem(TIMEOUT_S) if scheme == "s3" else pyarrow.fs.LocalFileSystem()), path


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

    def read(self, key: str, parse: Callable[[Any], _T]) -> _T:
        """What `parse` makes of the opened object; FileNotFoundError if there is none."""

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write the object; no reader ever sees a part of it."""

    def put_if(self, key: str, data: bytes, etag: str | None) -> None:
        """Write if the object has this tag, or, for None, does not exist; otherwise `Outrun`."""

    def find(self, prefix: str) -> list[InputFile]:
        """The object of this name, or all objects in the folder of this name."""

    def delete(self, key: str) -> None:
        """Remove a probe."""


def open_store(root: str, timeout_s: float) -> Store:
    """The store of a root; one request may take so many seconds."""
    scheme, path = parse_uri(root)
    if scheme == "local":
        return LocalStore(path)
    bucket, _, prefix = path.partition("/")
    return S3Store(bucket, prefix, timeout_s)


_LINK_TO_NOTHING = "a link to nothing"
"""Version of a file that is none."""


class LocalStore:
    """A folder; writes are a temporary file plus a rename or a hard link."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> Stored | None:
        with _os_errors("read", self.folder / key):
            try:
                data = (self.folder / key).read_bytes()
            except FileNotFoundError:
                return None
        return Stored(data, hashlib.sha256(data).hexdigest())

    def read(self, key: str, parse: Callable[[Any], _T]) -> _T:
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
                        found.append(InputFile(key, 0, _LINK_TO_NOTHING))
                    continue  # else another writer's temporary file
                found.append(InputFile(key, stat.st_size, str(stat.st_mtime_ns)))
        return found

    def delete(self, key: str) -> None:
        with _os_errors("delete", self.folder / key):
            (self.folder / key).unlink(missing_ok=True)
            (self.folder / f".{key}.lock").unlink(missing_ok=True)


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files, also those of linked folders, but not a second time where a link leads back."""
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
    """A file with this content beside `path`, on disk before its name is, and gone afterwards."""
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
        # No errno: pyarrow found the content damaged.
        if error.errno is None or (verb == "read" and isinstance(error, FileNotFoundError)):
            raise
        advice = _OS_ADVICE.get(error.errno, "correct the path")
        raise StorageError(f"cannot {verb} {path}: {os.strerror(error.errno)}; {advice}") from None


class S3Store:
    """A bucket; conditional writes and listings through boto3, bulk data through pyarrow."""

    def __init__(self, bucket: str, prefix: str, timeout_s: float) -> None:
        self.bucket, self.prefix, self.timeout_s = bucket, prefix, timeout_s

    @property
    def _client(self) -> Any:
        return _s3_client(_endpoint(), _region(), self.timeout_s)

    @cached_property
    def _filesystem(self) -> Any:
        return _s3_filesystem(self.timeout_s)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix and key else self.prefix + key

    def get(self, key: str) -> Stored | None:
        with self._errors("GetObject", key):
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
                return Stored(answer["Body"].read(), answer["ETag"])
            except self._client.exceptions.NoSuchKey:
                return None

    def read(self, key: str, parse: Callable[[Any], _T]) -> _T:
        with (
            self._errors("GetObject", key),
            self._filesystem.open_input_file(f"{self.bucket}/{self._key(key)}") as source,
        ):
            return parse(source)

    def put(self, key: str, data: bytes | memoryview) -> None:
        with (
            self._errors("PutObject", key),
            self._filesystem.open_output_stream(f"{self.bucket}/{self._key(key)}") as sink,
        ):
            sink.write(data)

    def put_if(self, key: str, data: bytes, etag: str | None) -> None:
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with self._errors("PutObject", key):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
            except self._client.exceptions.NoSuchKey:  # answer to If-Match of an object that is gone
                raise Outrun(f"{key} is gone") from None

    def find(self, prefix: str) -> list[InputFile]:
        start = len(self._key("x")) - 1
        top = self._key(prefix)
        with self._errors("ListBucket", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{top}/" if top else ""
            )
            objects = [item for page in pages for item in page.get("Contents", ())]
            if not objects and top:
                # The object of exactly this name sorts before all others that begin like it.
                page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=top, MaxKeys=1)
                objects = [item for item in page.get("Contents", ()) if item["Key"] == top]
        return [InputFile(item["Key"][start:], item["Size"], item["ETag"].strip('"')) for item in objects]

    def delete(self, key: str) -> None:
        with self._errors("DeleteObject", key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[None]:
        """Translate what boto3 and pyarrow raise."""
        try:
            yield
        except botocore.exceptions.ClientError as error:
            problem, answer = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
            code, message = str(problem.get("Code", "")), str(problem.get("Message", ""))
            server_time = answer.get("HTTPHeaders", {}).get("date")
            self._raise(operation, key, code, message, answer.get("HTTPStatusCode", 0), server_time)
        except _NETWORK_ERRORS as error:
            self._raise(operation, key, "NetworkConnection", type(error).__name__, 0, None)
        except botocore.exceptions.BotoCoreError as error:
            self._raise(operation, key, type(error).__name__, str(error), 400, None)
        except FileNotFoundError as error:
            if operation == "GetObject":
                raise
            self._raise(operation, key, "NoSuchBucket", str(error), 404, None)
        except OSError as error:
            text = str(error)
            code_found = re.search(r"AWS Error (\w+)", text)
            if code_found is None:
                raise
            status_found = re.search(r"HTTP status (\d+)", text)
            code = "".join(word.capitalize() for word in code_found[1].split("_"))
            status = int(status_found[1]) if status_found else 400 if code in _S3_ADVICE else 503
            self._raise(operation, key, code, text, status, None)

    def _raise(
        self, operation: str, key: str, code: str, message: str, status: int, server_time: str | None
    ) -> NoReturn:
        target = f"s3://{self.bucket}/{self._key(key)}"
        if status == 412:
            raise Outrun(f"{target} exists or was changed by another job") from None
        endpoint = _endpoint()
        host = _host(endpoint) if endpoint else "AWS"
        advice = _S3_ADVICE.get(code, "").format(
            operation=operation, bucket=self.bucket, host=host, offset=_clock_offset(server_time)
        )
        text = f"{operation} of {target} at {host} failed: {code}"
        text = ". ".join(part for part in (text, _redacted(message).rstrip("."), advice) if part)
        transient = status in (0, 409, 429) or (status >= 500 and status != 501) or code in _S3_TRANSIENT
        raise (NoAnswer if transient else StorageError)(text) from None


_NETWORK_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
)

_S3_TRANSIENT = {"NetworkConnection", "RequestTimeout", "SlowDown", "Throttling", "RequestLimitExceeded"}

_CHECK_CREDENTIALS = (
    "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the instance role"
)
_CHECK_REGION = "Set AWS_REGION to the region of bucket {bucket}"

_S3_ADVICE = {
    "AccessDenied": "Grant these credentials s3:{operation} on bucket {bucket} (without s3:ListBucket, a "
    "missing key is answered so too)",
    "AuthorizationHeaderMalformed": _CHECK_REGION,
    "CredentialRetrievalError": _CHECK_CREDENTIALS,
    "ExpiredToken": "The credentials have expired: renew them and run again; it continues where it stopped",
    "InvalidAccessKeyId": _CHECK_CREDENTIALS,
    "InvalidBucketName": "Correct the bucket in storage.root",
    "InvalidToken": _CHECK_CREDENTIALS,
    "NetworkConnection": "Check AWS_ENDPOINT_URL and that this machine reaches {host}",
    "NoCredentialsError": _CHECK_CREDENTIALS,
    "NoSuchBucket": "Bucket {bucket} does not exist at {host}: create it, or correct the address or "
    "AWS_ENDPOINT_URL",
    "NotImplemented": "The store lacks conditional writes, without which two jobs could publish one date",
    "PartialCredentialsError": _CHECK_CREDENTIALS,
    "PermanentRedirect": _CHECK_REGION,
    "RequestTimeTooSkewed": "The clock of this machine is off{offset}: set it right (NTP)",
    "SignatureDoesNotMatch": _CHECK_CREDENTIALS,
}


def _clock_offset(server_time: str | None) -> str:
    if server_time is None:
        return ""
    offset_s = time.time() - email.utils.parsedate_to_datetime(server_time).timestamp()
    return f" by {offset_s / 60:+.0f} minutes"


def _redacted(text: str) -> str:
    for variable in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        value = os.environ.get(variable, "")
        if len(value) >= 8:  # no real one is shorter
            text = text.replace(value, f"<{variable}>")
    return text


@lru_cache(maxsize=8)
def _s3_client(endpoint: str | None, region: str | None, timeout_s: float) -> Any:
    config = botocore.config.Config(
        connect_timeout=min(timeout_s, 10.0),
        read_timeout=timeout_s,
        # One try: repeating is decided by the protocol, which has to know about every lost answer.
        retries={"mode": "standard", "total_max_attempts": 1},
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=16,
    )
    session = boto3.session.Session()  # the default session is not safe to share between threads
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _s3_filesystem(timeout_s: float) -> Any:
    # Delayed opening makes a small file one request.
    return pyarrow.fs.S3FileSystem(
        connect_timeout=min(timeout_s, 10.0),
        request_timeout=timeout_s,
        allow_delayed_open=True,
        **_s3_options(),
    )


def _s3_options() -> dict[str, str]:
    """What pyarrow does not take from the environment by itself."""
    endpoint, region, bundle = _endpoint(), _region(), os.environ.get("AWS_CA_BUNDLE")
    options = {}
    if region:
        options["region"] = region
    if endpoint:
        options |= {"endpoint_override": _host(endpoint), "scheme": urlsplit(endpoint).scheme}
    if bundle and options.get("scheme") != "http":
        options["tls_ca_file_path"] = bundle
    return options


def _endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and (urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname):
        raise SettingsError("AWS_ENDPOINT_URL must be like https://host or http://host:9000")
    return endpoint


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def _host(endpoint: str) -> str:
    """host:port, without any user and password that the endpoint may carry."""
    return urlsplit(endpoint).netloc.rpartition("@")[2]
