"""Ranked items -> Recall@K and NDCG@K: full ranking, item level, one held-out event per user.

A hit is the target item itself, with its disambiguator; an item that only shares its codewords is a miss.
With one relevant item per user, Recall@K is the share of users whose target is among the first K, and
NDCG@K weighs each by 1 / log2(rank + 1).

B users, P places of a ranked list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NOT_RANKED = 2**62
"""Rank of a target that is not in the list; beyond every K."""


def ranks(item_index_BP: npt.NDArray[np.int64], target_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rank of each user's target, 1 for the best.

    Args:
        item_index_BP: ranked items, (B, P); -1 after the last. A repeated item counts at its best place.
        target_B: held-out items, (B,).

    Returns:
        (B,) int64; `NOT_RANKED` where the target is not in the list.
    """
    hit_BP = item_index_BP == target_B[:, None]
    # A list may be shorter than K: the place after its end would count as a hit.
    place_B = hit_BP.argmax(axis=1) if hit_BP.shape[1] else 0
    return np.where(hit_BP.any(axis=1), place_B + 1, NOT_RANKED)


def metric_sums(rank_B: npt.NDArray[np.int64], ks: Sequence[int]) -> dict[str, float]:
    """Sums over users of each metric, and the number of users; sums of parts add up to the whole.

    Source: Recall@K and NDCG@K for leave-one-out as in the paper, section 4.
    """
    gain_B = 1 / np.log2(rank_B + 1)
    sums: dict[str, float] = {"users": len(rank_B)}
    for k in ks:
        within_B = rank_B <= k
        sums[f"recall@{k}"] = float(within_B.sum())
        sums[f"ndcg@{k}"] = float(gain_B[within_B].sum())
    return sums


def means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics over all users from the sums of disjoint parts; `users` stays a count."""
    users = sum(part["users"] for part in parts)
    names = [name for name in parts[0] if name != "users"]
    return {"users": users, **{name: sum(part[name] for part in parts) / max(users, 1) for name in names}}
