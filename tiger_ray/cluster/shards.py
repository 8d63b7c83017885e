"""Map shards over Ray Data, as embeddings and recommendations need: one input file becomes one output file.

A worker reads one input file and writes one output file of the same name. A retried task writes the same object
again, and a restarted job runs only the shards that the unfinished run lacks. The driver receives one small
`FileEntry` per file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from tiger_ray.artifacts.faults import crash_point
from tiger_ray.artifacts.manifest import FileEntry
from tiger_ray.artifacts.run import Run
from tiger_ray.cluster.usage import forget_peak, note_usage, usage_report
from tiger_ray.core.logs import show_logs
from tiger_ray.errors import TigerError

log = logging.getLogger(__name__)

ShardWorker = Callable[[FileEntry], FileEntry]
"""Makes and writes the output shard of an input shard; each actor builds one worker."""


def map_shards(
    run: Run,
    make_worker: Callable[..., ShardWorker],
    worker_args: Mapping[str, Any],
    *,
    shards: Sequence[FileEntry],
    num_workers: int,
    num_cpus: float,
    use_gpu: bool,
) -> list[FileEntry]:
    """Run `make_worker(run=run, **worker_args)(shard)` for every shard that the run lacks.

    Args:
        run: where workers write.
        make_worker: a class or function, built once in each actor.
        worker_args: keyword arguments of `make_worker`; object references are resolved.
        shards: files of the input; the output files have the same names.
        num_workers: most actors at a time.
        num_cpus: CPUs of each actor, when it has no GPU.
        use_gpu: one GPU for each actor.

    Returns:
        One entry per shard, in the order of the shards.
    """
    done = run.finished()
    todo = [shard for shard in shards if shard.name not in done]
    if len(todo) < len(shards):
        kept = len(shards) - len(todo)
        log.info(
            "%s: %d of %d shards are there already, %d to do", run.artifact, kept, len(shards), len(todo)
        )
    if todo:
        # Not `ray.data.range`: its tasks would wait for a CPU that the actors hold.
        numbers = pa.table({"number": pa.array(range(len(todo)))})
        dataset = ray.data.from_arrow(numbers, override_num_blocks=len(todo)).map_batches(
            _ShardActor,
            fn_constructor_args=(run, make_worker, todo, *worker_args.values()),
            fn_constructor_kwargs={"arg_names": tuple(worker_args)},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(num_workers, len(todo))),
            num_cpus=0 if use_gpu else num_cpus,
            num_gpus=1 if use_gpu else 0,
        )
        with plain_errors():
            for row in dataset.iter_rows():
                entry = FileEntry.model_validate_json(row["entry"])
                done[entry.name] = entry
                note_usage(row["usage"])
                crash_point(f"{run.artifact}.shard")
    return [done[shard.name] for shard in shards]


def map_numbers(count: int, make: Callable[[int], Any]) -> list[ray.ObjectRef]:
    """References to `make(0)`, `make(1)`, ... `make(count - 1)`, each made by a task of its own.

    Use this for short tasks: Ray Data needs 0.1 to 0.2 seconds to schedule a task, and seconds to start an actor.
    """
    task, shared = ray.remote(_call), ray.put(make)
    return [task.remote(shared, number) for number in range(count)]


def write_partitions(
    dataset: ray.data.Dataset, finish: Callable[[pa.Table, int], FileEntry], *, num_shards: int
) -> list[FileEntry]:
    """Shuffle rows by their column `shard` and hand each whole shard to `finish`, which writes it.

    Ray decides which rows share a block. The shard number travels with each row, so names and contents of the files
    do not depend on the blocks.

    Args:
        dataset: rows with an int32 column `shard` in 0..num_shards-1.
        finish: gets all rows of one shard in any order, without the column `shard`, and its number.
        num_shards: number of shards; a shard without rows is not written.

    Raises:
        TigerError: two blocks hold rows of the same shard.
    """
    partitions = dataset.repartition(num_shards, keys=["shard"]).map_batches(
        _finish_block, fn_args=(finish,), batch_size=None, batch_format="pyarrow"
    )
    with plain_errors():
        entries = []
        for row in partitions.iter_rows():
            entries.append(FileEntry.model_validate_json(row["entry"]))
            note_usage(row["usage"])
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise TigerError(
            f"the keyed shuffle sent {', '.join(twice[:5])} to two places; do all nodes run the same image? "
            "(a node with the package polars hashes keys differently)"
        )
    return sorted(entries, key=lambda entry: entry.name)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise a `TigerError` of a worker as itself, without the remote tracebacks that Ray wraps around the error."""
    try:
        yield
    except RayTaskError as error:
        ours = [cause for cause in causes(error) if isinstance(cause, TigerError)]
        if not ours:
            raise
        raise ours[0] from None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the nearest first, without the errors that Ray wraps around them."""
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, RayTaskError):
            yield cause
        cause = getattr(cause, "cause", None) or cause.__cause__


def _call(make: Callable[[int], Any], number: int) -> Any:
    return make(number)


class _ShardActor:
    """Builds one worker, and hands shards to the worker by their number."""

    def __init__(
        self,
        run: Run,
        make_worker: Callable[..., ShardWorker],
        todo: Sequence[FileEntry],
        *values: Any,
        arg_names: Sequence[str],
    ) -> None:
        show_logs(with_time=False)
        forget_peak()
        there = [ray.get(value) if isinstance(value, ray.ObjectRef) else value for value in values]
        self._todo = todo
        self._failed: TigerError | None = None
        try:
            self._worker = make_worker(run=run, **dict(zip(arg_names, there, strict=True)))
        except TigerError as error:
            # Ray takes an exception in __init__ for the death of the actor and retries: raise the error in __call__.
            self._failed = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        if self._failed is not None:
            raise self._failed
        entries = [self._worker(self._todo[row]).model_dump_json() for row in batch["number"]]
        return {"entry": entries, "usage": [usage_report()] * len(entries)}


def _finish_block(block: pa.Table, finish: Callable[[pa.Table, int], FileEntry]) -> pa.Table:
    if block.num_rows == 0:
        return pa.table({"entry": pa.array([], pa.string()), "usage": pa.array([], pa.string())})
    forget_peak()
    shards = block.column("shard").combine_chunks().to_numpy()
    rows = block.drop_columns(["shard"])
    order = np.argsort(shards, kind="stable")
    numbers, starts = np.unique(shards[order], return_index=True)
    ends = [*starts[1:], len(order)]
    entries = [
        finish(rows.take(pa.array(order[start:end])), int(number))
        for number, start, end in zip(numbers, starts, ends, strict=True)
    ]
    usage = [usage_report()] * len(entries)
    return pa.table({"entry": [entry.model_dump_json() for entry in entries], "usage": usage})
