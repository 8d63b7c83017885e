"""Random draws for sampled beam search: one user and beam have one draw, on any device.

B histories, W beams, M candidates of one beam.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Gumbel noise that makes the best beams a draw without replacement, level by level.

    A candidate's noise is a hash of the user's seed and of the candidate's codewords. Hence the noise does not
    depend on the batch, the worker or other candidates.

    Source: stochastic beam search, Kool et al. 2019 (arXiv 1903.06059), algorithm 1 and appendix B.3.

    >>> draw = Draw(torch.tensor([7]))
    >>> rank_BWM = draw.extend(torch.tensor([[[0.0, 0.0, -torch.inf]]]), torch.tensor([[[0, 1, 2]]]))
    >>> rank_BWM.shape, rank_BWM[0, 0, 2].item()
    (torch.Size([1, 1, 3]), -inf)
    """

    def __init__(self, seed_B: Tensor) -> None:
        # Hash the seeds, or the draws of users with consecutive seeds would be shifted copies.
        self._key_BW = splitmix64(seed_B)[:, None]
        self._log_prob_BW = torch.zeros(len(seed_B), 1, device=seed_B.device)
        self._rank_BW = self._log_prob_BW

    def extend(self, log_prob_BWM: Tensor, code_BWM: Tensor) -> Tensor:
        """Keys to rank the candidates by, (B, W, M) float32.

        Args:
            log_prob_BWM: of each candidate given its beam, (B, W, M) float32; -inf for no candidate.
            code_BWM: codeword of each candidate, (B, W, M) int64.
        """
        # Normalize over allowed candidates: excluded candidates take no share of the draw.
        log_prob_BWM = self._log_prob_BW[..., None] + log_prob_BWM.log_softmax(-1).nan_to_num(
            nan=-torch.inf, neginf=-torch.inf
        )
        key_BWM = splitmix64(self._key_BW[..., None] + code_BWM)
        noisy_BWM = log_prob_BWM + gumbel(key_BWM)
        # Shift the noise so that the highest key of a beam's candidates is the beam's own key.
        highest_BW1 = noisy_BWM.amax(-1, keepdim=True)
        rank_BW1 = self._rank_BW[..., None]
        gap_BWM = rank_BW1 - noisy_BWM + torch.log1p(-torch.exp(noisy_BWM - highest_BW1))
        rank_BWM = rank_BW1 - gap_BWM.relu() - torch.log1p(torch.exp(-gap_BWM.abs()))
        rank_BWM = torch.where(noisy_BWM == highest_BW1, rank_BW1, rank_BWM)
        rank_BWM = rank_BWM.masked_fill(log_prob_BWM == -torch.inf, -torch.inf)
        self._next = key_BWM, log_prob_BWM, rank_BWM
        return rank_BWM

    def keep(self, place_BW: Tensor) -> None:
        """Continue with the candidates at these places, counted over all beams of a user, (B, W) int64."""
        self._key_BW, self._log_prob_BW, self._rank_BW = (
            column.flatten(1).gather(1, place_BW) for column in self._next
        )


def splitmix64(key: Tensor) -> Tensor:
    """A new hash of each hash, int64: `core.hashing.splitmix64` in torch, for a GPU."""

    def shift(key: Tensor, bits: int) -> Tensor:
        return (key >> bits) & ((1 << (64 - bits)) - 1)  # the mask removes copies of the sign

    key = key + _signed(0x9E3779B97F4A7C15)
    key = (key ^ shift(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ shift(key, 27)) * _signed(0x94D049BB133111EB)
    return key ^ shift(key, 31)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def gumbel(key: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from hashes."""
    uniform = ((key >> 12).double() + 2**51 + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform)).float()
