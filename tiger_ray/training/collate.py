"""A batch of histories as the tensors that a network reads.

B histories, T places or tokens of a padded history, E items of all histories one after the other, N items,
I id_length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.model.sasrec import SasrecModel, pad_left
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary, pad_histories, user_buckets
from tiger_ray.training.examples import Batch
from tiger_ray.training.operations import sasrec_operations, tiger_operations


def sasrec_collate(model: SasrecModel) -> Collate:
    """The collate function of SASRec: histories and next items as item_index."""

    def collate(batch: Batch) -> Collated:
        history_BT = pad_left(batch.item_E, batch.lengths_B)
        target_B = torch.from_numpy(batch.target_B.astype(np.int64))
        operations = sasrec_operations(model, batch.lengths_B)
        return Collated((history_BT, target_B), int(batch.lengths_B.sum()), history_BT.numel(), operations)

    return collate


class Collated(NamedTuple):
    """One batch, ready for a network.

    >>> Collated((torch.zeros(2, 5),), tokens=7, padded=10, operations=1e6).padded
    10
    """

    inputs: tuple[Tensor, ...]
    """Arguments of the network's forward, without the label smoothing."""
    tokens: int
    """Number of tokens of the histories."""
    padded: int
    """Number of tokens with padding."""
    operations: float
    """Floating-point operations, forward and backward, without operations on padding."""


Collate = Callable[[Batch], Collated]
"""Turns a batch into the inputs of a network."""


def tiger_collate(model: TigerModel, codes_NI: npt.NDArray[np.int16]) -> Collate:
    """The collate function of TIGER: histories and next items as tokens of their Semantic IDs, (N, I) int16 by item_index."""
    vocabulary = model.vocabulary

    def collate(batch: Batch) -> Collated:
        history_BT, target_BI = tokens_of(batch, codes_NI, vocabulary)
        tokens_B = batch.lengths_B * vocabulary.id_length + (vocabulary.num_user_buckets > 0)
        operations = tiger_operations(model, tokens_B)
        return Collated((history_BT, target_BI), int(tokens_B.sum()), history_BT.numel(), operations)

    return collate


def tokens_of(batch: Batch, codes_NI: npt.NDArray[np.int16], vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Token ids of histories and of their next items.

    Args:
        batch: examples.
        codes_NI: Semantic IDs by item_index, (N, I) int16.
        vocabulary: tokens of the model.

    Returns:
        Histories, (B, T) int64, PAD after the end, and next items, (B, I) int64.
    """
    user_tokens = None
    if vocabulary.num_user_buckets:
        user_tokens = torch.from_numpy(user_buckets(batch.user_hash_B, vocabulary) + vocabulary.user_offset)
    read_EI = vocabulary.tokens(codes_NI[batch.item_E])
    history_BT = pad_histories(read_EI, torch.from_numpy(batch.lengths_B), user_tokens)
    return history_BT, vocabulary.tokens(codes_NI[batch.target_B])
