"""Residual k-means: each level clusters the residuals of the levels before it.

Clustering uses the first principal components: in hundreds of dimensions, a few outlying items would take most
codewords of the later levels.

Every worker holds a share of the points. A Lloyd step is one pass over the points: sums and counts per
codeword, added up over the workers. The sums are exact, so the codebooks do not depend on the workers' shares.

N items, B items in block, M items in sample, L levels, C codewords per level, D embedding width, E latent
width, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiger_ray.ids.quantizers.base import Log, Quantizer
from tiger_ray.ids.quantizers.points import (
    ExactSum,
    Points,
    gather_over_workers,
    largest_over_workers,
    total_over_workers,
)
from tiger_ray.settings.quantizer import QuantizerSettings

SCORES_PER_CHUNK = 1 << 23
"""Scores of point and codeword in memory together during a fit: 32 MiB."""


_FAR = 16.0
"""Clip coordinates to this many deviations when the principal axes are computed."""


MIN_SEED_POINTS = 1 << 14
"""Least number of points that k-means++ chooses from; seeding passes over them once per codeword."""


class ResidualKMeans(Quantizer):
    """Level l holds the k-means centers of the residuals of levels 0 to l - 1.

    Args:
        dim: embedding width D.
        level_sizes: codewords of each level (L,).
        latent_dim: number of principal components E; with E = D, the dimensions stay as they are.

    Source: Lee et al. 2022 (residual quantization); k-means in place of RQ-VAE as in GRID, Ju et al. 2025;
    the principal components are ours.

    >>> from tiger_ray.ids import quantizers
    >>> embedding_ND = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    >>> settings = QuantizerSettings(kind="residual_kmeans", level_sizes=(4, 4))
    >>> quantizers.fit(settings, [embedding_ND], seed=0).encode(embedding_ND).shape
    (200, 2)
    """

    kind = "residual_kmeans"
    axes_DE: Tensor

    def __init__(self, dim: int, level_sizes: Sequence[int], latent_dim: int) -> None:
        super().__init__(dim, level_sizes)
        self.latent_dim = latent_dim
        self.register_buffer("axes_DE", torch.eye(dim, latent_dim))
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.zeros(size, latent_dim), False) for size in level_sizes
        )

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments, ready for JSON."""
        return super().arguments() | {"latent_dim": self.latent_dim}

    @classmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> ResidualKMeans:
        """Learn the codebooks, level by level."""
        latent_dim = min(settings.latent_dim, points.dim)
        quantizer = cls(points.dim, settings.level_sizes, latent_dim).to(points.device)
        if latent_dim < points.dim:
            quantizer.axes_DE.copy_(principal_axes(points, latent_dim))
        axes_DE = quantizer.axes_DE
        sample_ME = points.sample(max(MIN_SEED_POINTS, 8 * max(settings.level_sizes)), seed) @ axes_DE
        generator = torch.Generator().manual_seed(seed)
        for level in range(len(settings.level_sizes)):
            earlier = quantizer.codebooks[:level]

            def residuals(earlier: nn.ParameterList = earlier) -> Iterator[Tensor]:
                return (residual(point_BD @ axes_DE, earlier) for point_BD in points)

            codebook_CE = quantizer.codebooks[level]
            codebook_CE.copy_(
                kmeans(
                    residuals,
                    residual(sample_ME, earlier),
                    len(codebook_CE),
                    num_iterations=settings.num_iterations,
                    generator=generator,
                )
            )
            left = _variance_left(points, axes_DE, quantizer.codebooks[: level + 1])
            log(f"residual k-means: {left:.1%} of the variance is left after level {level}")
        return quantizer

    def _codewords(self, point_BD: Tensor) -> Tensor:
        return residual_codewords(point_BD @ self.axes_DE, self.codebooks)

    def _points(self, codewords_BL: Tensor) -> Tensor:
        return sum_of_codewords(codewords_BL, self.codebooks) @ self.axes_DE.T


