"""Floating-point operations of one training step, counted from the shapes of the layers.

B histories of one batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiger_ray.model.sasrec import SasrecModel
from tiger_ray.model.t5 import TigerModel


def sasrec_operations(model: SasrecModel, lengths_B: npt.NDArray[np.int64]) -> float:
    """Floating-point operations of one step, forward and backward, without operations on padding.

    Args:
        model: gives the sizes of the layers.
        lengths_B: items of each history, (B,).
    """
    of, users, items = model.settings, len(lengths_B), float(lengths_B.sum())
    asking = 2 * of.d_model**2 + 2 * of.d_model * of.d_ff  # query, out, and the feed-forward network
    multiplications = of.num_layers * 2 * of.d_model**2 * items  # key, value
    multiplications += asking * ((of.num_layers - 1) * items + users)
    attended = (of.num_layers - 1) * float((lengths_B.astype(np.float64) ** 2).sum()) + items
    multiplications += 2 * of.d_model * attended
    multiplications += of.output_map * of.d_model**2 * users
    multiplications += of.d_model * users * (model.item.num_embeddings if of.loss == "softmax" else 2)
    return 3 * 2 * multiplications  # the backward pass has two products for each one of the forward pass


def tiger_operations(model: TigerModel, tokens_B: npt.NDArray[np.int64]) -> float:
    """Floating-point operations of one step, forward and backward, without operations on padding.

    Args:
        model: gives the sizes of the layers.
        tokens_B: history tokens of each example, (B,).
    """
    of, num_codewords = model.settings, model.vocabulary.id_length
    width, num_tokens = of.num_heads * of.d_kv, float(tokens_B.sum())
    written = len(tokens_B) * num_codewords
    feed_forward = 2 * of.d_model * of.d_ff
    per_token = 4 * of.d_model * width + feed_forward  # q, k, v, o
    per_codeword = 6 * of.d_model * width + feed_forward  # and q, o of the attention to the history
    per_memory_token = 2 * of.d_model * width  # and its k, v
    attended = float((tokens_B.astype(np.float64) ** 2).sum()) + num_codewords * (num_tokens + written)
    outputs = (
        model.vocabulary.size
        if of.softmax == "vocabulary"
        else sum(model.vocabulary.level_sizes) / num_codewords
    )
    multiplications = of.num_layers * (
        (per_token + per_memory_token) * num_tokens + per_codeword * written + 2 * width * attended
    )
    multiplications += of.d_model * outputs * written
    return 3 * 2 * multiplications  # the backward pass has two products for each one of the forward pass
