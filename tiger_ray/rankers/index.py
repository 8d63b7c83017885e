"""User vectors and item vectors -> the items with the largest inner products, found exactly or approximately.

An index holds eligible items only. An index knows no histories: for a user who must not get n items, a ranker fetches
n more items and drops these (`base.without_newest`).

B users, K items per user, P places of a fetched list (P >= K), N items, M items of an index, D width of the
vectors, L = D + 1 width of lifted ones, E events of all users. A lower-case letter counts a part of what the upper-case one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.errors import SettingsError
from tiger_ray.rankers.base import Lists

USERS_AT_ONCE, ITEMS_AT_ONCE = 256, 16_384
"""Scores that are in memory together."""


PLACE = 2**32 - 1
"""Lower half of a key."""


class Index(Protocol):
    """Finds the items with the largest inner products."""

    def search(self, user_BD: npt.NDArray[np.float32], count: int) -> Lists:
        """The best `count` items of each user vector, (B, D)."""


class Exact:
    """Compares every user with every eligible item.

    >>> index = Exact(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]), np.array([True, False, True]))
    >>> item_BP, score_BP = index.search(np.array([[1, 0]], np.float32), 2)
    >>> item_BP.tolist(), score_BP.tolist()
    ([[2, 0]], [[2.0, 1.0]])
    """

    def __init__(
        self, item_ND: Tensor, eligible_N: npt.NDArray[np.bool_], device: torch.device | str = "cpu"
    ) -> None:
        """Copy the vectors of the eligible items.

        Args:
            item_ND: item vectors, (N, D) float32.
            eligible_N: whether the item may be recommended, (N,) bool.
            device: where to compare.
        """
        eligible = torch.from_numpy(np.flatnonzero(eligible_N))
        self._item_MD = item_ND.detach()[eligible.to(item_ND.device)].to(device)
        self._item_index_M = eligible.to(device)

    def search(self, user_BD: npt.NDArray[np.float32], count: int) -> Lists:
        """The best `count` items of each user vector, (B, D)."""
        users = torch.split(torch.from_numpy(user_BD).to(self._item_MD.device), USERS_AT_ONCE)
        parts = [self._search(user_bD, count) for user_bD in users]
        item_index_BP = torch.cat([item_index for item_index, _ in parts]).cpu().numpy()
        return _filled(item_index_BP, torch.cat([score for _, score in parts]).cpu().numpy(), count)

    def _search(self, user_bD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        best_bP = torch.empty(len(user_bD), 0, dtype=torch.int64, device=user_bD.device)
        first = 0
        for item_mD in torch.split(self._item_MD, ITEMS_AT_ONCE):
            key_bm = _keys(user_bD @ item_mD.T, first)
            best_bP = torch.cat([best_bP, key_bm.topk(min(count, len(item_mD))).values], 1)
            best_bP = best_bP.topk(min(count, best_bP.shape[1])).values
            first += len(item_mD)
        place_bP = PLACE - (best_bP & PLACE)
        return self._item_index_M[place_bP], _in_order(best_bP >> 32).view(torch.float32)


def _keys(score_bm: Tensor, first: int) -> Tensor:
    """Integers in the order of the float32 scores; of two equal scores, the lower place has the larger integer.

    Args:
        score_bm: scores of b users and m items, (b, m) float32.
        first: place of the first of the m items.
    """
    ordered_bm = _in_order((score_bm + 0.0).view(torch.int32)).long()  # + 0.0, for -0.0 is 0.0
    return (ordered_bm << 32) + torch.arange(
        PLACE - first, PLACE - first - score_bm.shape[1], -1, device=score_bm.device
    )


def _in_order(bits: Tensor) -> Tensor:
    """Bits of floats as integers in the order of the floats; applied twice, the bits again."""
    bits = bits.int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


class Approximate:
    """Compares a user with the items that a FAISS index proposes, by exact inner products."""

    def __init__(
        self,
        index: Any,
        item_MD: npt.NDArray[np.float32],
        eligible_N: npt.NDArray[np.bool_],
        parameters: Callable[[int], Any],
    ) -> None:
        """Take the index.

        Args:
            index: a FAISS index of the `lifted` eligible items.
            item_MD: vectors of the eligible items, (M, D) float32.
            eligible_N: whether the item may be recommended, (N,) bool.
            parameters: from the number of items asked for to FAISS search parameters.
        """
        self._index, self._item_MD, self._parameters = index, item_MD, parameters
        self._item_index_M = np.flatnonzero(eligible_N)

    def search(self, user_BD: npt.NDArray[np.float32], count: int) -> Lists:
        """The best `count` items of each user vector, (B, D), among the proposed ones."""
        asked = min(count, len(self._item_index_M))
        parts = np.split(user_BD, range(USERS_AT_ONCE, len(user_BD), USERS_AT_ONCE))
        item_index_BP, score_BP = (
            np.concatenate(found)
            for found in zip(*(self._search(part, asked) for part in parts), strict=True)
        )
        return _filled(item_index_BP, score_BP, count)

    def _search(self, user_bD: npt.NDArray[np.float32], asked: int) -> Lists:
        _, place_bP = self._index.search(
            np.pad(user_bD, ((0, 0), (0, 1))), asked, params=self._parameters(asked)
        )
        score_bP = np.einsum("bd,bpd->bp", user_bD, self._item_MD[place_bP])
        score_bP = np.where(place_bP < 0, -np.inf, score_bP)
        item_index_bP = np.where(place_bP < 0, -1, self._item_index_M[place_bP])
        order_bP = np.lexsort((item_index_bP, -score_bP))
        return np.take_along_axis(item_index_bP, order_bP, 1), np.take_along_axis(score_bP, order_bP, 1)


def lifted(item_MD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Add one coordinate to each item, so that all items have the same norm: (M, D + 1).

    A user gets 0 as last coordinate. Then the item with the largest inner product is the nearest item, and an index
    of distances finds it. An index of inner products works worse, because items with a large norm are neighbours of
    every user.

    Source: Bachrach et al. 2014 (Speeding up the Xbox recommender system).
    """
    square_M = np.einsum("md,md->m", item_MD, item_MD, dtype=np.float64)
    rest_M = np.sqrt(square_M.max(initial=0.0) - square_M)
    return np.concatenate([item_MD, rest_M[:, None].astype(np.float32)], axis=1)


