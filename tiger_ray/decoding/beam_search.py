"""Constrained beam search: model and trie to ranked items, which are all valid and eligible.

B users in batch, T history tokens, I id_length, W beams, M candidates of one beam, P = W M candidates of a user,
E barred candidates of all users.

A beam is a node of the trie. At each level the search keeps the W best children of all beams of a user.
Between levels the beams are sorted by Semantic ID, so that of equal scores the lower Semantic ID comes first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiger_ray.decoding.inference import InferenceModel
from tiger_ray.decoding.sampling import Draw
from tiger_ray.decoding.trie import Barred, Trie
from tiger_ray.model.tokens import PAD

Search = Callable[[Tensor, tuple[Barred, ...] | None, Tensor | None], tuple[Tensor, Tensor]]
"""Histories, barred candidates, seeds -> item_index and score, as in `beam_search`."""


def beam_search(
    model: InferenceModel,
    trie: Trie,
    history_BT: Tensor,
    beam_width: int,
    barred: tuple[Barred, ...] | None = None,
    seed_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The items with the most probable Semantic IDs after each history, or a random draw of items.

    Args:
        model: on the device of `trie` and `history_BT`.
        trie: Semantic IDs of the eligible items.
        history_BT: token ids, (B, T) int64, PAD after the end.
        beam_width: W; the search is exact if W is at least the number of eligible items.
        barred: candidates to leave out for some users, from `Trie.find_barred`, one entry per level; None: none.
        seed_B: one seed per user, (B,) int64, to draw W items without replacement; None for the most probable
            items. Each codeword is drawn by its probability among the codewords of allowed items. The draw
            depends on the seed and the user's history only.

    Returns:
        item_index, (B, W) int64, best first (or first drawn), -1 after the last item; and score, (B, W)
        float32, natural log probability of the whole Semantic ID, -inf after the last item. Without seeds,
        equal scores are in the order of Semantic IDs.

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
        if barred is not None:
            bar(log_prob_BWM, node_BW, barred[level])
        score_BP = (score_BW[..., None] + log_prob_BWM).flatten(1)
        rank_BP = score_BP
        if draw is not None:
            rank_BP = draw.extend(log_prob_BWM, edges.codes(node_BW)).flatten(1)
        place_BW = best_places(rank_BP, min(beam_width, edges.num_children))
        is_last = level + 1 == len(trie.edges)
        if not is_last:
            place_BW = place_BW.sort().values  # the order of Semantic IDs
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


def bar(log_prob_BWM: Tensor, node_BW: Tensor, barred: Barred) -> None:
    """Set the log-probabilities of barred candidates to -inf, in place.

    Args:
        log_prob_BWM: of each candidate, (B, W, M) float32; changed.
        node_BW: node of each beam, (B, W) int64.
        barred: candidates of this level.
    """
    _, width, num_candidates = log_prob_BWM.shape
    at_EW = node_BW[barred.user_E] == barred.node_E[:, None]
    beam_EW = barred.user_E[:, None] * width + torch.arange(width, device=node_BW.device)
    place_EW = beam_EW * num_candidates + barred.nth_E[:, None]
    # Avoid nonzero(): its data-dependent size would force a GPU sync.
    bar_EW = torch.where(at_EW, -torch.inf, 0.0)
    log_prob_BWM.view(-1).index_add_(0, place_EW.flatten(), bar_EW.flatten())


def best_places(score_BP: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores, (B, count) int64, best first; of equal scores the lowest place."""
    # topk leaves the order of ties open, so rank by one integer: the bits of the score, then the place.
    bits_BP = score_BP.view(torch.int32)
    ordered_BP = torch.where(bits_BP < 0, bits_BP ^ 0x7FFFFFFF, bits_BP).long()
    last = score_BP.shape[1] - 1
    rank_BP = (ordered_BP << 32) | (last - torch.arange(last + 1, device=score_BP.device))
    return last - (rank_BP.topk(count).values & 0xFFFFFFFF)
