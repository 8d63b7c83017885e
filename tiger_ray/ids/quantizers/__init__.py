"""Embeddings to codewords: `fit` learns a quantizer, `load` reads a published one back.

    quantizer = quantizers.fit(settings, [embedding_ND], seed=0)
    codewords_NL = quantizer.encode(embedding_ND)
    quantizers.load(quantizer.to_files())

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
"""Every kind that `quantizer.kind` can name."""


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
    """Learn a quantizer, on this worker alone or together with the others of `torch.distributed`.

    Args:
        settings: section `quantizer`.
        blocks: (B, D) float32 each, together this worker's share of the embeddings, at least one; it is passed
            over many times, and may read from storage each time.
        seed: decides everything random.
        rows: items of all workers, if known; otherwise one more pass counts them.
        device: where to learn; the quantizer stays there.
        log: takes one line of progress at a time.

    Returns:
        The frozen quantizer, equal on all workers.

    Raises:
        DataError: an embedding holds NaN or infinity, or there are too few different ones.
    """
    points = Points(blocks, settings, device, rows)
    quantizer = KINDS[settings.kind].fit(settings, points, seed=seed, log=log).to(points.device)
    quantizer.mean_D.copy_(points.mean_D)
    quantizer.scale_D.copy_(points.scale_D)
    quantizer.fit_keys, quantizer.version = points.fit_keys, settings.version
    return quantizer.requires_grad_(False).eval()


def load(files: Mapping[str, bytes]) -> Quantizer:
    """The quantizer whose `to_files` gave these files, on the CPU.

    Raises:
        ArtifactError: a file is missing or damaged, or the two do not fit together; the text says where.
    """
    return read_files(files, KINDS)
