"""TIGER as a ranker: constrained beam search over Semantic IDs.

N items, I id_length, B users.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.core.hashing import splitmix64
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary, user_buckets
from tiger_ray.rankers.base import Found, Histories, Rules, for_known
from tiger_ray.settings.decoding import DecodingSettings

VALIDATION_BEAM_WIDTH = 20
"""Beams of a model that is judged while it is trained."""


class TigerRanker:
    """Ranks by beam search with the weights that the model has when the ranker is built.

    The night, the validation, the evaluation and the endpoint all rank with this class. A user without history gets
    no item.

    >>> from tiger_ray.settings.model import ModelSettings
    >>> codes_NI = np.array([[0, 0], [1, 0], [2, 1]], np.int16)
    >>> model = TigerModel(ModelSettings(num_layers=1), Vocabulary((4, 3))).eval()
    >>> rules = Rules(np.ones(3, bool), exclude_history=True)
    >>> ranker = TigerRanker(model, "cpu", codes_NI=codes_NI, rules=rules, decoding=DecodingSettings())
    >>> sorted(ranker.recommend(Histories.of([[0]]), 2).item_BK[0].tolist())
    [1, 2]
    """

    def __init__(
        self,
        model: TigerModel,
        device: torch.device | str,
        *,
        codes_NI: npt.NDArray[np.int16],
        rules: Rules,
        decoding: DecodingSettings,
        seed: int = 0,
    ) -> None:
        """Build the trie of the eligible items, and get ready to decode.

        Args:
            model: in evaluation mode; trained on the ID space of `codes_NI`.
            device: where to decode.
            codes_NI: Semantic IDs by item_index, (N, I) int16.
            rules: what may come out.
            decoding: beam width, precision, batch size, and whether items are drawn.
            seed: of the draws.

        Raises:
            ArtifactError: model and Semantic IDs belong to different ID spaces.
            DataError: no item is eligible.
        """
        self._decoder = Decoder(model, codes_NI, rules.eligible_N, decoding, device)
        self._exclude_history = rules.exclude_history
        self._decoding, self._seed = decoding, seed
        self.vocabulary = model.vocabulary

    def recommend(self, histories: Histories, k: int) -> Found:
        """As `Ranker.recommend`; scores are natural log probabilities.

        Raises:
            ValueError: `k` is more than the beam width.
        """
        return for_known(histories, k, lambda known: self._recommend(known, k))

    def _recommend(self, histories: Histories, k: int) -> Found:
        hash_B, buckets_B, seed_B = histories.user_hash_B, None, None
        if needs_user(self.vocabulary, self._decoding):
            assert hash_B is not None, "this model tells users apart: histories need user_hash_B"
            if self.vocabulary.num_user_buckets:
                buckets_B = user_buckets(hash_B, self.vocabulary)
            if self._decoding.sample:
                # Mix the hash: shards and user buckets are parts of the hash, and a draw must not depend on them.
                seed_B = splitmix64(hash_B, self._seed).view(np.int64)
        return Found.of(
            *self._decoder.recommend(
                histories.item_index_E,
                histories.lengths_B,
                buckets_B,
                k,
                exclude_history=self._exclude_history,
                seed_B=seed_B,
            )
        )


def needs_user(vocabulary: Vocabulary, decoding: DecodingSettings) -> bool:
    """Whether the items depend on the user id: the model reads a user token, or each user has a draw of their own."""
    return vocabulary.num_user_buckets > 0 or decoding.sample
