"""Embeddings to codewords: `fit` learns a quantizer, `load` reads the files of a published quantizer.

    >>> embedding_ND = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    >>> quantizer = fit(QuantizerSettings(level_sizes=(4, 4)), [embedding_ND], seed=0)
    >>> codewords_NL = quantizer.encode(embedding_ND)
    >>> codewords_NL.shape, bool((load(quantizer.to_files()).encode(embedding_ND) == codewords_NL).all())
    ((200, 2), True)

N items, B items in block, L levels, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger_ray.ids.quantizers.base import Log, Quantizer, read_files
from tiger_ray.ids.quantizers.controls import Flat, Lsh, Random
from tiger_ray.ids.quantizers.points import Points
from tiger_ray.ids.quantizers.residual_kmeans import ResidualKMeans
from tiger_ray.ids.quantizers.rqvae import ResidualVae
from tiger_ray.settings.quantizer import QuantizerSettings

__all__ = ["KINDS", "Quantizer", "fit", "load"]


KINDS: dict[str, type[Quantizer]] = {
    kind.kind: kind for kind in (ResidualVae, ResidualKMeans, Lsh, Random, Flat)
}
"""Value of `quantizer.kind` -> class."""


_logger = logging.getLogger(__name__)


def fit(
    settings: QuantizerSettings,
    blocks: Sequence[npt.NDArray[np.float32]],
    *,
    seed: int,
    rows: int | None = None,
    device: Any = "cpu",
    log: Log = _logger.info,
) -> Quantizer:
    """Learn a quantizer, on one worker or on all workers of `torch.distributed` together.

    Args:
        settings: section `quantizer`.
        blocks: this worker's share of the embeddings, at least one array (B, D) float32. The fit reads the
            blocks many times; a sequence may load each block from storage on access.
        seed: of all random choices.
        rows: number of items of all workers; None to count them in one more pass.
        device: device of the fit and of the quantizer.
        log: called with one line of progress at a time.

    Returns:
        The frozen quantizer, equal on all workers.

    Raises:
        DataError: an embedding holds NaN or infinity, or too few embeddings are distinct.
    """
    points = Points(blocks, settings, device, rows)
    quantizer = KINDS[settings.kind].fit(settings, points, seed=seed, log=log).to(points.device)
    quantizer.mean_D.copy_(points.mean_D)
    quantizer.scale_D.copy_(points.scale_D)
    quantizer.fit_keys, quantizer.version = points.fit_keys, settings.version
    return quantizer.requires_grad_(False).eval()


def load(files: Mapping[str, bytes]) -> Quantizer:
    """The quantizer that `Quantizer.to_files` wrote, on the CPU.

    Raises:
        ArtifactError: a file is missing or damaged, or weights and description disagree; the message says where.
    """
    return read_files(files, KINDS)
