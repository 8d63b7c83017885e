"""The world of the benchmarks of decoding and training: a model of the paper's size, planted Semantic IDs, and histories.

N items, I id_length, B users, E events of all users.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from tiger_ray.data.histories import HELD_OUT
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.ids import semantic_ids
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.model import ModelSettings
from tiger_ray.training.examples import Examples

BEAUTY_ITEMS = 12_101
DISAMBIGUATORS = 256
# Users of Amazon Beauty (5-core, 2014) by the length of their test history, 20 stands for all longer histories.
BEAUTY_LENGTHS = {4: 7162, 5: 4221, 6: 2680, 7: 1811, 8: 1366, 9: 881, 10: 695, 11: 558, 12: 439, 13: 361}
BEAUTY_LENGTHS |= {14: 262, 15: 207, 16: 213, 17: 141, 18: 118, 19: 112, 20: 1136}
BEAUTY_LONGER = 34  # mean of the lengths that 20 stands for; a model reads the last 20 items

Users = tuple[np.ndarray, np.ndarray]
"""Items of all histories one after the other, (E,) int32, and items per history, (B,) int64."""


@cache
def planted_model(codebook_size: int = 256) -> TigerModel:
    """A model of the paper's sizes with the weights that training begins with; its logits differ by about 1."""
    torch.manual_seed(0)
    sizes = (codebook_size,) * 3 + (DISAMBIGUATORS,)
    return TigerModel(ModelSettings(), Vocabulary(sizes)).eval()


@cache
def planted_codes(num_items: int = BEAUTY_ITEMS, codebook_size: int = 256) -> np.ndarray:
    """Distinct Semantic IDs, (N, I) int16: some pairs of codewords are crowded, and some items near-copies."""
    rng = np.random.default_rng(0)
    crowd = np.exp(rng.normal(size=(codebook_size, 1)) / 2 + rng.normal(size=(codebook_size, codebook_size)))
    num_own = round(0.86 * num_items)  # the share that residual k-means reaches on Beauty
    pair = rng.choice(codebook_size**2, num_own, p=(crowd / crowd.sum()).ravel())
    own = pair * codebook_size + rng.integers(codebook_size, size=num_own)
    copied = own[(num_own * rng.random(num_items - num_own) ** 1.5).astype(np.int64)]
    prefix_N = rng.permutation(np.concatenate([own, copied]))
    disambiguator_N = semantic_ids.disambiguators(prefix_N, np.arange(num_items))
    codewords_NL = semantic_ids.codewords_of(prefix_N, planted_model(codebook_size).vocabulary.level_sizes)
    return np.column_stack([codewords_NL, disambiguator_N]).astype(np.int16)


def planted_decoder(
    beam_width: int,
    precision: str,
    num_items: int = BEAUTY_ITEMS,
    codebook_size: int = 256,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder that may recommend every planted item."""
    codes_NI = planted_codes(num_items, codebook_size)
    settings = DecodingSettings(beam_width=beam_width, precision=precision)
    return Decoder(planted_model(codebook_size), codes_NI, np.ones(num_items, bool), settings, device)


def users_of(lengths_B: np.ndarray, num_items: int = BEAUTY_ITEMS) -> Users:
    """Users with histories of these lengths and random items."""
    items = np.random.default_rng(1).integers(num_items, size=lengths_B.sum())
    return items.astype(np.int32), lengths_B.astype(np.int64)


def full_users(count: int, num_items: int = BEAUTY_ITEMS) -> Users:
    """Users with histories as long as the model reads."""
    return users_of(np.full(count, ModelSettings().max_history), num_items)


def beauty_users(count: int, folder: Path | None = None) -> Users:
    """Users with as many items as users of Beauty have before their last one, read from `folder` if one is given."""
    lengths = np.repeat(list(BEAUTY_LENGTHS), list(BEAUTY_LENGTHS.values()))
    if folder is not None:
        lengths = np.minimum(beauty_events(folder) - 1, ModelSettings().max_history)
    return users_of(np.random.default_rng(2).choice(np.sort(lengths), count))


def beauty_examples(folder: Path | None = None) -> Examples:
    """Training examples of histories as long as those of Beauty without their last two items, of any items."""
    lengths = np.repeat([*list(BEAUTY_LENGTHS)[:-1], BEAUTY_LONGER], list(BEAUTY_LENGTHS.values())) - 1
    if folder is not None:
        lengths = np.sort(beauty_events(folder) - HELD_OUT)
    items, lengths_U = users_of(np.random.default_rng(2).permutation(lengths))
    hashes = np.arange(len(lengths_U), dtype=np.uint64)
    return Examples.of(items, lengths_U, hashes, max_history=ModelSettings().max_history, seed=0)


def beauty_events(folder: Path) -> np.ndarray:
    """Events of each user of Beauty, in any order."""
    user_id = pq.read_table(folder / "interactions.parquet", columns=["user_id"]).column("user_id")
    return user_id.value_counts().field("counts").to_numpy()


def first(users: Users, count: int) -> Users:
    """The first `count` users."""
    items, lengths_B = users
    return items[: lengths_B[:count].sum()], lengths_B[:count]
