"""Parquet that others wrote, catalog and events: checked by its footers, read by the cluster, blamed by name.

A file is first opened here, and everything that can be known of it is checked before anything expensive.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.local import BROKEN_SYMLINK, LocalStore
from tiger_ray.artifacts.s3 import S3Store, s3_filesystem
from tiger_ray.artifacts.store import TIMEOUT_S, InputFile, Store, T, parse_uri, persist
from tiger_ray.errors import DataError

FILES_AT_ONCE = 32
"""Each takes an object store as long as the last."""


def read_input_schema(
    files: Sequence[InputFile], uri: str, wanted: Mapping[str, str]
) -> tuple[pa.Schema, int]:
    """Schema common to all input files, and their rows in all, from the footers alone.

    Args:
        files: Parquet files below `uri`.
        uri: of the input, for its filesystem.
        wanted: setting name -> column that must exist.

    Returns:
        The schema of the first file, dictionaries as their values, and the number of rows.

    Raises:
        DataError: a file is not Parquet, lacks a wanted column, or types a wanted column differently.
        StorageError: the store cannot be reached or read.
    """
    first: pa.Schema | None = None
    rows = 0
    for file, footer in zip(files, _footers(files, uri), strict=True):
        schema = footer.schema
        rows += footer.num_rows
        for setting, column in wanted.items():
            if column not in schema.names:
                near = difflib.get_close_matches(column, schema.names, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise DataError(
                    f"{file.path} ({footer.num_rows:,} rows) has no column {column!r}, which {setting} names{hint} "
                    f"It has: {', '.join(schema.names)}"
                )
            if first is not None and schema.field(column).type != first.field(column).type:
                raise DataError(
                    f"column {column!r} is {schema.field(column).type} in {file.path} ({footer.num_rows:,} rows), "
                    f"but {first.field(column).type} in {files[0].path}; write it with one type"
                )
        first = first if first is not None else schema
    assert first is not None, "list_inputs never returns nothing"
    if rows == 0:
        raise DataError(f"{uri} holds {len(files)} Parquet file(s) and 0 rows")
    return first, rows


class _Footer(NamedTuple):
    schema: pa.Schema
    num_rows: int


def _footers(files: Sequence[InputFile], uri: str) -> Iterator[_Footer]:
    """Of each file in order."""
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        yield from pool.map(lambda file: footer_of(file, uri), files)
    finally:
        pool.shutdown(cancel_futures=True)


def footer_of(file: InputFile, uri: str) -> _Footer:
    """Schema and rows of one Parquet file, with dictionary columns as their values.

    Raises:
        DataError: the file is gone, or is not Parquet.
    """
    try:
        footer = read_input(uri, file, pq.read_metadata)
    except FileNotFoundError:
        raise DataError(
            f"{file.path} is gone since {uri} was listed; run the night again when whoever writes there is done"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{file.path} is not a readable Parquet file ({file.bytes:,} bytes): {error}"
        ) from None
    # a dictionary as its values: how many there are in a file decides the type of its indices
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in footer.schema.to_arrow_schema()
    ]
    return _Footer(pa.schema(fields), footer.num_rows)


def id_type(schema: pa.Schema, column: str, uri: str) -> pa.DataType:
    """Type of an id column: string, large_string or int64.

    Raises:
        DataError: any other type.
    """
    found = schema.field(column).type
    if found not in schemas.ID_TYPES:
        raise DataError(f"column {column!r} of {uri} is {found}; an id must be string, large_string or int64")
    return found


_INPUT_DEADLINE_S = 60.0


def list_inputs(uri: str, suffix: str = ".parquet") -> list[InputFile]:
    """Files to read at `uri`, a file or a folder, in order of their names.

    Args:
        uri: path or `s3://` address.
        suffix: other files of a folder are passed over, and so is every name that starts with `_` or `.`.

    Raises:
        DataError: nothing to read there, a Parquet file of 0 bytes, or a broken symlink.
        StorageError: the store cannot be reached or read.
    """
    store, base, key = input_store(uri)
    found = persist(lambda: store.find(key), _INPUT_DEADLINE_S)
    files, passed_over, read = [], [], set()
    for file in sorted(found, key=lambda file: file.path):
        below = file.path[len(key) :].lstrip("/")  # empty if the uri names this very file
        hidden = any(part.startswith(("_", ".")) for part in below.split("/"))
        if file.path.endswith("/"):
            continue  # a marker that some tools write for a folder
        if file.version == BROKEN_SYMLINK and not hidden:
            raise DataError(f"{base}/{file.path} is a broken symlink; repair it or remove it")
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


def read_input(uri: str, file: InputFile, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of an opened file of `list_inputs`.

    Raises:
        FileNotFoundError: it is gone.
        StorageError: the store cannot be reached or read.
    """
    store, base, _ = input_store(uri)
    return persist(lambda: store.read(file.path.removeprefix(f"{base}/"), parse), _INPUT_DEADLINE_S)


def input_store(uri: str) -> tuple[Store, str, str]:
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
    return (s3_filesystem(TIMEOUT_S) if scheme == "s3" else pyarrow.fs.LocalFileSystem()), path
