"""Constrained beam search: model and trie to ranked items, none of them invalid or ineligible.

B users in batch, T history tokens, I id_length, W beams, M candidates of one beam, C codewords of a level,
N items, E events of all users; K only for top-K.

Beams are trie nodes. At each level a beam may only go on to its node's children, and the W best
children over all beams of a user are kept. Between levels the beams are sorted by Semantic ID, so that
equal scores are broken by the lower Semantic ID, always.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiger_ray.decoding.inference import InferenceModel
from tiger_ray.decoding.sampling import Draw
from tiger_ray.decoding.trie import Closed, Trie
from tiger_ray.model.tokens import PAD

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
