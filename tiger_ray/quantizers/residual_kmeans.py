"""Residual k-means: each level clusters what the levels before it left over.

N items, B items in batch, L levels, C codewords per level, D embedding width, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tiger_ray.config import QuantizerSettings
from tiger_ray.quantizers.base import Quantizer

SCORES_PER_CHUNK = 1 << 23
"""Point-codeword scores held at once while fitting: 32 MiB."""


class ResidualKMeans(Quantizer):
    """Level l holds the k-means centers of the residuals that levels 0 to l - 1 leave.

    Source: Lee et al. 2022 (residual quantization); k-means in place of RQ-VAE as in GRID, Ju et al. 2025.
    """

    kind = "residual_kmeans"

    def __init__(self, dim: int, level_sizes: Sequence[int]) -> None:
        super().__init__(dim, level_sizes)
        self.codebooks = nn.ParameterList(nn.Parameter(torch.zeros(size, dim), False) for size in level_sizes)

    @classmethod
    def fit(
        cls, settings: QuantizerSettings, point_ND: Tensor, *, seed: int, log: Callable[[str], None]
    ) -> ResidualKMeans:
        """Codebooks learned from standardized points (N, D) float32, on their device."""
        quantizer = cls(point_ND.shape[1], (settings.codebook_size,) * settings.num_levels).to(
            point_ND.device
        )
        generator = torch.Generator().manual_seed(seed)
        residual_ND = point_ND.clone()
        for level, codebook_CD in enumerate(quantizer.codebooks):
            codebook_CD.copy_(
                kmeans(
                    residual_ND, len(codebook_CD), num_iterations=settings.num_iterations, generator=generator
                )
            )
            residual_ND -= codebook_CD[nearest(residual_ND, codebook_CD)]
            left = (residual_ND.square().mean() / point_ND.square().mean()).item()
            log(f"residual k-means: {left:.1%} of the variance is left after level {level}")
        return quantizer

    def _codewords(self, point_BD: Tensor) -> Tensor:
        return residual_codewords(point_BD, self.codebooks)

    def _points(self, codewords_BL: Tensor) -> Tensor:
        return sum_of_codewords(codewords_BL, self.codebooks)


def residual_codewords(point_BD: Tensor, codebooks: Sequence[Tensor] | nn.ParameterList) -> Tensor:
    """Greedy residual codewords (B, L) int64: at each level the nearest to what is left."""
    codewords = []
    for codebook_CD in codebooks:
        codewords.append(nearest(point_BD, codebook_CD))
        point_BD = point_BD - codebook_CD[codewords[-1]]
    return torch.stack(codewords, dim=1)


def sum_of_codewords(codewords_BL: Tensor, codebooks: Sequence[Tensor] | nn.ParameterList) -> Tensor:
    """Points (B, D) that residual codewords stand for."""
    levels = [codebook_CD[codewords_BL[:, level]] for level, codebook_CD in enumerate(codebooks)]
    return torch.stack(levels).sum(dim=0)


def nearest(point_ND: Tensor, codebook_CD: Tensor) -> Tensor:
    """Index (N,) int64 of the codeword nearest to each point; of equally near ones the first."""
    half_norm_C = codebook_CD.square().sum(dim=1) / 2
    chunk = max(1, SCORES_PER_CHUNK // len(codebook_CD))
    return torch.cat(
        [
            torch.addmm(half_norm_C, x_BD, codebook_CD.T, alpha=-1).argmin(dim=1)
            for x_BD in torch.split(point_ND, chunk)
        ]
    )


def kmeans(
    point_ND: Tensor, num_codewords: int, *, num_iterations: int, generator: torch.Generator
) -> Tensor:
    """k-means centers of the points, by Lloyd's algorithm from greedy k-means++ seeds.

    Args:
        point_ND: (N, D) float32, N at least 1.
        num_codewords: centers C.
        num_iterations: Lloyd steps at most; it stops earlier once no point changes its center.
        generator: on the CPU, whatever the device of the points.

    Returns:
        (C, D) float32. With fewer than C distinct points, some centers repeat.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007, greedy variant of their section 5.
    """
    codebook_CD = _seeds(point_ND, num_codewords, generator)
    codeword_N = nearest(point_ND, codebook_CD)
    for _ in range(num_iterations):
        codebook_CD = _means(point_ND, codeword_N, num_codewords)
        before_N, codeword_N = codeword_N, nearest(point_ND, codebook_CD)
        if torch.equal(before_N, codeword_N):
            break
    return codebook_CD


def _seeds(point_ND: Tensor, num_codewords: int, generator: torch.Generator) -> Tensor:
    # Every seed costs a pass over the points: some 8 of them per center are enough to place the seeds well.
    sample_size = max(8 * num_codewords, 8192)
    if len(point_ND) > sample_size:
        rows = torch.randperm(len(point_ND), generator=generator)[:sample_size]
        point_ND = point_ND[rows.to(point_ND.device)]
    norm_N = point_ND.square().sum(dim=1)
    trials = 2 + int(math.log(num_codewords))
    seeds = torch.randint(len(point_ND), (1,), generator=generator)
    chosen = [point_ND[seeds.to(point_ND.device)]]
    distance_N = (point_ND - chosen[0]).square().sum(dim=1)
    for _ in range(num_codewords - 1):
        mass_N = distance_N.double().cumsum(dim=0)
        draw_T = torch.rand(trials, generator=generator, dtype=torch.float64).to(mass_N.device) * mass_N[-1]
        row_T = torch.searchsorted(mass_N, draw_T, right=True).clamp(max=len(point_ND) - 1)
        candidate_TD = point_ND[row_T]
        squared_NT = norm_N[:, None] - 2 * (point_ND @ candidate_TD.T) + norm_N[row_T]
        squared_NT = torch.minimum(squared_NT.clamp(min=0), distance_N[:, None])
        best = squared_NT.sum(dim=0).argmin()
        distance_N = squared_NT[:, best]
        distance_N[row_T[best]] = 0  # rounding must not leave a chosen point some mass
        chosen.append(candidate_TD[best][None])
    return torch.cat(chosen)


def _means(point_ND: Tensor, codeword_N: Tensor, num_codewords: int) -> Tensor:
    # Sums in float64, so that the order in which a GPU adds does not show in the float32 means.
    sum_CD = torch.zeros(num_codewords, point_ND.shape[1], dtype=torch.float64, device=point_ND.device)
    for rows_BD, codeword_B in zip(
        torch.split(point_ND, 1 << 14), torch.split(codeword_N, 1 << 14), strict=True
    ):
        sum_CD.index_add_(0, codeword_B, rows_BD.double())
    count_C = torch.bincount(codeword_N, minlength=num_codewords)
    mean_CD = (sum_CD / count_C.clamp(min=1)[:, None]).float()

    empty = torch.nonzero(count_C == 0).flatten().tolist()
    if empty:
        distance_N = (point_ND - mean_CD[codeword_N]).square().sum(dim=1)
        for codeword in empty:
            farthest = distance_N.argmax()
            mean_CD[codeword] = point_ND[farthest]
            distance_N = torch.minimum(distance_N, (point_ND - point_ND[farthest]).square().sum(dim=1))
    return mean_CD
