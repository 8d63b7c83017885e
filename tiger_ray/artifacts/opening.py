"""The store of a URI."""

from __future__ import annotations

from tiger_ray.artifacts.local import LocalStore
from tiger_ray.artifacts.s3 import S3Store
from tiger_ray.artifacts.store import Store, parse_uri


def open_store(root: str, timeout_s: float) -> Store:
    """The store of a folder or an `s3://` address; one request may take `timeout_s` seconds."""
    scheme, path = parse_uri(root)
    if scheme == "local":
        return LocalStore(path)
    bucket, _, prefix = path.partition("/")
    return S3Store(bucket, prefix, timeout_s)
