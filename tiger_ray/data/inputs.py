"""The user's Parquet files, catalog and events: listed, and checked by their footers before any expensive work."""

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
"""Footers that are read in parallel: an object store takes equally long for each."""


def read_input_schema(
    files: Sequence[InputFile], uri: str, wanted: Mapping[str, str]
) -> tuple[pa.Schema, int]:
    """Schema of the input files and their total number of rows, from the footers.

    Args:
        files: Parquet files below `uri`.
        uri: address of the input, which names its filesystem.
        wanted: setting name -> column that must exist.

    Returns:
        The schema of the first file, with dictionary columns as their values, and the number of rows.

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
    assert first is not None, "list_inputs returns at least one file"
    if rows == 0:
        raise DataError(f"{uri} holds {len(files)} Parquet file(s) and 0 rows")
    return first, rows


class _Footer(NamedTuple):
    schema: pa.Schema
    num_rows: int


def _footers(files: Sequence[InputFile], uri: str) -> Iterator[_Footer]:
    """The footer of each file, in order."""
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
            f"{file.path} is gone since {uri} was listed; run the night again when the writer of {uri} has finished"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{file.path} is not a readable Parquet file ({file.bytes:,} bytes): {error}"
        ) from None
    # Read dictionary columns as their values: the index type depends on the number of distinct values in a file.
    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in footer.schema.to_arrow_schema()
    ]
    return _Footer(pa.schema(fields), footer.num_rows)


def id_type(schema: pa.Schema, column: str, uri: str) -> pa.DataType:
    """Type of an id column: string, large_string or int64.

    Args:
        schema: of the input.
        column: name of the id column.
        uri: address of the input, for the message.

    Raises:
        DataError: the column has another type.
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
        suffix: end of the names of files to read in a folder; names that start with `_` or `.` are skipped.

    Raises:
        DataError: `uri` holds no such file, a Parquet file of 0 bytes, or a broken symlink.
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
        # A symlink may give one file two names.
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
    """Open an input file and return the result of `parse`.

    Args:
        uri: address of the input.
        file: one of `list_inputs(uri)`.
        parse: called with the opened file; called again after a lost answer of the store.

    Raises:
        FileNotFoundError: the file is gone.
        StorageError: the store cannot be reached or read.
    """
    store, base, _ = input_store(uri)
    return persist(lambda: store.read(file.path.removeprefix(f"{base}/"), parse), _INPUT_DEADLINE_S)


def input_store(uri: str) -> tuple[Store, str, str]:
    """The store of an input, the common start of its files' paths, and the key of `uri` in the store."""
    scheme, path = parse_uri(uri)
    if scheme == "s3":
        bucket, _, key = path.partition("/")
        return S3Store(bucket, "", TIMEOUT_S), bucket, key
    return LocalStore("/"), "", path.lstrip("/")


def require_unchanged(uri: str, files: Sequence[InputFile], suffix: str = ".parquet") -> None:
    """Refuse input files that changed while they were read: the checks would not hold for the rows read.

    Args:
        uri: address of the input.
        files: the answer of `list_inputs` before the input was read.
        suffix: as in `list_inputs`.

    Raises:
        DataError: names a file that came, went or changed.
    """
    now = list_inputs(uri, suffix)
    if list(files) == now:
        return
    before = {file.path: file for file in files}
    changed = [file.path for file in now if before.pop(file.path, None) != file]
    raise DataError(
        f"{uri} changed while it was read: {[*changed, *before][0]}, {len(changed) + len(before):,} of {len(now):,} "
        "files. Nothing was published from it; run the night again when the writer of these files has finished"
    )


def input_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of `uri`, which holds no credentials, and the path of `uri` in this filesystem."""
    scheme, path = parse_uri(uri)
    return (s3_filesystem(TIMEOUT_S) if scheme == "s3" else pyarrow.fs.LocalFileSystem()), path
