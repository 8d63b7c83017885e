"""RQ-VAE: an autoencoder whose latent vector is a sum of one codeword per level.

B items in batch, M items in sample, L levels, C codewords per level, D embedding width, E latent width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tiger_ray.ids.quantizers.base import Log, Quantizer
from tiger_ray.ids.quantizers.points import Points, total_over_workers
from tiger_ray.ids.quantizers.residual_kmeans import (
    kmeans,
    nearest,
    residual,
    residual_codewords,
    sum_of_codewords,
)
from tiger_ray.settings.quantizer import QuantizerSettings

CHECK_EVERY_EPOCHS = 10
"""Epochs between two measurements on held-out items, and between two moves of unused codewords."""


START_POINTS = 1 << 14
"""Number of items for the first codebooks, for moving unused codewords, and of held-out items."""


class ResidualVae(Quantizer):
    """Encoder, one codebook per level, decoder.

    Args:
        dim: embedding width D.
        level_sizes: codewords of each level (L,).
        latent_dim: latent width E.
        hidden_dims: widths of the encoder's hidden layers, mirrored in the decoder.

    Source: TIGER, Rajput et al. 2023, section 3.1; Lee et al. 2022. Unlike the paper: standardized input,
    AdamW in place of Adagrad, unused codewords moved to residuals of random items, and an end of training
    when the reconstruction of held-out items no longer improves.

    >>> import numpy as np
    >>> from tiger_ray.ids import quantizers
    >>> embedding_ND = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    >>> settings = QuantizerSettings(kind="rqvae", level_sizes=(4, 4), hidden_dims=(8,), num_epochs=2)
    >>> quantizers.fit(settings, [embedding_ND], seed=0).encode(embedding_ND).shape
    (200, 2)
    """

    kind = "rqvae"

    def __init__(
        self, dim: int, level_sizes: Sequence[int], latent_dim: int, hidden_dims: Sequence[int]
    ) -> None:
        super().__init__(dim, level_sizes)
        self.latent_dim = latent_dim
        self.hidden_dims = tuple(hidden_dims)
        widths = [dim, *hidden_dims, latent_dim]
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        self.codebooks = nn.ParameterList(nn.Parameter(torch.zeros(size, latent_dim)) for size in level_sizes)

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments, ready for JSON."""
        return super().arguments() | {"latent_dim": self.latent_dim, "hidden_dims": list(self.hidden_dims)}

    @classmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> ResidualVae:
        """Train encoder, codebooks and decoder on the points of all workers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(points.dim, settings.level_sizes, settings.latent_dim, settings.hidden_dims)
        model.to(points.device)
        sample_MD = points.sample(START_POINTS, seed)
        held_out_MD = points.held_out(START_POINTS)
        generator = torch.Generator().manual_seed(seed)
        model.start_codebooks(sample_MD, generator)
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        network = DistributedDataParallel(model) if workers > 1 else model
        optimizer = make_optimizer(model, settings)
        schedule = ReduceLROnPlateau(optimizer, factor=0.3, patience=2, threshold=1e-3)
        batches = points.batches(max(1, settings.batch_size // workers), seed * workers + rank)
        steps_per_epoch = math.ceil(points.count / settings.batch_size)
        best_loss, best_state = math.inf, copy.deepcopy(model.state_dict())
        for epoch in range(1, settings.num_epochs + 1):
            total = torch.zeros((), device=points.device)
            for _ in range(steps_per_epoch):
                loss = network(next(batches), settings.commitment_weight)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
            if epoch % CHECK_EVERY_EPOCHS and epoch < settings.num_epochs:
                continue
            train_loss = total_over_workers(total).item() / workers / steps_per_epoch
            error = model.reconstruction_error(held_out_MD if len(held_out_MD) else sample_MD)
            learning_rate = optimizer.param_groups[0]["lr"]
            log(
                f"rqvae: epoch {epoch} of at most {settings.num_epochs}, loss {train_loss:.4f}, "
                f"reconstruction error of held-out items {error:.4f}, learning rate {learning_rate:.0e}"
            )
            if error < best_loss:
                best_loss, best_state = error, copy.deepcopy(model.state_dict())
            schedule.step(error)
            if learning_rate == settings.learning_rate:
                model.move_unused(sample_MD, optimizer, generator)
            elif learning_rate < 0.01 * settings.learning_rate:
                break
        model.load_state_dict(best_state)
        return model

    def forward(self, point_BD: Tensor, commitment_weight: float) -> Tensor:
        """Training loss (): reconstruction, codebooks and commitment, with a straight-through gradient."""
        latent_BE = self.encoder(point_BD)
        residual_BE, losses = latent_BE, []
        for codebook_CE in self.codebooks:
            codeword_B = nearest(residual_BE.detach(), codebook_CE.detach())
            chosen_BE = functional.embedding(codeword_B, codebook_CE)
            losses.append(functional.mse_loss(chosen_BE, residual_BE.detach()))
            losses.append(commitment_weight * functional.mse_loss(residual_BE, chosen_BE.detach()))
            residual_BE = residual_BE - chosen_BE.detach()
        quantized_BE = latent_BE - residual_BE.detach()
        losses.append(functional.mse_loss(self.decoder(quantized_BE), point_BD))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def reconstruction_error(self, point_MD: Tensor) -> float:
        """Mean squared difference between points (M, D) and their reconstructions."""
        return functional.mse_loss(self._points(self._codewords(point_MD)), point_MD).item()

    @torch.no_grad()
    def start_codebooks(self, point_MD: Tensor, generator: torch.Generator) -> None:
        """Set each codebook to the k-means centers of the residuals of these points, (M, D)."""
        residual_ME = self.encoder(point_MD)
        for codebook_CE in self.codebooks:
            one_block = partial(iter, [residual_ME])
            centers_CE = kmeans(
                one_block, residual_ME, len(codebook_CE), num_iterations=10, generator=generator
            )
            codebook_CE.copy_(centers_CE)
            residual_ME = residual(residual_ME, [codebook_CE])

    @torch.no_grad()
    def move_unused(
        self, point_MD: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Move codewords that no point uses to the residuals of random points.

        Args:
            point_MD: standardized embeddings, (M, D), equal on every worker, so that the codebooks stay equal.
            optimizer: AdamW, whose moments of the moved codewords become 0.
            generator: of the CPU; its state must be equal on every worker.
        """
        residual_ME = self.encoder(point_MD)
        for codebook_CE in self.codebooks:
            codeword_M = nearest(residual_ME, codebook_CE)
            unused = torch.nonzero(torch.bincount(codeword_M, minlength=len(codebook_CE)) == 0).flatten()
            rows = torch.randint(len(point_MD), (len(unused),), generator=generator).to(point_MD.device)
            codebook_CE[unused] = residual_ME[rows]
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[codebook_CE][moment][unused] = 0.0
            residual_ME = residual(residual_ME, [codebook_CE])

    def _codewords(self, point_BD: Tensor) -> Tensor:
        return residual_codewords(self.encoder(point_BD), self.codebooks)

    def _points(self, codewords_BL: Tensor) -> Tensor:
        point_BD: Tensor = self.decoder(sum_of_codewords(codewords_BL, self.codebooks))
        return point_BD


def make_optimizer(model: ResidualVae, settings: QuantizerSettings) -> torch.optim.AdamW:
    """AdamW without weight decay of the codebooks: decay would pull codewords away from their residuals."""
    groups: list[dict[str, Any]] = [
        {"params": [*model.encoder.parameters(), *model.decoder.parameters()]},
        {"params": list(model.codebooks), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
