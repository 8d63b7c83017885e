"""Quantizers without training: the paper's controls for the part of content, and of RQ-VAE, in the accuracy.

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
    """Random hyperplanes: each bit of a codeword is the side of one hyperplane on which the embedding lies.

    Source: TIGER, Rajput et al. 2023, section 4.2 and appendix (h = 8 hyperplanes make 256 codewords). Unlike
    the paper, the hyperplanes go through the mean of the embeddings and not through the origin: all text
    embeddings lie on one side of most planes through the origin.

    >>> from tiger_ray.ids import quantizers
    >>> embedding_ND = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    >>> settings = QuantizerSettings(kind="lsh", level_sizes=(4, 4))
    >>> int(quantizers.fit(settings, [embedding_ND], seed=0).encode(embedding_ND).max())
    3
    """

    kind = "lsh"

    def __init__(self, dim: int, level_sizes: Sequence[int]) -> None:
        super().__init__(dim, level_sizes)
        self.bits = tuple(size.bit_length() - 1 for size in level_sizes)
        self.register_buffer("hyperplanes_HD", torch.zeros(sum(self.bits), dim))
        self.hyperplanes_HD: Tensor

    @classmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> Lsh:
        """Draw the hyperplanes."""
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
    """Codewords without regard to content: hashes of the item's id.

    Args:
        dim: embedding width D.
        level_sizes: codewords of each level (L,).
        seed: of the hash.

    Source: the random IDs of TIGER, Rajput et al. 2023, section 4.2. Ours: a hash instead of random numbers,
    so that an item's codewords do not depend on the night of its registration.

    >>> import pyarrow as pa
    >>> codewords_NL = Random(8, (4, 4), seed=0).encode(np.zeros((2, 8), np.float32), pa.array(["a", "b"]))
    >>> codewords_NL.shape
    (2, 2)
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
        """Build the quantizer, without learning."""
        return cls(points.dim, settings.level_sizes, seed)

    def encode(
        self, embedding_ND: npt.NDArray[np.float32], item_id: Ids | None = None
    ) -> npt.NDArray[np.int16]:
        """Codewords as in `Quantizer.encode`; `item_id` is required."""
        assert item_id is not None, "random codewords follow from the item's id"
        key_N = splitmix64(stable_hash(item_id), self.seed)
        # A hash modulo a size far below 2**64 is as good as uniform.
        levels = [splitmix64(key_N, level) % np.uint64(size) for level, size in enumerate(self.level_sizes)]
        return np.stack(levels, axis=1).astype(np.int16)

    def _codewords(self, point_BD: Tensor) -> Tensor:
        raise AssertionError("random codewords follow from the item's id, not from its embedding")


class Flat(Quantizer):
    """No codewords: the disambiguator counts all items, so each item is one token.

    Source: the atomic item ids of conventional sequence models, as a control.

    >>> Flat(8, ()).encode(np.zeros((2, 8), np.float32)).shape
    (2, 0)
    """

    kind = "flat"

    @classmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> Flat:
        """Build the quantizer, without learning."""
        return cls(points.dim, ())

    def _codewords(self, point_BD: Tensor) -> Tensor:
        return point_BD[:, :0].long()
