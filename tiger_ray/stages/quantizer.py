"""Embeddings -> the frozen quantizer, fitted by workers that each see a share of the catalog.

The first night fits the quantizer. Later nights keep the quantizer until `quantizer.version` is raised or another
quantizer setting changes, which starts a new ID space.

B items in block, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import EmbeddingsMetadata
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.schemas import matrix_of
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.workers import Worker, run_workers
from tiger_ray.ids import quantizers
from tiger_ray.published.quantizer import QUANTIZER_FILES
from tiger_ray.stages.stage import Computed, Context, Stage

log = logging.getLogger(__name__)


def _source(context: Context) -> dict[str, Any]:
    embeddings = EmbeddingsMetadata.of(context.inputs["embeddings"])
    return {"encoder": embeddings.encoder, "dim": embeddings.dim}


def _compute(run: Run, context: Context) -> Computed:
    settings, storage, embeddings = context.settings, context.storage, context.inputs["embeddings"]
    quantizer = settings.quantizer
    done = run.finished()
    if not all(name in done for name in QUANTIZER_FILES):
        arguments = {"settings": settings, "storage": storage, "embeddings": embeddings}
        run_workers(_fit_share, arguments, run=run, date=settings.date, settings=quantizer)
        done = run.finished()
    entries = [done[name] for name in QUANTIZER_FILES]
    level_sizes = quantizers.load({entry.name: run.read_file(entry) for entry in entries}).level_sizes
    summary = f"{quantizer.kind}, {' x '.join(map(str, level_sizes)) or 'no'} codewords"
    return entries, {"summary": summary, "level_sizes": list(level_sizes), "kind": quantizer.kind}


def _fit_share(arguments: dict[str, Any], worker: Worker) -> None:
    settings = arguments["settings"]
    blocks = EmbeddingBlocks(arguments["storage"], arguments["embeddings"], worker.rank, worker.world_size)

    def say(line: str) -> None:
        if worker.is_first:
            log.info("quantizer: %s", line)

    rows = arguments["embeddings"].rows
    quantizer = quantizers.fit(
        settings.quantizer, blocks, seed=settings.seed, rows=rows, device=worker.device, log=say
    )
    if worker.is_first:
        for name, data in quantizer.to_files().items():
            arguments["run"].write_file(name, data)


class EmbeddingBlocks(Sequence[npt.NDArray[np.float32]]):
    """One worker's share of the published embeddings as blocks, (B, D) float32; each access reads from storage.

    Args:
        storage: where the embeddings are published.
        embeddings: manifest of the embeddings.
        rank: number of this worker.
        num_workers: number of workers; each gets an equal range of rows.
    """

    def __init__(self, storage: Storage, embeddings: Manifest, rank: int, num_workers: int) -> None:
        self._storage, self._embeddings = storage, embeddings
        first, end = (embeddings.rows * part // num_workers for part in (rank, rank + 1))
        self._pieces: list[tuple[FileEntry, int, int]] = []
        start = 0
        for entry in embeddings.files:
            low, high = max(first - start, 0), min(end - start, entry.rows)
            if low < high:
                self._pieces.append((entry, low, high))
            start += entry.rows
        # A worker without rows gets an empty block, because the block has the width.
        self._pieces = self._pieces or [(embeddings.files[0], 0, 0)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        entry, first, end = self._pieces[number]
        table = self._storage.read_table(self._embeddings, entry, columns=["embedding"])
        return np.array(matrix_of(table.slice(first, end - first).column("embedding")))


STAGE = Stage(
    name="quantizer",
    does="vectors -> codebooks, fitted once and kept",
    inputs=("embeddings",),
    sections=("quantizer",),
    # New items must not move old ones, so the embeddings are not in the key.
    keyed_inputs=lambda context: {},
    source=_source,
    compute=_compute,
    format_version=2,
)
"""Publishes `quantizer`, unless one with these settings exists already."""
