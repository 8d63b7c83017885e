"""Constrained beam search: model and trie to ranked items, none of them invalid or ineligible.

B users in batch, T history tokens, I id_length, W beams, M most children of one node, C codewords of a
level, N items, E events of all users; K only for top-K.

Beams are trie nodes. At each level a beam may only go on to its node's children, and the W best
children over all beams of a user are kept. Between levels the beams are sorted by Semantic ID, so that equal scores
are broken by the lower Semantic ID, always.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.config import DecodingSettings
from tiger_ray.model import TigerModel
from tiger_ray.tokens import PAD, pad_histories
from tiger_ray.trie import Trie


def beam_search(
    model: TigerModel,
    trie: Trie,
    history_BT: Tensor,
    beam_width: int,
    closed: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """The items whose Semantic IDs are the most probable continuation of each history.

    Args:
        model: in evaluation mode, on the device of `trie` and `history_BT`.
        trie: Semantic IDs that may come out.
        history_BT: token ids, (B, T) int64, PAD after the end.
        beam_width: candidates kept per level W; exact if it is at least the number of eligible items.
        closed: nodes barred per user, of `Trie.closed_nodes`; None: none.

    Returns:
        item_index, (B, W) int64, best first, -1 after the last; and score, (B, W) float32, natural log
        probability of the whole Semantic ID, -inf where there is no item. Equal scores come in the order
        of the Semantic IDs.

    Source: TIGER (arXiv 2305.05065) section 3.3 for beam search; the trie constraint and the sharing of
    cross-attention by all beams are ours.
    """
    num_users, device = len(history_BT), history_BT.device
    state = model.start(history_BT)
    node_BW = torch.zeros(num_users, 1, dtype=torch.int64, device=device)
    token_BW = torch.full_like(node_BW, PAD)
    score_BW = torch.zeros(num_users, 1, device=device)
    for level in range(trie.id_length):
        log_prob_BWC = model.next_log_probs(token_BW, state)
        start_BW = trie.child_start[level][node_BW]
        count_BW = trie.child_start[level][node_BW + 1] - start_BW
        nth_M = torch.arange(trie.max_children[level], device=device)
        # a place beyond the last child reads some other node, and is closed by the score
        child_BWM = (start_BW[..., None] + nth_M).clamp(max=trie.num_nodes(level + 1) - 1)
        code_BWM = trie.child_code[level][child_BWM]
        score_BWM = score_BW[..., None] + log_prob_BWC.gather(-1, code_BWM.long())
        score_BWM = score_BWM.masked_fill(nth_M >= count_BW[..., None], -torch.inf)
        if closed is not None and len(closed[level]):
            user_B11 = torch.arange(num_users, device=device)[:, None, None]
            score_BWM = score_BWM.masked_fill(
                torch.isin(user_B11 * trie.num_nodes(level + 1) + child_BWM, closed[level]), -torch.inf
            )
        width = min(beam_width, trie.num_nodes(level + 1))
        place_BW = best_places(score_BWM.flatten(1), width)
        if level + 1 < trie.id_length:
            place_BW = place_BW.sort().values  # by Semantic ID again
        score_BW = score_BWM.flatten(1).gather(1, place_BW)
        node_BW = child_BWM.flatten(1).gather(1, place_BW)
        token_BW = code_BWM.flatten(1).gather(1, place_BW).long() + model.vocabulary.offsets[level]
        if level + 1 < trie.id_length:
            state.reorder(place_BW // trie.max_children[level])
    item_BW = trie.item_index[node_BW].long().masked_fill(score_BW == -torch.inf, -1)
    missing = beam_width - item_BW.shape[1]
    return (
        torch.nn.functional.pad(item_BW, (0, missing), value=-1),
        torch.nn.functional.pad(score_BW, (0, missing), value=-torch.inf),
    )


def best_places(score_BP: Tensor, count: int) -> Tensor:
    """Places of the highest scores, best first, of equal ones the lowest, (B, count) int64."""
    # topk breaks ties as it likes, so rank by one integer: the score's bits in its order, then the place
    bits_BP = score_BP.view(torch.int32)
    ordered_BP = torch.where(bits_BP < 0, bits_BP ^ 0x7FFFFFFF, bits_BP).long()
    last = score_BP.shape[1] - 1
    rank_BP = (ordered_BP << 32) | (last - torch.arange(last + 1, device=score_BP.device))
    return last - (rank_BP.topk(count).values & 0xFFFFFFFF)


class Decoder:
    """Recommends items: a model, the Semantic IDs it may write, and how to decode."""

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
            model: trained on the ID space of `codes_NI`; it is moved to the device.
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
        self.model = model.to(self.device).eval()
        self.item_tokens_NI = model.vocabulary.item_tokens(codes_NI).to(self.device)
        self.trie = Trie.build(codes_NI, eligible_N).to(self.device)

    def recommend(
        self,
        item_index: npt.NDArray[np.int32],
        lengths_B: npt.NDArray[np.int64],
        user_buckets_B: npt.NDArray[np.int64] | None,
        k: int,
        *,
        exclude_history: bool = False,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The k best items of each user.

        Args:
            item_index: items of all histories one after the other, each oldest first, (E,) int32.
            lengths_B: items per history, (B,) integer, at least 1; the model reads the last
                `model.max_history` of them.
            user_buckets_B: hash bucket of each user, (B,) integer; None: no user token.
            k: items per user, at most `decoding.beam_width`.
            exclude_history: leave out the items of the whole history.

        Returns:
            item_index, (B, k) int64, best first, -1 after the last; and score, (B, k) float32, natural log
            probability, -inf where there is no item.
        """
        assert k <= self.settings.beam_width
        assert lengths_B.min(initial=1) >= 1
        end_B = np.cumsum(lengths_B)
        read_B = np.minimum(lengths_B, self.model.settings.max_history)
        found_BK = np.full((len(lengths_B), k), -1, dtype=np.int64)
        score_BK = np.full((len(lengths_B), k), -np.inf, dtype=np.float32)
        # users of one batch have histories of about one length, so little is padding
        by_length_B = np.argsort(read_B, kind="stable")
        for first in range(0, len(by_length_B), self.settings.batch_size):
            user_b = by_length_B[first : first + self.settings.batch_size]
            length_b = read_B[user_b]
            history_bT = pad_histories(
                torch.from_numpy(item_index[ranges(end_B[user_b] - length_b, length_b)]),
                torch.from_numpy(length_b),
                self.item_tokens_NI,
                None if user_buckets_B is None else self._user_tokens(user_buckets_B[user_b]),
            )
            closed = None
            if exclude_history:
                length_b = lengths_B[user_b]
                closed = self.trie.closed_nodes(
                    item_index[ranges(end_B[user_b] - length_b, length_b)], length_b
                )
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"),
            ):
                found_bW, score_bW = beam_search(
                    self.model, self.trie, history_bT, self.settings.beam_width, closed
                )
            found_BK[user_b] = found_bW[:, :k].cpu().numpy()
            score_BK[user_b] = score_bW[:, :k].cpu().numpy()
        return found_BK, score_BK

    def _user_tokens(self, user_buckets_B: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(user_buckets_B.astype(np.int64) + self.model.vocabulary.user_offset)


def ranges(start_B: npt.NDArray[np.int64], length_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """All integers from each start on, as many as its length, one range after the other."""
    before_B = np.cumsum(length_B) - length_B
    return np.repeat(start_B - before_B, length_B) + np.arange(length_B.sum())
