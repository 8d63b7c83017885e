"""Quantizers without training, the paper's controls: what do Semantic IDs owe to the content, and to RQ-VAE?

N items, B items in batch, L levels, D embedding width, H hyperplanes of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.core.hashing import splitmix64, stable_hash
from tiger_ray.ids.quantizers.base import Ids, Log, Quantizer
from tiger_ray.ids.quantizers.points import Points
from tiger_ray.settings.quantizer import QuantizerSettings


class Lsh(Quantizer):
    """Random hyperplanes: each bit of a codeword says on which side of one the embedding lies.

    Source: TIGER, Rajput et al. 2023, section 4.2 and appendix (h = 8 hyperplanes make 256 codewords). Unlike
    the paper, the hyperplanes go through the mean of the embeddings and not through the origin: all text
    embeddings lie on one side of most planes through the origin.
    """

    kind = "lsh"

    def __init__(self, dim: int, level_sizes: Sequence[int]) -> None:
        super().__init__(dim, level_sizes)
        self.bits = tuple(size.bit_length() - 1 for size in level_sizes)
        self.register_buffer("hyperplanes_HD", torch.zeros(sum(self.bits), dim))
        self.hyperplanes_HD: Tensor

    @classmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> Lsh:
        """Hyperplanes drawn from the seed."""
        quantizer = cls(points.dim, settings.level_sizes).to(points.device)
        generator = torch.Generator().manual_seed(seed)
        planes_HD = torch.randn(quantizer.hyperplanes_HD.shape, generator=generator)
        quantizer.hyperplanes_HD.copy_(planes_HD)
        return quantizer

    def _codewords(self, point_BD: Tensor) -> Tensor:
        side_BH = (point_BD @ self.hyperplanes_HD.T > 0).long()
        levels = [
            (side_Bh << torch.arange(side_Bh.shape[1], device=side_Bh.device)).sum(dim=1)
            for side_Bh in torch.split(side_BH, list(self.bits), dim=1)
        ]
        return torch.stack(levels, dim=1)


class Random(Quantizer):
    """Codewords that know nothing of the content: a hash of the item's id.

    Source: the random IDs of TIGER, Rajput et al. 2023, section 4.2; a hash, so that an item's codewords do
    not depend on when it came.
    """

    kind = "random"

    def __init__(self, dim: int, level_sizes: Sequence[int], seed: int) -> None:
        super().__init__(dim, level_sizes)
        self.seed = seed

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments, ready for JSON."""
        return super().arguments() | {"seed": self.seed}

    @classmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> Random:
        """Nothing is learned."""
        return cls(points.dim, settings.level_sizes, seed)

    def encode(
        self, embedding_ND: npt.NDArray[np.float32], item_id: Ids | None = None
    ) -> npt.NDArray[np.int16]:
        """As `Quantizer.encode`; the ids are required."""
        assert item_id is not None, "random codewords follow from the item's id"
        key_N = splitmix64(stable_hash(item_id), self.seed)
        # A hash modulo a size far below 2**64 is as good as uniform.
        levels = [splitmix64(key_N, level) % np.uint64(size) for level, size in enumerate(self.level_sizes)]
        return np.stack(levels, axis=1).astype(np.int16)

    def _codewords(self, point_BD: Tensor) -> Tensor:
        raise AssertionError("random codewords follow from the item's id, not from its embedding")


class Flat(Quantizer):
    """No codewords at all: the disambiguator alone counts the items, so that each item is one token.

    Source: the atomic item ids of conventional sequence models, as a control.
    """

    kind = "flat"

    @classmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> Flat:
        """Nothing is learned."""
        return cls(points.dim, ())

    def _codewords(self, point_BD: Tensor) -> Tensor:
        return point_BD[:, :0].long()