def ivf_flat(
    item_ND: npt.NDArray[np.float32],
    eligible_N: npt.NDArray[np.bool_],
    *,
    num_lists: int = 128,
    num_probes: int = 48,
) -> Approximate:
    """FAISS IVF-Flat: items in lists around centroids; a user is compared with the items of the nearest lists.

    Args:
        item_ND: item vectors, (N, D).
        eligible_N: whether the item may be recommended, (N,) bool.
        num_lists: centroids.
        num_probes: lists that a user is compared with.

    Raises:
        SettingsError: faiss is not installed.

    Source: Sivic and Zisserman 2003; Johnson et al. 2019 (FAISS).
    """
    faiss = _faiss()
    item_MD = np.ascontiguousarray(item_ND[eligible_N])
    lifted_ML = lifted(item_MD)
    width = lifted_ML.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, min(num_lists, len(item_MD)))
    index.train(lifted_ML)
    index.add(lifted_ML)
    return Approximate(index, item_MD, eligible_N, lambda _: faiss.SearchParametersIVF(nprobe=num_probes))


def hnsw(
    item_ND: npt.NDArray[np.float32],
    eligible_N: npt.NDArray[np.bool_],
    *,
    num_links: int = 32,
    build_width: int = 200,
    search_width: int = 256,
) -> Approximate:
    """FAISS HNSW: a graph that links near items; a search walks the graph to the nearest items.

    Args:
        item_ND: item vectors, (N, D).
        eligible_N: whether the item may be recommended, (N,) bool.
        num_links: of each item on each level, M in the paper.
        build_width: candidates kept while the graph is built, efConstruction.
        search_width: candidates kept in a search, efSearch; at least the number of items asked for is used.

    Raises:
        SettingsError: faiss is not installed.

    Source: Malkov and Yashunin 2016 (arXiv 1603.09320).
    """
    faiss = _faiss()
    item_MD = np.ascontiguousarray(item_ND[eligible_N])
    lifted_ML = lifted(item_MD)
    index = faiss.IndexHNSWFlat(lifted_ML.shape[1], num_links)
    index.hnsw.efConstruction = build_width
    index.add(lifted_ML)
    return Approximate(
        index,
        item_MD,
        eligible_N,
        lambda count: faiss.SearchParametersHNSW(efSearch=max(search_width, count)),
    )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise SettingsError("an approximate index needs faiss: pip install 'tiger-ray[studies]'") from None
    return faiss


def _filled(item_index_BP: npt.NDArray[np.int64], score_BP: npt.NDArray[np.float32], count: int) -> Lists:
    """Pad lists with empty places up to `count` places."""
    missing = ((0, 0), (0, count - item_index_BP.shape[1]))
    return (
        np.pad(item_index_BP, missing, constant_values=-1),
        np.pad(score_BP, missing, constant_values=-np.inf),
    )
