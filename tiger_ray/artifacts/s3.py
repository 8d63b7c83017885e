"""A store in an S3 bucket."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, NoReturn
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import pyarrow.fs

from tiger_ray.artifacts.store import InputFile, NoAnswer, Outrun, Store, Stored, T
from tiger_ray.errors import SettingsError, StorageError


class S3Store(Store):
    """A bucket; conditional writes and listings through boto3, bulk data through pyarrow.

    Args:
        bucket: name of the bucket.
        prefix: start of all keys, without a slash at the end; empty for the whole bucket.
        timeout_s: seconds that one request may take.

    >>> store = S3Store("bucket", "nights", timeout_s=30.0)  # connects on first use
    >>> store.bucket
    'bucket'
    """

    def __init__(self, bucket: str, prefix: str, timeout_s: float) -> None:
        self.bucket, self.prefix, self.timeout_s = bucket, prefix, timeout_s

    @property
    def _client(self) -> Any:
        return s3_client(_endpoint(), _region(), self.timeout_s)

    @cached_property
    def _filesystem(self) -> Any:
        return s3_filesystem(self.timeout_s)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix and key else self.prefix + key

    def get(self, key: str) -> Stored | None:
        with self._errors("GetObject", key):
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
                return Stored(answer["Body"].read(), answer["ETag"])
            except self._client.exceptions.NoSuchKey:
                return None

    def read(self, key: str, parse: Callable[[Any], T]) -> T:
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
            except self._client.exceptions.NoSuchKey:  # the answer to If-Match if the object is gone
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
                # The object with exactly this name sorts before all names that start with this name.
                page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=top, MaxKeys=1)
                objects = [item for item in page.get("Contents", ()) if item["Key"] == top]
        return [InputFile(item["Key"][start:], item["Size"], item["ETag"].strip('"')) for item in objects]

    def delete(self, key: str) -> None:
        with self._errors("DeleteObject", key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def clock(self) -> float:
        with self._errors("ListBucket", ""):
            answer = self._client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise StorageError(f"the store of s3://{self.bucket} does not say what time it is (header Date)")
        return email.utils.parsedate_to_datetime(date).timestamp()

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[None]:
        """Translate the exceptions of boto3 and pyarrow into ours."""
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
        text = ". ".join(part for part in (text, redact(message).rstrip("."), advice) if part)
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
    "AccessDenied": "Grant these credentials s3:{operation} on bucket {bucket} (without s3:ListBucket, S3 "
    "gives this answer for a missing key, too)",
    "AuthorizationHeaderMalformed": _CHECK_REGION,
    "CredentialRetrievalError": _CHECK_CREDENTIALS,
    "ExpiredToken": "The credentials have expired: renew them and run again; the night continues where it stopped",
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
    "RequestTimeTooSkewed": "The clock of this machine is off{offset}: correct the clock (NTP)",
    "SignatureDoesNotMatch": _CHECK_CREDENTIALS,
}


def _clock_offset(server_time: str | None) -> str:
    if server_time is None:
        return ""
    offset_s = time.time() - email.utils.parsedate_to_datetime(server_time).timestamp()
    return f" by {offset_s / 60:+.0f} minutes"


def redact(text: str) -> str:
    """The text with the values of credentials in the environment replaced by their names."""
    for variable in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        value = os.environ.get(variable, "")
        if len(value) >= 8:  # real credentials are longer; a short value would match by chance
            text = text.replace(value, f"<{variable}>")
    return text


@lru_cache(maxsize=8)
def s3_client(endpoint: str | None, region: str | None, timeout_s: float) -> Any:
    """A boto3 client for one endpoint and region; threads may share the client.

    Args:
        endpoint: `https://host` or `http://host:port`; None for AWS.
        region: name of the region; None for boto3's default.
        timeout_s: seconds that one request may take.
    """
    config = botocore.config.Config(
        connect_timeout=min(timeout_s, 10.0),
        read_timeout=timeout_s,
        # No retries here: the caller must know about every lost answer (see `persist`).
        retries={"mode": "standard", "total_max_attempts": 1},
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=16,
    )
    session = boto3.session.Session()  # the default session is not safe to share between threads
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


def s3_filesystem(timeout_s: float) -> Any:
    """S3 as a filesystem of pyarrow, with the endpoint, region and CA bundle of the environment.

    pyarrow itself ignores AWS_ENDPOINT_URL.
    """
    # Delayed opening makes a small file one request.
    return pyarrow.fs.S3FileSystem(
        connect_timeout=min(timeout_s, 10.0),
        request_timeout=timeout_s,
        allow_delayed_open=True,
        **_s3_options(),
    )


def _s3_options() -> dict[str, str]:
    """Options for the variables of the environment that pyarrow ignores."""
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
    """host:port of the endpoint, without user and password."""
    return urlsplit(endpoint).netloc.rpartition("@")[2]
