"""Input files as datasets of Ray Data; an error while reading names the file that caused the error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tiger_ray.artifacts.store import InputFile
from tiger_ray.cluster.shards import causes
from tiger_ray.data.events import wanted_columns
from tiger_ray.data.inputs import FILES_AT_ONCE, footer_of, input_filesystem, read_input, require_unchanged
from tiger_ray.errors import DataError, StorageError, TigerError
from tiger_ray.settings.events import EventsSettings


def read_events(files: Sequence[InputFile], settings: EventsSettings) -> ray.data.Dataset:
    """The wanted columns of the events, unfiltered."""
    return read_columns(files, settings.uri, wanted_columns(settings).values())


def read_columns(files: Sequence[InputFile], uri: str, columns: Iterable[str]) -> ray.data.Dataset:
    """The named columns of the input files, a repeated name once; other columns may differ from file to file.

    Args:
        files: Parquet files below `uri` that passed `read_input_schema`.
        uri: of the input, for its filesystem.
        columns: names of the columns to read.
    """
    filesystem, _ = input_filesystem(uri)
    schema = footer_of(files[0], uri).schema
    # By default Ray Data cuts the rows of a few small files into 200 blocks.
    fewest = ray.data.DataContext.get_current().read_op_min_num_blocks
    return ray.data.read_parquet(
        [file.path for file in files],
        filesystem=filesystem,
        schema=pa.schema([schema.field(name) for name in sorted(set(columns))]),
        partitioning=None,  # a folder named `date=...` is not a column
        override_num_blocks=len(files) if len(files) < fewest else None,
    )


@contextmanager
def name_bad_file(files: Sequence[InputFile], uri: str, columns: Iterable[str]) -> Iterator[None]:
    """Name the bad input file in the error, if the block fails because of the input.

    Args:
        files: Parquet files below `uri`; they must be unchanged when the block ends.
        uri: of the input, for its filesystem.
        columns: names of the columns that the block reads.

    Raises:
        DataError: a file was added, removed or changed, has damaged pages, or holds text that is not UTF-8.
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
    """Why a column of a file cannot be read; None if every column can."""

    def read(source: Any) -> str | None:
        parquet = pq.ParquetFile(source)
        for column in sorted(set(columns)):
            try:
                for batch in parquet.iter_batches(columns=[column]):
                    batch.validate(full=True)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
                    raise  # the store failed, the file is not damaged
                return f"column {column!r} of {file.path} ({parquet.metadata.num_rows:,} rows) cannot be read: {error}"
        return None

    return read_input(uri, file, read)
