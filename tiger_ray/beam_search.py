"""Constrained beam search: model and trie to ranked items, none of them invalid or ineligible.

B users in batch, T history tokens, I id_length, W beams, M candidates of one beam, C codewords of a level,
N items, E events of all users; K only for top-K.

Beams are trie nodes. At each level a beam may only go on to its node's children, and the W best
children over all beams of a user are kept. Between levels the beams are sorted by Semantic ID, so that
equal scores are broken by the lower Semantic ID, always.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.config import DecodingSettings
from tiger_ray.inference import LENGTH_MULTIPLE, InferenceModel
from tiger_ray.model import TigerModel
from tiger_ray.precision import dtype_of
from tiger_ray.tokens import PAD, pad_histories
from tiger_ray.trie import Closed, Trie

BATCH_TOKENS = {"cpu": 4096, "cuda": 262_144}
"""History tokens and beams decoded at once, if the settings do not say: fits the caches, fills the GPU."""

Search = Callable[[Tensor, tuple[Closed, ...] | None, Tensor | None], tuple[Tensor, Tensor]]
"""Histories, what is closed, seeds -> item_index and score, as `beam_search`."""


def beam_search(
    model: InferenceModel,
    trie: Trie,
    history_BT: Tensor,
    beam_width: int,
    closed: tuple[Closed, ...] | None = None,
    seed_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The items whose Semantic IDs are the most probable continuation of each history, or a draw of them.

    Args:
        model: on the device of `trie` and `history_BT`.
        trie: Semantic IDs that may come out.
        history_BT: token ids, (B, T) int64, PAD after the end.
        beam_width: candidates kept per level W; exact if it is at least the number of eligible items.
        closed: what is barred for some users, of `Trie.closed`; None: nothing.
        seed_B: draw W items without replacement, each codeword by its probability among those that some
            allowed item goes on with; the draw follows from this number and the user's history alone,
            (B,) int64. None: the most probable ones.

    Returns:
        item_index, (B, W) int64, best first (or first drawn), -1 after the last; and score, (B, W) float32,
        natural log probability of the whole Semantic ID, -inf where there is no item. Without seeds equal
        scores come in the order of the Semantic IDs.

    Source: TIGER (arXiv 2305.05065) section 3.3 for beam search; Kool et al. 2019 (arXiv 1903.06059) for the
    draw; the trie constraint is ours.
    """
    num_users, device = len(history_BT), history_BT.device
    state = model.start(history_BT)
    node_BW = torch.zeros(num_users, 1, dtype=torch.int64, device=device)
    token_BW = torch.full_like(node_BW, PAD)
    score_BW = torch.zeros(num_users, 1, device=device)
    draw = None if seed_B is None else Draw(seed_B)
    for level, edges in enumerate(trie.edges):
        log_prob_BWM = edges.candidates(node_BW, model.next_log_probs(token_BW, state))
        if closed is not None:
            close(log_prob_BWM, node_BW, closed[level])
        score_BP = (score_BW[..., None] + log_prob_BWM).flatten(1)
        rank_BP = score_BP
        if draw is not None:
            rank_BP = draw.extend(log_prob_BWM, edges.codes(node_BW)).flatten(1)
        place_BW = best_places(rank_BP, min(beam_width, edges.num_children))
        is_last = level + 1 == len(trie.edges)
        if not is_last:
            place_BW = place_BW.sort().values  # by Semantic ID again
        beam_BW, nth_BW = place_BW // edges.num_candidates, place_BW % edges.num_candidates
        score_BW = score_BP.gather(1, place_BW)
        node_BW, code_BW = edges.follow(node_BW.gather(1, beam_BW), nth_BW)
        if draw is not None:
            draw.keep(place_BW)
        if not is_last:
            token_BW = code_BW + model.vocabulary.offsets[level]
            state.reorder(beam_BW)
    item_BW = trie.item_index[node_BW].long().masked_fill(score_BW == -torch.inf, -1)
    missing = beam_width - item_BW.shape[1]
    return (
        torch.nn.functional.pad(item_BW, (0, missing), value=-1),
        torch.nn.functional.pad(score_BW, (0, missing), value=-torch.inf),
    )