def principal_axes(points: Points, count: int) -> Tensor:
    """The first E = `count` principal axes of the points of all workers: orthonormal columns, (D, E) float32.

    The points are rounded to a grid that is coarse enough to make all sums of products exact in float64, so
    the axes do not depend on the workers' shares.
    """
    bits = (52 - 2 * math.ceil(math.log2(_FAR)) - math.ceil(math.log2(points.count))) // 2
    grid = 2.0**-bits
    square_DD = torch.zeros(points.dim, points.dim, dtype=torch.float64, device=points.device)
    for point_BD in points:
        rounded_BD = (point_BD.double().clamp(-_FAR, _FAR) / grid).round() * grid
        square_DD += rounded_BD.T @ rounded_BD
    # The CPU gives the same result on every machine of a cluster.
    vector_DD = torch.linalg.eigh(total_over_workers(square_DD).cpu())[1]
    axes_DE = vector_DD.flip(1)[:, :count]
    # Fix the sign of each axis, which eigh leaves open.
    largest_E = axes_DE.abs().argmax(dim=0)
    return (axes_DE * axes_DE.gather(0, largest_E[None]).sign()).float().to(points.device)


def residual_codewords(point_BD: Tensor, codebooks: Iterable[Tensor]) -> Tensor:
    """Greedy residual codewords (B, L) int64: each level takes the codeword nearest to the residual."""
    codewords = []
    for codebook_CD in codebooks:
        codewords.append(nearest(point_BD, codebook_CD))
        point_BD = point_BD - codebook_CD[codewords[-1]]
    return torch.stack(codewords, dim=1)


def residual(point_BD: Tensor, codebooks: Iterable[Tensor]) -> Tensor:
    """Points minus the nearest codeword of each codebook in turn, (B, D)."""
    for codebook_CD in codebooks:
        point_BD = point_BD - codebook_CD[nearest(point_BD, codebook_CD)]
    return point_BD


def sum_of_codewords(codewords_BL: Tensor, codebooks: Iterable[Tensor]) -> Tensor:
    """Points (B, D) as the sums of their codewords."""
    levels = [codebook_CD[codewords_BL[:, level]] for level, codebook_CD in enumerate(codebooks)]
    return torch.stack(levels).sum(dim=0)


