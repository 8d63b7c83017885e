"""Models of a few thousand weights, and what they read: small enough to be scored by brute force."""

from collections.abc import Sequence

import numpy as np
import torch

from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import PAD, Vocabulary
from tiger_ray.settings.model import ModelSettings

VOCABULARY = Vocabulary((6, 5, 4), num_user_buckets=3)


def tiny_model(level_sizes=VOCABULARY.level_sizes, **changes) -> TigerModel:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 24, "num_user_buckets": 3}
    settings = ModelSettings(**(sizes | changes))
    return TigerModel(settings, Vocabulary(level_sizes, settings.num_user_buckets)).eval()


def padded_batch(lengths: Sequence[int] = (180, 131, 9, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """Histories of so many tokens, the longest first (at 180 the far position buckets too), and targets, of
    `VOCABULARY`."""
    torch.manual_seed(1)
    history_BT = torch.randint(1, VOCABULARY.size, (len(lengths), lengths[0]))
    for row, length in enumerate(lengths):
        history_BT[row, length:] = PAD
    first_I = torch.tensor(VOCABULARY.offsets)
    return history_BT, first_I + torch.randint(0, 4, (len(lengths), 3))


def catalog_of(level_sizes: tuple[int, ...], seed: int, num_items: int) -> np.ndarray:
    """Different Semantic IDs, (N, I) int16."""
    every_id = np.array(list(np.ndindex(*level_sizes)), np.int16)
    return np.random.default_rng(seed).permutation(every_id)[:num_items]


def histories_of(
    seed: int, num_users: int, num_items: int, longest: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Items of all histories, one after the other, and items per history."""
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(1, longest + 1, num_users)
    return rng.integers(0, num_items, lengths_B.sum()).astype(np.int32), lengths_B


def split(item_index: np.ndarray, lengths_B: np.ndarray) -> list[np.ndarray]:
    """The history of each user."""
    return np.split(item_index, np.cumsum(lengths_B)[:-1])
