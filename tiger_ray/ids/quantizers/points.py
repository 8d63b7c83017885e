"""One worker's share of the embeddings during a fit, in blocks, and sums over all workers.

A quantizer must not depend on the number of workers, nor on their shares. Hence every choice of items
follows from a hash of the embedding, and sums are in fixed point, which is exact in any order. Without
`torch.distributed` there is one worker with all embeddings.

B items in a block or batch, M items in a sample, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from tiger_ray.core.hashing import row_hash, splitmix64
from tiger_ray.errors import DataError
from tiger_ray.settings.quantizer import QuantizerSettings

WINDOW_ROWS = 1 << 16
"""Rows that are shuffled together before they are cut into batches."""


LEARNING_KINDS = ("rqvae", "residual_kmeans")
"""Kinds that need at least as many distinct embeddings as codewords of a level."""


_FIXED_POINT_BITS = 62


_KEYS = 2.0**64


class Points:
    """Standardized embeddings of this worker: mean 0 and deviation 1 in every dimension, over all workers.

    Args:
        blocks: this worker's share, arrays (B, D) float32; a sequence may load each block on access.
        settings: section `quantizer`; `sample_size` and `validation_share` choose the items of the fit.
        device: device of the points.
        rows: number of items of all workers; None to count them in one more pass.

    Raises:
        DataError: an embedding holds NaN or infinity, or too few embeddings are distinct.

    >>> block_BD = np.random.default_rng(0).normal(3, 2, size=(200, 8)).astype(np.float32)
    >>> points = Points([block_BD], QuantizerSettings(level_sizes=(4,), validation_share=0), "cpu")
    >>> bool(points.sample(200, seed=0).mean(0).abs().max() < 1e-6)
    True
    """

    def __init__(
        self,
        blocks: Sequence[npt.NDArray[np.float32]],
        settings: QuantizerSettings,
        device: Any,
        rows: int | None = None,
    ) -> None:
        self._blocks, self.device = blocks, torch.device(device)
        self._memory = settings.memory_mb_per_worker << 20
        self._kept = dict[int, npt.NDArray[np.float32]]()
        if rows is None:
            rows = _sum_of_counts([len(block) for block in blocks])
        self.fit_keys = _fit_keys(settings, rows)
        """First hash and end of the hashes of embeddings to learn from; those below the first are held out."""
        self._refuse_useless(max(settings.level_sizes) if settings.kind in LEARNING_KINDS else 1)
        counts = gather_over_workers([sum(len(rows) for rows in self._fit_blocks())])
        if min(counts) == 0:
            # Stop on every worker, or the others would wait for the worker that stops.
            raise DataError(
                f"of {len(counts)} workers {counts.count(0)} have no item to learn from ({sum(counts):,} in all); "
                f"lower quantizer.num_workers ({len(counts)})"
            )
        self.count = sum(counts)
        """Number of items to learn from, of all workers."""
        largest_D = largest_over_workers(_largest(self._fit_blocks()))
        _refuse_huge(largest_D)
        self.dim = len(largest_D)
        """Embedding width D."""
        sums = ExactSum(largest_D.max().item(), self.count)
        mean_D = sums.total(torch.from_numpy(block).double() for block in self._fit_blocks()) / self.count
        squares = ExactSum(4 * largest_D.max().item() ** 2, self.count)
        variance_D = (
            squares.total(
                (torch.from_numpy(block).double() - mean_D).square() for block in self._fit_blocks()
            )
            / self.count
        )
        # Rounding gives a constant dimension a deviation below this bound.
        varies_D = variance_D.sqrt() > 1e-6 * mean_D.abs()
        self.mean_D = mean_D.float().to(self.device)
        self.scale_D = torch.where(varies_D, variance_D.sqrt(), 0.0).float().to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        """This worker's points, (B, D) at a time, in the same order on each pass."""
        for block in self._fit_blocks():
            yield self.standardize(torch.from_numpy(block).to(self.device))

    def standardize(self, embedding_BD: Tensor) -> Tensor:
        """Embeddings (B, D) with mean 0 and deviation 1 in every dimension; a constant dimension becomes 0."""
        return torch.where(self.scale_D > 0, (embedding_BD - self.mean_D) / self.scale_D, 0.0)

    def sample(self, size: int, seed: int) -> Tensor:
        """Random points of all workers, (M, D) with M at most `size`: equal on all workers."""
        return self._lowest(self._fit_blocks(), size, seed)

    def held_out(self, size: int) -> Tensor:
        """Random points outside of the fit, (M, D) with M at most `size`; empty with `validation_share` 0."""
        first, _ = self.fit_keys
        return self._lowest((_select(block, 0, first) for block in self._blocks), size, 0)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """This worker's points in random batches (size, D), epoch after epoch without end."""
        rng = np.random.default_rng(seed)
        rest = np.empty((0, self.dim), np.float32)
        while True:
            for window in self._windows(rng.permutation(len(self._blocks))):
                rows = np.concatenate([rest, window[rng.permutation(len(window))]])
                whole = len(rows) // size * size
                for start in range(0, whole, size):
                    yield self.standardize(torch.from_numpy(rows[start : start + size]).to(self.device))
                rest = rows[whole:]

    def _windows(self, order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
        window: list[npt.NDArray[np.float32]] = []
        for number in order:
            window.append(self._fit_rows(int(number)))
            if sum(map(len, window)) >= WINDOW_ROWS:
                yield np.concatenate(window)
                window = []
        if window:
            yield np.concatenate(window)

    def _fit_blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        return (self._fit_rows(number) for number in range(len(self._blocks)))

    def _fit_rows(self, number: int, block: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Rows of one block to learn from; stays in memory up to `quantizer.memory_mb_per_worker`."""
        if number in self._kept:
            return self._kept[number]
        rows = _select(self._blocks[number] if block is None else block, *self.fit_keys)
        if rows.nbytes <= self._memory:
            self._memory -= rows.nbytes
            self._kept[number] = rows
        return rows

    def _lowest(self, blocks: Iterator[npt.NDArray[np.float32]], size: int, seed: int) -> Tensor:
        """The `size` rows of all workers with the lowest hashes for this seed."""
        lowest = np.empty((0, self.dim), np.float32)
        for block in blocks:
            rows = np.concatenate([lowest, block])
            lowest = rows[np.argsort(splitmix64(row_hash(rows), seed), kind="stable")[:size]]
        rows = np.concatenate(gather_over_workers([lowest]))
        rows = rows[np.argsort(splitmix64(row_hash(rows), seed), kind="stable")[:size]]
        return self.standardize(torch.from_numpy(rows).to(self.device))

    def _refuse_useless(self, wanted: int) -> None:
        rows, bad = 0, list[int]()
        keys = np.empty(0, np.uint64)
        for number, block in enumerate(self._blocks):
            bad += (rows + np.flatnonzero(~np.isfinite(block).all(axis=1))[:10]).tolist()
            rows += len(block)
            keys = np.unique(np.concatenate([keys, row_hash(self._fit_rows(number, block))]))[: wanted + 1]
        bad_everywhere = [row for worker in gather_over_workers([bad]) for row in worker]
        if bad_everywhere:
            raise DataError(
                f"embeddings hold NaN or infinity; first rows: {', '.join(map(str, bad_everywhere[:10]))}. "
                "Look at their text, or at the column named by catalog.vector"
            )
        distinct = len(np.unique(np.concatenate(gather_over_workers([keys]))))
        items = _sum_of_counts([rows])
        if distinct == 1 and items > 1:
            raise DataError(
                f"all {items:,} embeddings are equal, so no quantizer can separate items; check catalog.text and "
                "embeddings.encoder, or the column named by catalog.vector"
            )
        if distinct < wanted:
            raise DataError(
                f"{items:,} items have {distinct} distinct embeddings to learn from, fewer than the {wanted} "
                f"codewords of a level; lower quantizer.level_sizes to {distinct} or less"
            )


class ExactSum:
    """Sums in 64-bit fixed point, which are equal in any order and on any number of workers.

    Args:
        largest: largest magnitude of a number.
        count: most numbers in a sum.

    >>> ExactSum(largest=1.0, count=3).total(iter([torch.tensor([[0.5], [0.25]]), torch.tensor([[-1.0]])]))
    tensor([-0.2500], dtype=torch.float64)
    """

    def __init__(self, largest: float, count: int) -> None:
        bits = math.ceil(math.log2(max(largest, 1e-300))) + math.ceil(math.log2(max(count, 1)))
        self._unit = 2.0 ** (bits - _FIXED_POINT_BITS)

    def integers(self, number: Tensor) -> Tensor:
        """The numbers in fixed point, int64; same shape."""
        return (number.double() / self._unit).round().long()

    def floats(self, total: Tensor) -> Tensor:
        """A sum of `integers` as float64; same shape."""
        return total.double() * self._unit

    def total(self, blocks: Iterator[Tensor]) -> Tensor:
        """Sum (D,) float64 over the rows of all blocks (B, D) of all workers."""
        parts = [self.integers(block).sum(dim=0) for block in blocks]
        return self.floats(total_over_workers(torch.stack(parts).sum(dim=0)))


def total_over_workers(tensor: Tensor) -> Tensor:
    """Elementwise sum of the tensors of all workers; same shape."""
    return _reduce(tensor, dist.ReduceOp.SUM)


def largest_over_workers(tensor: Tensor) -> Tensor:
    """Elementwise maximum of the tensors of all workers; same shape."""
    return _reduce(tensor, dist.ReduceOp.MAX)


def gather_over_workers(values: list[Any]) -> list[Any]:
    """The lists of all workers, one after the other in the order of ranks; for small values."""
    if not dist.is_initialized():
        return values
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, values)
    return [value for worker in everybody for value in worker]


def _reduce(tensor: Tensor, operation: Any) -> Tensor:
    if dist.is_initialized():
        device = tensor.device
        # NCCL reduces tensors on a GPU only.
        tensor = tensor.cuda() if dist.get_backend() == "nccl" else tensor.clone()
        dist.all_reduce(tensor, operation)
        tensor = tensor.to(device)
    return tensor


def _sum_of_counts(counts: Sequence[int]) -> int:
    return int(total_over_workers(torch.tensor([sum(counts)], dtype=torch.int64)).item())


def _fit_keys(settings: QuantizerSettings, rows: int) -> tuple[float, float]:
    held_out = settings.validation_share * _KEYS
    if settings.sample_size is None or rows <= settings.sample_size:
        return held_out, _KEYS
    return held_out, held_out + settings.sample_size / rows * (_KEYS - held_out)


def _select(block: npt.NDArray[np.float32], first: float, end: float) -> npt.NDArray[np.float32]:
    if first <= 0 and end >= _KEYS:
        return block
    key_B = row_hash(block)
    return block[(key_B >= first) & (key_B < end)]


def _largest(blocks: Iterator[npt.NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.stack([np.abs(block).max(axis=0, initial=0.0) for block in blocks])).amax(0)


def _refuse_huge(largest_D: Tensor) -> None:
    # A square of more than this is infinite in float32.
    huge = torch.nonzero(largest_D > 1e18).flatten()
    if len(huge):
        raise DataError(
            f"dimension {int(huge[0])} of the embeddings holds values too large for float32 (up to "
            f"{largest_D[huge[0]].item():.0e}); look at the column named by catalog.vector"
        )
