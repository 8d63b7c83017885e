"""Embeddings to codewords: `fit` learns a quantizer, `load` reads a published one back.

    quantizer = quantizers.fit(settings, embedding_ND, seed=0)
    codewords_NL = quantizer.encode(embedding_ND)
    quantizers.load(quantizer.to_files())

N items, L levels, C codewords per level, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tiger_ray.config import QuantizerSettings
from tiger_ray.errors import DataError
from tiger_ray.quantizers.base import Quantizer, finite_float32, read_files
from tiger_ray.quantizers.residual_kmeans import ResidualKMeans
from tiger_ray.quantizers.rqvae import ResidualVae

__all__ = ["KINDS", "Quantizer", "fit", "load"]

KINDS: dict[str, type[ResidualKMeans] | type[ResidualVae]] = {
    "residual_kmeans": ResidualKMeans,
    "rqvae": ResidualVae,
}
"""Every kind that `quantizer.kind` can name."""

_logger = logging.getLogger(__name__)


def fit(
    settings: QuantizerSettings,
    embedding_ND: np.ndarray,
    *,
    item_id: Sequence[Any] | None = None,
    seed: int,
    device: str | torch.device = "cpu",
    log: Callable[[str], None] = _logger.info,
) -> Quantizer:
    """Learn a quantizer; of more than `settings.sample_size` items, from a random sample of that size.

    Args:
        settings: section `quantizer`.
        embedding_ND: (N, D) float32.
        item_id: (N,) ids, only to name bad items in an error.
        seed: decides everything random.
        device: where to learn; the quantizer stays there.
        log: takes one line of progress at a time.

    Returns:
        The frozen quantizer.

    Raises:
        DataError: an embedding holds NaN or infinity, or there are too few different ones.
    """
    embedding_ND = finite_float32(embedding_ND, item_id)
    if len(embedding_ND) > settings.sample_size:
        rows = np.random.default_rng(seed).choice(len(embedding_ND), settings.sample_size, replace=False)
        embedding_ND = embedding_ND[np.sort(rows)]
    _require_distinct(embedding_ND, settings)

    embedding = torch.tensor(embedding_ND, device=device)
    variance_D, mean_D = torch.var_mean(embedding, dim=0, correction=0)
    if not variance_D.isfinite().all():
        worst = int(variance_D.isfinite().logical_not().nonzero()[0])
        raise DataError(
            f"dimension {worst} of the embeddings holds values too large for float32 (up to "
            f"{embedding[:, worst].abs().max():.0e}); look at the column named by catalog.vector"
        )
    # Less than this is what rounding makes of a constant.
    varies_D = variance_D.sqrt() > 1e-6 * mean_D.abs()
    scale_D = torch.where(varies_D, variance_D.sqrt(), 0.0)
    point_ND = torch.where(varies_D, (embedding - mean_D) / scale_D, 0.0)

    quantizer = KINDS[settings.kind].fit(settings, point_ND, seed=seed, log=log)
    quantizer.mean_D.copy_(mean_D)
    quantizer.scale_D.copy_(scale_D)
    quantizer.eval()
    codewords_NL = quantizer.encode(embedding_ND)
    for level, size in enumerate(quantizer.level_sizes):
        used = len(np.unique(codewords_NL[:, level]))
        log(f"level {level}: {used} of {size} codewords are used")
        if used < size / 2:
            log(
                f"warning: level {level} has collapsed to {used} of {size} codewords, so more items will "
                "share all of theirs; lower quantizer.codebook_size or change quantizer.kind"
            )
    return quantizer


def load(files: Mapping[str, bytes]) -> Quantizer:
    """The quantizer whose `to_files` gave these files, on the CPU.

    Raises:
        ArtifactError: a file is missing or damaged, or the two do not fit together; the text says where.
    """
    return read_files(files, KINDS)


def _require_distinct(embedding_ND: np.ndarray, settings: QuantizerSettings) -> None:
    rows = np.ascontiguousarray(embedding_ND + np.float32(0))  # -0.0 becomes 0.0: equal rows have equal bytes
    distinct = len(np.unique(rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))))
    if distinct == 1 and len(rows) > 1:
        raise DataError(
            f"all {len(rows)} embeddings are equal, so nothing can tell items apart; check catalog.text and "
            "embeddings.encoder, or the column named by catalog.vector"
        )
    if distinct < settings.codebook_size:
        raise DataError(
            f"{len(rows)} items have {distinct} distinct embeddings, fewer than the {settings.codebook_size} "
            f"codewords of a level; lower quantizer.codebook_size to {distinct} or less"
        )
