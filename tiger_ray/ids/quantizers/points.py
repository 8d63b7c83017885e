"""What one worker of a fit sees of the embeddings: its share, in blocks, and sums over all workers.

What is learned must not depend on how many workers there are, nor on who holds which item. So every choice
of items goes by a hash of the embedding itself, and sums are taken in fixed point, where the order of
adding does not show. Outside of `torch.distributed` everything here is about one worker that has it all.

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
"""Rows that are shuffled together into random batches."""


LEARNING_KINDS = ("rqvae", "residual_kmeans")
"""Kinds that need at least as many different items as codewords."""


_FIXED_POINT_BITS = 62


_KEYS = 2.0**64


class Points:
    """Standardized embeddings of this worker: mean 0 and deviation 1 in every dimension, over all workers.

    Args:
        blocks: (B, D) float32 arrays, together this worker's share; may be read from storage on each pass.
        settings: `sample_size` and `validation_share` decide which items are learned from.
        device: where the points are wanted.
        rows: items of all workers, if that is known; otherwise the blocks are read once to count them.

    Raises:
        DataError: an embedding holds NaN or infinity, or there are too few different ones.
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
        """First key and end of the keys of items that are learned from; the items below are held out."""
        self._refuse_useless(max(settings.level_sizes) if settings.kind in LEARNING_KINDS else 1)
        counts = gathered([sum(len(rows) for rows in self._fitted())])
        if min(counts) == 0:
            # On every worker, or the others would wait for the one that stops.
            raise DataError(
                f"of {len(counts)} workers {counts.count(0)} have no item to learn from ({sum(counts):,} in all); "
                "lower quantizer.num_workers"
            )
        self.count = sum(counts)
        """Items to learn from, of all workers."""
        largest_D = largest_over_workers(_largest(self._fitted()))
        _refuse_huge(largest_D)
        self.dim = len(largest_D)
        """Embedding width D."""
        sums = ExactSum(largest_D.max().item(), self.count)
        mean_D = sums.total(torch.from_numpy(block).double() for block in self._fitted()) / self.count
        squares = ExactSum(4 * largest_D.max().item() ** 2, self.count)
        variance_D = (
            squares.total((torch.from_numpy(block).double() - mean_D).square() for block in self._fitted())
            / self.count
        )
        # Less than this is what rounding makes of a constant.
        varies_D = variance_D.sqrt() > 1e-6 * mean_D.abs()
        self.mean_D = mean_D.float().to(self.device)
        self.scale_D = torch.where(varies_D, variance_D.sqrt(), 0.0).float().to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        """This worker's points, (B, D) at a time, in the same order on each pass."""
        for block in self._fitted():
            yield self.standardize(torch.from_numpy(block).to(self.device))

    def standardize(self, embedding_BD: Tensor) -> Tensor:
        """Mean 0 and deviation 1 in every dimension; one that is constant becomes 0."""
        return torch.where(self.scale_D > 0, (embedding_BD - self.mean_D) / self.scale_D, 0.0)

    def sample(self, size: int, seed: int) -> Tensor:
        """Random points of all workers, the same ones in the same order on each: (M, D), M at most `size`."""
        return self._lowest(self._fitted(), size, seed)

    def held_out(self, size: int) -> Tensor:
        """Points that nothing is learned from, as `sample`; empty with `validation_share` 0."""
        first, _ = self.fit_keys
        return self._lowest((_select(block, 0, first) for block in self._blocks), size, 0)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """This worker's points in random batches of (size, D), epoch after epoch without end."""
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

    def _fitted(self) -> Iterator[npt.NDArray[np.float32]]:
        return (self._fit_rows(number) for number in range(len(self._blocks)))

    def _fit_rows(self, number: int, block: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Rows of one block that are learned from; kept, as long as there is room."""
        if number in self._kept:
            return self._kept[number]
        rows = _select(self._blocks[number] if block is None else block, *self.fit_keys)
        if rows.nbytes <= self._memory:
            self._memory -= rows.nbytes
            self._kept[number] = rows
        return rows

    def _lowest(self, blocks: Iterator[npt.NDArray[np.float32]], size: int, seed: int) -> Tensor:
        """The `size` rows of all workers whose keys, mixed with the seed, are lowest."""
        lowest = np.empty((0, self.dim), np.float32)
        for block in blocks:
            rows = np.concatenate([lowest, block])
            lowest = rows[np.argsort(splitmix64(row_hash(rows), seed), kind="stable")[:size]]
        rows = np.concatenate(gathered([lowest]))
        rows = rows[np.argsort(splitmix64(row_hash(rows), seed), kind="stable")[:size]]
        return self.standardize(torch.from_numpy(rows).to(self.device))

    def _refuse_useless(self, wanted: int) -> None:
        rows, bad = 0, list[int]()
        keys = np.empty(0, np.uint64)
        for number, block in enumerate(self._blocks):
            bad += (rows + np.flatnonzero(~np.isfinite(block).all(axis=1))[:10]).tolist()
            rows += len(block)
            keys = np.unique(np.concatenate([keys, row_hash(self._fit_rows(number, block))]))[: wanted + 1]
        bad_everywhere = [row for worker in gathered([bad]) for row in worker]
        if bad_everywhere:
            raise DataError(
                f"embeddings hold NaN or infinity; first rows: {', '.join(map(str, bad_everywhere[:10]))}. "
                "Look at their text, or at the column named by catalog.vector"
            )
        distinct = len(np.unique(np.concatenate(gathered([keys]))))
        items = _sum_of_counts([rows])
        if distinct == 1 and items > 1:
            raise DataError(
                f"all {items:,} embeddings are equal, so nothing can tell items apart; check catalog.text and "
                "embeddings.encoder, or the column named by catalog.vector"
            )
        if distinct < wanted:
            raise DataError(
                f"{items:,} items have {distinct} distinct embeddings to learn from, fewer than the {wanted} "
                f"codewords of a level; lower quantizer.level_sizes to {distinct} or less"
            )


class ExactSum:
    """Sums that are the same in any order and on any number of workers: in 64-bit fixed point.

    Args:
        largest: no number is larger in magnitude.
        count: no more numbers than this are added up.
    """

    def __init__(self, largest: float, count: int) -> None:
        bits = math.ceil(math.log2(max(largest, 1e-300))) + math.ceil(math.log2(max(count, 1)))
        self._unit = 2.0 ** (bits - _FIXED_POINT_BITS)

    def integers(self, number: Tensor) -> Tensor:
        """The numbers as int64, ready to be added; same shape."""
        return (number.double() / self._unit).round().long()

    def floats(self, total: Tensor) -> Tensor:
        """A sum of such integers as float64; same shape."""
        return total.double() * self._unit

    def total(self, blocks: Iterator[Tensor]) -> Tensor:
        """Sum (D,) float64 over the rows of all blocks (B, D) of all workers."""
        parts = [self.integers(block).sum(dim=0) for block in blocks]
        return self.floats(total_over_workers(torch.stack(parts).sum(dim=0)))


def total_over_workers(tensor: Tensor) -> Tensor:
    """Sum of the tensors that all workers give; same shape."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def largest_over_workers(tensor: Tensor) -> Tensor:
    """Elementwise largest of the tensors that all workers give; same shape."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def gathered(values: list[Any]) -> list[Any]:
    """The small values of all workers, in the order of their ranks."""
    if not dist.is_initialized():
        return values
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, values)
    return [value for worker in everybody for value in worker]


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    if dist.is_initialized():
        device = tensor.device
        # NCCL reduces on the GPU only.
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