def close(log_prob_BWM: Tensor, node_BW: Tensor, closed: Closed) -> None:
    """Bar candidates of some users, in place."""
    _, width, num_candidates = log_prob_BWM.shape
    at_EW = node_BW[closed.user_E] == closed.node_E[:, None]
    beam_EW = closed.user_E[:, None] * width + torch.arange(width, device=node_BW.device)
    place_EW = beam_EW * num_candidates + closed.nth_E[:, None]
    # no list of places where something is: its length would have to be waited for
    bar_EW = torch.where(at_EW, -torch.inf, 0.0)
    log_prob_BWM.view(-1).index_add_(0, place_EW.flatten(), bar_EW.flatten())


def best_places(score_BP: Tensor, count: int) -> Tensor:
    """Places of the highest scores, best first, of equal ones the lowest, (B, count) int64."""
    # topk breaks ties as it likes, so rank by one integer: the score's bits in its order, then the place
    bits_BP = score_BP.view(torch.int32)
    ordered_BP = torch.where(bits_BP < 0, bits_BP ^ 0x7FFFFFFF, bits_BP).long()
    last = score_BP.shape[1] - 1
    rank_BP = (ordered_BP << 32) | (last - torch.arange(last + 1, device=score_BP.device))
    return last - (rank_BP.topk(count).values & 0xFFFFFFFF)


class Draw:
    """Gumbel noise that makes the best beams a draw without replacement, level by level.

    A candidate's noise is a hash of the user's seed and its Semantic ID so far, so neither the batch nor the
    worker nor another candidate changes it.

    Source: stochastic beam search, Kool et al. 2019 (arXiv 1903.06059), algorithm 1 and appendix B.3.
    """

    def __init__(self, seed_B: Tensor) -> None:
        self._key_BW = mixed(seed_B)[:, None]  # or the codes of one user would be those of the next, shifted
        self._log_prob_BW = torch.zeros(len(seed_B), 1, device=seed_B.device)
        self._rank_BW = self._log_prob_BW

    def extend(self, log_prob_BWM: Tensor, code_BWM: Tensor) -> Tensor:
        """What to rank the candidates by, (B, W, M) float32.

        Args:
            log_prob_BWM: of each candidate after its beam, (B, W, M) float32; -inf where there is none.
            code_BWM: its codeword, (B, W, M) int64.
        """
        # among what may come out: what may not takes no share of the draw
        log_prob_BWM = self._log_prob_BW[..., None] + log_prob_BWM.log_softmax(-1).nan_to_num(
            nan=-torch.inf, neginf=-torch.inf
        )
        key_BWM = mixed(self._key_BW[..., None] + code_BWM)
        noisy_BWM = log_prob_BWM + gumbel(key_BWM)
        # shifted so that the highest of a beam's candidates is the beam's own number
        highest_BW1 = noisy_BWM.amax(-1, keepdim=True)
        rank_BW1 = self._rank_BW[..., None]
        gap_BWM = rank_BW1 - noisy_BWM + torch.log1p(-torch.exp(noisy_BWM - highest_BW1))
        rank_BWM = rank_BW1 - gap_BWM.relu() - torch.log1p(torch.exp(-gap_BWM.abs()))
        rank_BWM = torch.where(noisy_BWM == highest_BW1, rank_BW1, rank_BWM)
        rank_BWM = rank_BWM.masked_fill(log_prob_BWM == -torch.inf, -torch.inf)
        self._next = key_BWM, log_prob_BWM, rank_BWM
        return rank_BWM

    def keep(self, place_BW: Tensor) -> None:
        """Go on with the candidates at these places over all beams, (B, W) int64."""
        self._key_BW, self._log_prob_BW, self._rank_BW = (
            column.flatten(1).gather(1, place_BW) for column in self._next
        )


