"""RQ-VAE: an autoencoder whose latent vector is a sum of one codeword per level.

N items, B items in batch, L levels, C codewords per level, D embedding width, E latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tiger_ray.config import QuantizerSettings
from tiger_ray.quantizers.base import Quantizer
from tiger_ray.quantizers.residual_kmeans import kmeans, nearest, residual_codewords, sum_of_codewords

RESET_EVERY_EPOCHS = 10
RESET_SHARE = 2 / 3
"""Part of the training in which unused codewords are moved; afterwards all of them settle."""


class ResidualVae(Quantizer):
    """Encoder, one codebook per level, decoder.

    Args:
        dim: embedding width D.
        level_sizes: codewords of each level (L,).
        latent_dim: latent width E.
        hidden_dims: widths of the encoder's hidden layers, mirrored in the decoder.

    Source: TIGER, Rajput et al. 2023, section 3.1; Lee et al. 2022. Unlike the paper: standardized input,
    AdamW in place of Adagrad, unused codewords moved to residuals of random items.
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
    def fit(
        cls, settings: QuantizerSettings, point_ND: Tensor, *, seed: int, log: Callable[[str], None]
    ) -> ResidualVae:
        """Weights and codebooks learned from standardized points (N, D) float32, on their device."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            level_sizes = (settings.codebook_size,) * settings.num_levels
            model = cls(point_ND.shape[1], level_sizes, settings.latent_dim, settings.hidden_dims)
        model.to(point_ND.device)
        model._start_codebooks(point_ND, generator)
        groups: list[dict[str, Any]] = [
            {"params": [*model.encoder.parameters(), *model.decoder.parameters()]},
            # Decay would pull codewords off the residuals they stand for.
            {"params": list(model.codebooks), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)
        for epoch in range(settings.num_epochs):
            total = torch.zeros(2, device=point_ND.device)
            order_N = torch.randperm(len(point_ND), generator=generator).to(point_ND.device)
            for rows_B in torch.split(order_N, settings.batch_size):
                point_BD = point_ND[rows_B]
                latent_BE, quantization_loss = model._quantize(point_BD, settings.commitment_weight)
                reconstruction_loss = functional.mse_loss(model.decoder(latent_BE), point_BD)
                optimizer.zero_grad(set_to_none=True)
                (reconstruction_loss + quantization_loss).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += torch.stack([reconstruction_loss, quantization_loss]).detach() * len(rows_B)
            if (epoch + 1) % RESET_EVERY_EPOCHS == 0 and epoch + 1 < RESET_SHARE * settings.num_epochs:
                model._move_unused(point_ND, optimizer, generator)
            if (epoch + 1) % max(1, settings.num_epochs // 10) == 0:
                reconstruction, quantization = (total / len(point_ND)).tolist()
                log(
                    f"rqvae: epoch {epoch + 1} of {settings.num_epochs}, reconstruction loss "
                    f"{reconstruction:.4f}, quantization loss {quantization:.4f}"
                )
        return model.requires_grad_(False)

    def _quantize(self, point_BD: Tensor, commitment_weight: float) -> tuple[Tensor, Tensor]:
        """Quantized latents (B, E) that pass gradients straight through, and the quantization loss."""
        latent_BE = self.encoder(point_BD)
        residual_BE, losses = latent_BE, []
        for codebook_CE in self.codebooks:
            codeword_B = nearest(residual_BE.detach(), codebook_CE.detach())
            chosen_BE = functional.embedding(codeword_B, codebook_CE)
            losses.append(functional.mse_loss(chosen_BE, residual_BE.detach()))
            losses.append(commitment_weight * functional.mse_loss(residual_BE, chosen_BE.detach()))
            residual_BE = residual_BE - chosen_BE.detach()
        return latent_BE - residual_BE.detach(), torch.stack(losses).sum()

    @torch.no_grad()
    def _start_codebooks(self, point_ND: Tensor, generator: torch.Generator) -> None:
        residual_NE = self.encoder(point_ND)
        for codebook_CE in self.codebooks:
            codebook_CE.copy_(kmeans(residual_NE, len(codebook_CE), num_iterations=10, generator=generator))
            residual_NE -= codebook_CE[nearest(residual_NE, codebook_CE)]

    @torch.no_grad()
    def _move_unused(
        self, point_ND: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Codewords that no item takes go to the residuals of random items."""
        residual_NE = self.encoder(point_ND)
        for codebook_CE in self.codebooks:
            codeword_N = nearest(residual_NE, codebook_CE)
            unused = torch.nonzero(torch.bincount(codeword_N, minlength=len(codebook_CE)) == 0).flatten()
            rows = torch.randint(len(point_ND), (len(unused),), generator=generator).to(point_ND.device)
            codebook_CE[unused] = residual_NE[rows]
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[codebook_CE][moment][unused] = 0.0
            residual_NE -= codebook_CE[nearest(residual_NE, codebook_CE)]

    def _codewords(self, point_BD: Tensor) -> Tensor:
        return residual_codewords(self.encoder(point_BD), self.codebooks)

    def _points(self, codewords_BL: Tensor) -> Tensor:
        point_BD: Tensor = self.decoder(sum_of_codewords(codewords_BL, self.codebooks))
        return point_BD


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
