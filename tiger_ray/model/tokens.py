"""Semantic IDs to token ids and back, and histories to one padded token matrix.

B users in batch, L most items of a history, T history tokens, I id_length, N items, E events of all users in batch.

Token 0 is padding and the decoder's start token. One block of tokens per level of the Semantic ID follows, so
that equal codewords of two levels are two tokens. The last block has one token per user bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.errors import ArtifactError

PAD = 0
"""Padding, and the decoder's start token as in T5."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of codewords and of user buckets.

    >>> vocabulary = Vocabulary((8, 8, 4), num_user_buckets=5)
    >>> vocabulary.offsets, vocabulary.user_offset, vocabulary.size
    ((1, 9, 17), 21, 26)
    >>> vocabulary.tokens(np.array([[3, 0, 1]], np.int16)).tolist()
    [[4, 9, 18]]
    """

    level_sizes: tuple[int, ...]
    """Codewords of each level; the last level is the disambiguator."""
    num_user_buckets: int = 0
    """Number of user tokens; 0 for a model without user tokens."""

    @property
    def id_length(self) -> int:
        """Codewords of one Semantic ID."""
        return len(self.level_sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First token of each level."""
        return tuple(accumulate(self.level_sizes[:-1], initial=1))

    @property
    def user_offset(self) -> int:
        """First user token."""
        return 1 + sum(self.level_sizes)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.user_offset + self.num_user_buckets

    def require_codes(self, codes_NI: npt.NDArray[np.int16]) -> None:
        """Refuse Semantic IDs, (N, I) int16, that do not fit the levels of this vocabulary.

        Raises:
            ArtifactError: the number of codes or a code does not fit; both belong to different ID spaces.
        """
        if codes_NI.ndim != 2 or codes_NI.shape[1] != self.id_length:
            raise ArtifactError(
                f"Semantic IDs have shape {codes_NI.shape}, but this model writes {self.id_length} codewords "
                f"per item (level sizes {self.level_sizes}); they belong to different ID spaces"
            )
        for level, size in enumerate(self.level_sizes):
            codes_N = codes_NI[:, level]
            if len(codes_N) and not 0 <= codes_N.min() <= codes_N.max() < size:
                raise ArtifactError(
                    f"level {level} of the Semantic IDs holds codewords {codes_N.min()} to {codes_N.max()}, "
                    f"but this model knows 0 to {size - 1}; they belong to different ID spaces"
                )

    def tokens(self, codes_NI: npt.NDArray[np.int16]) -> Tensor:
        """Token ids of Semantic IDs, (N, I) int16 to (N, I) int64."""
        return torch.from_numpy(codes_NI + np.array(self.offsets))

    def item_tokens(self, codes_NI: npt.NDArray[np.int16]) -> Tensor:
        """Token ids of Semantic IDs, after `require_codes`: (N, I) int16 to (N, I) int64.

        Raises:
            ArtifactError: the number of codes or a code does not fit this vocabulary.
        """
        self.require_codes(codes_NI)
        return self.tokens(codes_NI)


def pad_histories(token_EI: Tensor, lengths_B: Tensor, user_tokens_B: Tensor | None) -> Tensor:
    """Histories as the encoder reads them: the user's token, the items from the oldest on, then PAD.

    Args:
        token_EI: token ids of the items of all histories one after the other, (E, I) int64.
        lengths_B: items per history, (B,) integer, on the CPU; their sum is E.
        user_tokens_B: token of each user, (B,) int64; None: no user token.

    Returns:
        Token ids, (B, T) int64, on the device of `token_EI`; T fits the longest history.
    """
    device = token_EI.device
    # The lengths are on the CPU, so their maximum forces no GPU sync.
    longest = int(lengths_B.max())
    filled = (torch.arange(longest) < lengths_B[:, None]).to(device)
    token_BLI = torch.full((len(lengths_B), longest, token_EI.shape[1]), PAD, device=device)
    token_BLI[filled] = token_EI
    token_BT = token_BLI.flatten(1)
    if user_tokens_B is None:
        return token_BT
    return torch.cat((user_tokens_B.to(device)[:, None], token_BT), dim=1)


def user_buckets(user_hash_B: npt.NDArray[np.uint64], vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """Bucket of each user, (B,) int64.

    Source: TIGER, Rajput et al. 2023, section 4 (hashing trick for user ids).
    """
    return (user_hash_B % np.uint64(vocabulary.num_user_buckets)).astype(np.int64)
