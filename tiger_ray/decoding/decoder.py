"""Model, Semantic IDs and trie in one process: histories in, ranked item indices out.

B histories, K items of a list, E items of all histories one after the other, X excluded items of all histories,
W beams, T history tokens, N items, I id_length. A small b is a batch of the B histories.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from tiger_ray.core.arrays import ranges
from tiger_ray.core.memory import keep_freed_memory
from tiger_ray.core.precision import dtype_of
from tiger_ray.decoding.beam_search import Search, beam_search
from tiger_ray.decoding.cuda_graphs import RecordedSearch
from tiger_ray.decoding.inference import LENGTH_MULTIPLE, InferenceModel
from tiger_ray.decoding.trie import Trie
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import pad_histories
from tiger_ray.settings.decoding import DecodingSettings

BATCH_TOKENS = {"cpu": 4096, "cuda": 262_144}
"""Default of `decoding.batch_tokens`, history tokens and beams of a batch: fits a CPU's caches, fills a GPU."""


class Decoder:
    """Recommends items with a model: constrained beam search over the Semantic IDs of the eligible items.

    On a CPU each of torch's threads decodes its own batches, which is faster than sharing each batch.

    Args:
        model: trained on the ID space of `codes_NI`; it stays unchanged.
        codes_NI: Semantic IDs by item_index, (N, I) int16.
        eligible_N: true for an item that may be recommended, (N,) bool.
        settings: section `decoding`: beam width, precision and batch size.
        device: device of the computation.

    Raises:
        ArtifactError: model and Semantic IDs belong to different ID spaces.
        DataError: no item is eligible.

    >>> from tiger_ray.model.tokens import Vocabulary
    >>> from tiger_ray.settings.model import ModelSettings
    >>> codes_NI = np.array([[0, 0], [1, 0], [1, 1]], np.int16)
    >>> model = TigerModel(ModelSettings(num_layers=1, d_model=16), Vocabulary((2, 2))).eval()
    >>> decoder = Decoder(model, codes_NI, np.array([True, False, True]), DecodingSettings(beam_width=3))
    >>> found_BK, score_BK = decoder.recommend(np.array([0, 1], np.int32), np.array([2]), None, 3)
    >>> sorted(found_BK[0].tolist())
    [-1, 0, 2]
    """

    def __init__(
        self,
        model: TigerModel,
        codes_NI: npt.NDArray[np.int16],
        eligible_N: npt.NDArray[np.bool_],
        settings: DecodingSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.settings = settings
        model.vocabulary.require_codes(codes_NI)
        self.codes_NI = codes_NI
        dtype = dtype_of(settings.precision, self.device)
        self.model = InferenceModel(model, dtype, self.device, settings.temperature)
        self.trie = Trie.build(codes_NI, eligible_N).to(self.device)
        self._batch_tokens = settings.batch_tokens or BATCH_TOKENS[self.device.type]
        # Memory of one excluded item, in units of one token's.
        lists = [edges.num_candidates for edges in self.trie.edges if edges.code is not None]
        self._tokens_per_excluded = max(settings.beam_width, *lists, 0) / 1024
        self._recorded: Search | None = None
        if self.device.type == "cuda":
            inference, trie, width = self.model, self.trie, settings.beam_width
            # The lambda must not hold `self`: a reference cycle would keep the graphs' gigabytes until Python
            # collects cycles.
            self._recorded = RecordedSearch(
                lambda history_BT, barred, seed_B: beam_search(
                    inference, trie, history_BT, width, barred, seed_B
                )
            )
        if self.device.type == "cpu":
            keep_freed_memory()

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_buckets_B: npt.NDArray[np.int64] | None,
        k: int,
        *,
        exclude_history: bool = False,
        seed_B: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The k best items of each user, or k random items.

        Args:
            item_index: items of all histories one after the other, each oldest first, (E,) int32.
            lengths_B: items per history, (B,) integer, at least 1; the model reads the last
                `model.max_history` items.
            user_buckets_B: hash bucket of each user, (B,) integer; None for a model without user tokens.
            k: items per user, at most `decoding.beam_width`.
            exclude_history: leave out all items of the user's history.
            seed_B: one seed per user, (B,) int64, to draw items without replacement; None for the best items.

        Returns:
            item_index, (B, k) int64, best first or first drawn, -1 after the last item; and score, (B, k)
            float32, natural log probability, -inf after the last item.

        Raises:
            ValueError: `k` is more than the beam width.
        """
        if k > self.settings.beam_width:
            raise ValueError(
                f"{k} items are asked for, but decoding.beam_width is {self.settings.beam_width}"
            )
        assert lengths_B.min(initial=1) >= 1
        end_B = np.cumsum(lengths_B)
        found_BK = np.full((len(lengths_B), k), -1, dtype=np.int64)
        score_BK = np.full((len(lengths_B), k), -np.inf, dtype=np.float32)

        def decode(user_b: npt.NDArray[np.int64]) -> None:
            length_b = lengths_B[user_b]
            read_b = np.minimum(length_b, self.model.max_history)
            item_E = item_index[ranges(end_B[user_b] - read_b, read_b)]
            buckets_b = None if user_buckets_B is None else user_buckets_B[user_b]
            excluded = None
            if exclude_history:
                item_X = item_index[ranges(end_B[user_b] - length_b, length_b)]
                excluded = item_X, np.repeat(np.arange(len(user_b)), length_b)
            found_BK[user_b], score_BK[user_b] = self._search(
                item_E, read_b, buckets_b, k, excluded, None if seed_B is None else seed_B[user_b]
            )

        excluded_B = lengths_B if exclude_history else np.zeros_like(lengths_B)
        batches = list(self._batches(np.minimum(lengths_B, self.model.max_history), excluded_B))
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        if min(threads, len(batches)) <= 1:
            for user_b in batches:
                decode(user_b)
            return found_BK, score_BK
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(decode, batches))
        finally:
            torch.set_num_threads(threads)  # the pool's setting of 1 applies to later threads, too
        return found_BK, score_BK

    def _batches(
        self, read_B: npt.NDArray[np.int64], excluded_B: npt.NDArray[np.int64]
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Batches of users with similar history lengths, within the budget of tokens, longest first."""
        vocabulary, budget = self.model.vocabulary, self._batch_tokens
        by_length_B = np.argsort(-read_B, kind="stable")
        excluded_B = (excluded_B[by_length_B] * self._tokens_per_excluded).astype(np.int64)
        first = 0
        while first < len(by_length_B):
            each = int(read_B[by_length_B[first]]) * vocabulary.id_length + (vocabulary.num_user_buckets > 0)
            if self._recorded is not None:
                each += -each % LENGTH_MULTIPLE
            each += self.settings.beam_width
            most = max(1, budget // each)
            used = each * np.arange(1, most + 1)[: len(by_length_B) - first]
            used += np.cumsum(excluded_B[first : first + most])
            count = max(1, int(np.searchsorted(used, budget, side="right")))
            if self._recorded is not None:
                count = 1 << (count.bit_length() - 1)  # padding of users must not exceed the budget
            yield by_length_B[first : first + count]
            first += count

    def _search(
        self,
        item_E: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_buckets_B: npt.NDArray[np.int64] | None,
        k: int,
        excluded: tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]] | None,
        seed_B: npt.NDArray[np.int64] | None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Decode one batch; `excluded` holds items, (X,), and their users, (X,)."""
        vocabulary = self.model.vocabulary
        user_tokens = None
        if user_buckets_B is not None:
            user_tokens = torch.from_numpy(user_buckets_B.astype(np.int64) + vocabulary.user_offset)
        history_BT = pad_histories(
            vocabulary.tokens(self.codes_NI[item_E]), torch.from_numpy(lengths_B), user_tokens
        )
        with torch.inference_mode():
            barred = None
            if excluded is not None:
                item_X, user_X = excluded
                codes_XI = torch.from_numpy(self.codes_NI[item_X].astype(np.int64))
                barred = self.trie.find_barred(
                    codes_XI.to(self.device), torch.from_numpy(user_X).to(self.device)
                )
            seed = None if seed_B is None else torch.from_numpy(seed_B).to(self.device)
            history_BT = history_BT.to(self.device)
            if self._recorded is not None:
                found_BW, score_BW = self._recorded(history_BT, barred, seed)
            else:
                width = self.settings.beam_width
                found_BW, score_BW = beam_search(self.model, self.trie, history_BT, width, barred, seed)
            return found_BW[:, :k].cpu().numpy(), score_BW[:, :k].cpu().numpy()
