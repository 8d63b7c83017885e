"""Parquet that others wrote, catalog and events: checked by its footers, read by the cluster, blamed by name.

A file is first opened here, and everything that can be known of it is checked before anything expensive.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tiger_ray import schemas
from tiger_ray.errors import DataError, StorageError, TigerError
from tiger_ray.shards import causes
from tiger_ray.stores import InputFile, input_filesystem, read_input, require_unchanged

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
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(
                    f"{file.path} ({footer.num_rows:,} rows) has no column {column!r}, which {setting} names{hint} "
                    f"It has: {', '.join(schema.names)}."
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
        yield from pool.map(lambda file: _footer(file, uri), files)
    finally:
        pool.shutdown(cancel_futures=True)


def _footer(file: InputFile, uri: str) -> _Footer:
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


def read_columns(files: Sequence[InputFile], uri: str, columns: Iterable[str]) -> ray.data.Dataset:
    """These columns of the input files, each once; the others may differ from file to file.

    Args:
        files: Parquet files below `uri` that passed `read_input_schema`.
        uri: of the input, for its filesystem.
        columns: names.
    """
    filesystem, _ = input_filesystem(uri)
    schema = _footer(files[0], uri).schema
    # Left to itself, Ray Data cuts the rows of a few small files into 200 blocks.
    fewest = ray.data.DataContext.get_current().read_op_min_num_blocks
    return ray.data.read_parquet(
        [file.path for file in files],
        filesystem=filesystem,
        schema=pa.schema([schema.field(name) for name in sorted(set(columns))]),
        partitioning=None,  # a folder named like `date=...` is no column
        override_num_blocks=len(files) if len(files) < fewest else None,
    )


def id_type(schema: pa.Schema, column: str, uri: str) -> pa.DataType:
    """Type of an id column: string, large_string or int64.

    Raises:
        DataError: any other type.
    """
    found = schema.field(column).type
    if found not in schemas.ID_TYPES:
        raise DataError(f"column {column!r} of {uri} is {found}; an id must be string, large_string or int64")
    return found


@contextmanager
def blamed(files: Sequence[InputFile], uri: str, columns: Iterable[str]) -> Iterator[None]:
    """Where working with these columns fails because of the input, say which file it is.

    Args:
        files: Parquet files below `uri`, which must still be there and unchanged in the end.
        uri: of the input, for its filesystem.
        columns: names.

    Raises:
        DataError: a file came, went or changed, has damaged pages, or text that is no UTF-8.
        StorageError: the store failed.
    """
    try:
        yield
    except TigerError:
        raise
    except Exception as error:
        require_unchanged(uri, files)
        of_input = pa.ArrowException, OSError, UnicodeDecodeError
        found = next((cause for cause in causes(error) if isinstance(cause, of_input)), None)
        if found is None:
            raise
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            bad = [text for text in pool.map(lambda file: _damage(file, uri, columns), files) if text]
        if bad:
            more = f" (and {len(bad) - 1:,} more of {len(files):,} files)" if len(bad) > 1 else ""
            raise DataError(f"{bad[0]}{more}; write it again, as UTF-8 where it is text") from None
        if isinstance(found, OSError):
            raise StorageError(f"reading {uri} failed, though every file can be read now: {found}") from None
        raise
    require_unchanged(uri, files)


def _damage(file: InputFile, uri: str, columns: Iterable[str]) -> str | None:
    """Why one of these columns of a file cannot be read, if so."""

    def read(source: Any) -> str | None:
        parquet = pq.ParquetFile(source)
        for column in sorted(set(columns)):
            try:
                for batch in parquet.iter_batches(columns=[column]):
                    batch.validate(full=True)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
                    raise  # the store's, not the file's
                return f"column {column!r} of {file.path} ({parquet.metadata.num_rows:,} rows) cannot be read: {error}"
        return None

    return read_input(uri, file, read)
