"""TIGER as a ranker: beam search over Semantic IDs.

B histories, K items each.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.decoding.decoder import Decoder
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import user_buckets
from tiger_ray.settings.decoding import DecodingSettings

BEAM_WIDTH = 20


class BeamRanker:
    """Ranks by beam search with the weights that a model has now."""

    def __init__(
        self,
        model: TigerModel,
        device: torch.device,
        *,
        codes_NI: npt.NDArray[np.int16],
        eligible_N: npt.NDArray[np.bool_],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        """Get ready to decode: Semantic IDs, (N, I) int16, and what may be recommended, (N,) bool."""
        settings = DecodingSettings(beam_width=BEAM_WIDTH, precision=precision)
        self._decoder = Decoder(model, codes_NI, eligible_N, settings, device)
        self._vocabulary = model.vocabulary

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_hash_B: npt.NDArray[np.uint64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `Ranker.recommend`."""
        buckets_B = None
        if self._vocabulary.num_user_buckets:
            assert user_hash_B is not None
            buckets_B = user_buckets(user_hash_B, self._vocabulary)
        return self._decoder.recommend(item_index, lengths_B, buckets_B, k, exclude_history=exclude_history)