def nearest(point_ND: Tensor, codebook_CD: Tensor) -> Tensor:
    """Index of the codeword nearest to each point, (N,) int64; the first of equally near codewords."""
    half_norm_C = codebook_CD.square().sum(dim=1) / 2
    chunk = max(1, SCORES_PER_CHUNK // len(codebook_CD))
    return torch.cat(
        [
            torch.addmm(half_norm_C, x_BD, codebook_CD.T, alpha=-1).argmin(dim=1)
            for x_BD in torch.split(point_ND, chunk)
        ]
    )


def kmeans(
    blocks: Callable[[], Iterable[Tensor]],
    sample_MD: Tensor,
    num_codewords: int,
    *,
    num_iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """k-means centers by Lloyd's algorithm from greedy k-means++ seeds, equal on every worker.

    Args:
        blocks: called once per pass; gives this worker's points, (B, D) float32 at a time.
        sample_MD: candidates for the seeds, (M, D) with M at least 1, equal on every worker.
        num_codewords: number of centers C.
        num_iterations: most Lloyd steps; the loop ends earlier if no center moves.
        generator: of the CPU, also for points on a GPU; its state must be equal on every worker.

    Returns:
        (C, D) float32. With fewer than C distinct points, some centers repeat.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007, greedy variant of their section 5.
    """
    codebook_CD = _seeds(sample_MD, num_codewords, generator)
    local = torch.tensor([[len(x), x.abs().max() if len(x) else 0.0] for x in blocks()], dtype=torch.float64)
    count = int(total_over_workers(local[:, 0].sum()).item())
    sums = ExactSum(largest_over_workers(local[:, 1].max()).item(), count)
    for _ in range(num_iterations):
        before_CD, codebook_CD = codebook_CD, _lloyd_step(blocks(), codebook_CD, sums)
        if torch.equal(before_CD, codebook_CD):
            break
    return codebook_CD


def _seeds(point_MD: Tensor, num_codewords: int, generator: torch.Generator) -> Tensor:
    norm_M = point_MD.square().sum(dim=1)
    trials = 2 + int(math.log(num_codewords))
    seeds = torch.randint(len(point_MD), (1,), generator=generator)
    chosen = [point_MD[seeds.to(point_MD.device)]]
    distance_M = (point_MD - chosen[0]).square().sum(dim=1)
    for _ in range(num_codewords - 1):
        mass_M = distance_M.double().cumsum(dim=0)
        draw_T = torch.rand(trials, generator=generator, dtype=torch.float64).to(mass_M.device) * mass_M[-1]
        row_T = torch.searchsorted(mass_M, draw_T, right=True).clamp(max=len(point_MD) - 1)
        candidate_TD = point_MD[row_T]
        squared_MT = norm_M[:, None] - 2 * (point_MD @ candidate_TD.T) + norm_M[row_T]
        squared_MT = torch.minimum(squared_MT.clamp(min=0), distance_M[:, None])
        best = squared_MT.sum(dim=0).argmin()
        distance_M = squared_MT[:, best]
        distance_M[row_T[best]] = 0  # rounding may give a chosen point a distance from itself
        chosen.append(candidate_TD[best][None])
    return torch.cat(chosen)


def _lloyd_step(blocks: Iterable[Tensor], codebook_CD: Tensor, sums: ExactSum) -> Tensor:
    """Means of the points nearest to each center; a center without points moves to the farthest point."""
    num_codewords = len(codebook_CD)
    sum_CD = torch.zeros_like(codebook_CD, dtype=torch.int64)
    count_C = torch.zeros(num_codewords, dtype=torch.int64, device=codebook_CD.device)
    far_MD, far_distance_M = codebook_CD[:0], codebook_CD[:0, 0]
    for point_BD in blocks:
        codeword_B = nearest(point_BD, codebook_CD)
        sum_CD.index_add_(0, codeword_B, sums.integers(point_BD))
        count_C += torch.bincount(codeword_B, minlength=num_codewords)
        distance_B = (point_BD - codebook_CD[codeword_B]).square().sum(dim=1)
        far_MD, far_distance_M = _farthest(
            torch.cat([far_MD, point_BD]), torch.cat([far_distance_M, distance_B]), num_codewords
        )
    sum_CD, count_C = total_over_workers(sum_CD), total_over_workers(count_C)
    mean_CD = (sums.floats(sum_CD) / count_C.clamp(min=1)[:, None]).float()
    empty = torch.nonzero(count_C == 0).flatten().tolist()
    if empty:
        everybody = [torch.from_numpy(part) for part in gather_over_workers([far_MD.cpu().numpy()])]
        candidate_MD = torch.cat(everybody).to(codebook_CD.device)
        distance_M = (candidate_MD - codebook_CD[nearest(candidate_MD, codebook_CD)]).square().sum(dim=1)
        for codeword in empty:
            # Equal points have equal distances, so their order over the workers does not matter.
            mean_CD[codeword] = candidate_MD[distance_M.argmax()]
            distance_M = torch.minimum(distance_M, (candidate_MD - mean_CD[codeword]).square().sum(dim=1))
    return mean_CD


def _farthest(point_MD: Tensor, distance_M: Tensor, count: int) -> tuple[Tensor, Tensor]:
    distance_M, rows = torch.topk(distance_M, min(count, len(distance_M)))
    return point_MD[rows], distance_M


def _variance_left(points: Points, axes_DE: Tensor, codebooks: Sequence[Tensor] | nn.ParameterList) -> float:
    """Variance of the residuals as a share of the variance of the principal components."""
    sums = np.zeros(2)
    for point_BD in points:
        latent_BE = point_BD @ axes_DE
        left_BE = residual(latent_BE, codebooks)
        sums += [left_BE.double().square().sum().item(), latent_BE.double().square().sum().item()]
    left, whole = total_over_workers(torch.from_numpy(sums)).tolist()
    return left / max(whole, 1e-300)