def mixed(key: Tensor) -> Tensor:
    """Another hash of each hash, int64; as `hashing.mixed`, with torch."""

    def shifted(key: Tensor, bits: int) -> Tensor:
        return (key >> bits) & ((1 << (64 - bits)) - 1)  # torch would bring the sign along

    key = key + _signed(0x9E3779B97F4A7C15)
    key = (key ^ shifted(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ shifted(key, 27)) * _signed(0x94D049BB133111EB)
    return key ^ shifted(key, 31)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def gumbel(key: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from hashes."""
    uniform = ((key >> 12).double() + 2**51 + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform)).float()


class RecordedSearch:
    """A search on a GPU, recorded once for each shape as a CUDA graph and replayed with new inputs.

    The levels launch hundreds of small kernels, which take longer to launch one by one than to run. So
    that few shapes come, batches are padded: users and closed candidates to a power of two, histories to
    a multiple of 16 tokens. All graphs share their memory, because one runs at a time and its results are
    copied.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs = dict[Any, tuple[Any, list[Tensor], tuple[Tensor, Tensor]]]()

    def __call__(
        self, history_BT: Tensor, closed: tuple[Closed, ...] | None, seed_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As the search itself."""
        num_users = len(history_BT)
        inputs, rebuild = padded(history_BT, closed, seed_B)
        key = (closed is None, seed_B is None, *(tuple(tensor.shape) for tensor in inputs))
        if key not in self._graphs:
            self._graphs[key] = self._record(inputs, rebuild)
        graph, held, (found_BW, score_BW) = self._graphs[key]
        for place, tensor in zip(held, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return found_BW[:num_users].clone(), score_BW[:num_users].clone()

    def _record(self, inputs: list[Tensor], rebuild: Any) -> tuple[Any, list[Tensor], tuple[Tensor, Tensor]]:
        held = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries that set themselves up at first use must not be recorded
            self._search(*rebuild(held))
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            found = self._search(*rebuild(held))
        return graph, held, found


def padded(
    history_BT: Tensor, closed: tuple[Closed, ...] | None, seed_B: Tensor | None
) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Any, ...]]]:
    """Inputs of a search in one of few shapes, and how to make its arguments of such a list of tensors."""

    def longer(tensor: Tensor, length: int, value: int) -> Tensor:
        filled = tensor.new_full((length, *tensor.shape[1:]), value)
        filled[: len(tensor)] = tensor
        return filled

    num_users = power_of_two(len(history_BT))
    missing = -history_BT.shape[1] % LENGTH_MULTIPLE
    history_BT = torch.nn.functional.pad(history_BT, (0, missing), value=PAD)
    inputs = [longer(history_BT, num_users, PAD)]
    if seed_B is not None:
        inputs.append(longer(seed_B, num_users, 0))
    length = power_of_two(max((len(one.user_E) for one in closed or ()), default=0))
    for one in closed or ():
        # no beam is at node -1
        inputs += [longer(column, length, -1 if column is one.node_E else 0) for column in one]

    def rebuild(tensors: list[Tensor]) -> tuple[Any, ...]:
        rest = tensors[1 if seed_B is None else 2 :]
        levels = tuple(Closed(*rest[first : first + 3]) for first in range(0, len(rest), 3))
        return tensors[0], None if closed is None else levels, None if seed_B is None else tensors[1]

    return inputs, rebuild


def power_of_two(count: int) -> int:
    """The least power of two that is not less, at least 1."""
    return 1 << max(count - 1, 0).bit_length()


class Decoder:
    """Recommends items: a model, the Semantic IDs it may write, and how to decode.

    On a CPU each of torch's threads decodes batches of its own, which is faster than sharing one.
    """

    def __init__(
        self,
        model: TigerModel,
        codes_NI: npt.NDArray[np.int16],
        eligible_N: npt.NDArray[np.bool_],
        settings: DecodingSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        """Get ready to decode.

        Args:
            model: trained on the ID space of `codes_NI`; it is left as it is.
            codes_NI: Semantic IDs by item_index, (N, I) int16.
            eligible_N: may the item be recommended, (N,) bool.
            settings: beam width, precision and batch size.
            device: where to decode.

        Raises:
            ArtifactError: model and Semantic IDs belong to different ID spaces.
            DataError: no item is eligible.
        """
        self.device = torch.device(device)
        self.settings = settings
        model.vocabulary.require_codes(codes_NI)
        self.codes_NI = codes_NI
        dtype = dtype_of(settings.precision, self.device)
        self.model = InferenceModel(model, dtype, self.device, settings.temperature)
        self.trie = Trie.build(codes_NI, eligible_N).to(self.device)
        self._batch_tokens = settings.batch_tokens or BATCH_TOKENS[self.device.type]
        # of an excluded item, compared with each beam and with each child that is listed, beside that of a token
        lists = [edges.num_candidates for edges in self.trie.edges if edges.code is not None]
        self._tokens_per_excluded = max(settings.beam_width, *lists, 0) / 1024
        self._recorded: Search | None = None
        if self.device.type == "cuda":
            inference, trie, width = self.model, self.trie, settings.beam_width
            # nothing of `self`: in a cycle the graphs would keep gigabytes until Python looks for cycles
            self._recorded = RecordedSearch(
                lambda history_BT, closed, seed_B: beam_search(
                    inference, trie, history_BT, width, closed, seed_B
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
        """The k best items of each user, or k that are drawn.

        Args:
            item_index: items of all histories one after the other, each oldest first, (E,) int32.
            lengths_B: items per history, (B,) integer, at least 1; the model reads the last
                `model.max_history` of them.
            user_buckets_B: hash bucket of each user, (B,) integer; None: no user token.
            k: items per user, at most `decoding.beam_width`.
            exclude_history: leave out the items of the whole history.
            seed_B: draw without replacement by these seeds of the users, (B,) int64; None: the best.

        Returns:
            item_index, (B, k) int64, best first or first drawn, -1 after the last; and score, (B, k)
            float32, natural log probability, -inf where there is no item.

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
            torch.set_num_threads(threads)  # what a thread sets, threads to come inherit
        return found_BK, score_BK

    def _batches(
        self, read_B: npt.NDArray[np.int64], excluded_B: npt.NDArray[np.int64]
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Users of about one history length, as many as the budget of tokens allows, longest first."""
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
                count = 1 << (count.bit_length() - 1)  # or padding would exceed the budget
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
        """One batch."""
        vocabulary = self.model.vocabulary
        user_tokens = None
        if user_buckets_B is not None:
            user_tokens = torch.from_numpy(user_buckets_B.astype(np.int64) + vocabulary.user_offset)
        history_BT = pad_histories(
            vocabulary.tokens(self.codes_NI[item_E]), torch.from_numpy(lengths_B), user_tokens
        )
        with torch.inference_mode():
            closed = None
            if excluded is not None:
                item_X, user_X = excluded
                codes_XI = torch.from_numpy(self.codes_NI[item_X].astype(np.int64))
                closed = self.trie.closed(codes_XI.to(self.device), torch.from_numpy(user_X).to(self.device))
            seed = None if seed_B is None else torch.from_numpy(seed_B).to(self.device)
            history_BT = history_BT.to(self.device)
            if self._recorded is not None:
                found_BW, score_BW = self._recorded(history_BT, closed, seed)
            else:
                width = self.settings.beam_width
                found_BW, score_BW = beam_search(self.model, self.trie, history_BT, width, closed, seed)
            return found_BW[:, :k].cpu().numpy(), score_BW[:, :k].cpu().numpy()


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, and its threads share it.

    Otherwise each large matrix is new memory, whose pages cost a fault each: a tenth of the time of decoding.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # names and numbers of malloc.h
        mallopt(trim_threshold, -1)  # never: what a training step frees in the end may be gigabytes
        if not mallopt(mmap_threshold, 2**30):
            # older versions of glibc refuse more, and would then map and unmap whatever exceeds 128 KiB
            mallopt(mmap_threshold, 2**25)
        mallopt(arena_max, 1)


def best_first(
    found_BK: npt.NDArray[np.int64], score_BK: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Items and scores, (B, K) each, with the highest score first; what is drawn comes in another order."""
    place_BK = np.argsort(-score_BK, axis=1, kind="stable")
    return np.take_along_axis(found_BK, place_BK, 1), np.take_along_axis(score_BK, place_BK, 1)


def ranges(start_B: npt.NDArray[np.int64], length_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """All integers from each start on, as many as its length, one range after the other."""
    before_B = np.cumsum(length_B) - length_B
    return np.repeat(start_B - before_B, length_B) + np.arange(length_B.sum())
