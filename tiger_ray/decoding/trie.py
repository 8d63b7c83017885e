"""Semantic IDs of the eligible items as a prefix tree in flat arrays, for constrained decoding.

N items, I id_length, B users in batch, W beams, C codewords of a level, M candidates of one beam, E excluded
items of all users in batch.

A node is a prefix of an eligible Semantic ID. The nodes of one depth are numbered from 0 in
lexicographic order, so the children of a node are a range of the next depth, and a lower number is a
lower Semantic ID. Depth 0 is the root; the nodes of depth I are the leaves, one per eligible item.

A beam stores its node. At depths whose nodes have many children, a table tells which codewords may follow a
node. At depths whose nodes have few children, the trie lists the children. The number of items changes the
size of the arrays, not the number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.errors import DataError

MAX_TABLE_BYTES = 2**26
"""Most memory that the table of one level may take."""


@dataclass(frozen=True)
class Edges:
    """Edges from the nodes of one depth to their children.

    >>> edges = Edges.build(np.array([0, 2, 3], np.int32), np.array([0, 1, 1], np.int16))
    >>> child_BW, code_BW = edges.follow(torch.tensor([[1]]), torch.tensor([[1]]))
    >>> child_BW.item(), code_BW.item()
    (2, 1)
    """

    first_child: Tensor
    """First child of each node, and the end of the last node's children, (nodes + 1,) int32."""
    barred: Tensor | None
    """True for a codeword that does not follow a node, (nodes, C) bool; None with listed children."""
    code: Tensor | None
    """Codeword of each child, (children,) uint8 or int16; None with a table."""
    num_candidates: int
    """Candidates of one beam M: C with a table, else the most children of one node."""
    num_children: int
    """Number of nodes of the next depth."""

    @classmethod
    def build(cls, first_child: npt.NDArray[np.int32], code: npt.NDArray[np.int16]) -> Edges:
        """Choose a table or a list, and build it.

        Args:
            first_child: first child of each node, and the end of the last node's children, (nodes + 1,) int32.
            code: codeword of each child, (children,) int16.
        """
        counts = np.diff(first_child)
        num_codes, most, num_nodes = int(code.max()) + 1, int(counts.max()), len(counts)
        starts = torch.from_numpy(first_child)
        if 4 * most < num_codes or num_nodes * num_codes > MAX_TABLE_BYTES:
            narrow = code.astype(np.uint8) if num_codes <= 256 else code
            return cls(starts, None, torch.from_numpy(narrow), most, len(code))
        barred = np.ones(num_nodes * num_codes, dtype=bool)
        barred[np.repeat(np.arange(num_nodes) * num_codes, counts) + code] = False
        table = torch.from_numpy(barred.reshape(num_nodes, num_codes))
        return cls(starts, table, None, num_codes, len(code))

    def to(self, device: torch.device | str) -> Edges:
        """The edges on another device."""
        return Edges(
            self.first_child.to(device),
            None if self.barred is None else self.barred.to(device),
            None if self.code is None else self.code.to(device),
            self.num_candidates,
            self.num_children,
        )

    def candidates(self, node_BW: Tensor, log_prob_BWC: Tensor) -> Tensor:
        """Log-probabilities of the children of each node, in their order, (B, W, M); -inf without a child.

        Args:
            node_BW: nodes, (B, W) int64.
            log_prob_BWC: log-probabilities of all codewords of the level, (B, W, C) float.
        """
        if self.barred is not None:
            log_prob_BWM = log_prob_BWC[..., : self.num_candidates]
            return log_prob_BWM.masked_fill(self.barred[node_BW], -torch.inf)
        nth_M = torch.arange(self.num_candidates, device=node_BW.device)
        count_BW = self.first_child[node_BW + 1] - self.first_child[node_BW]
        log_prob_BWM = log_prob_BWC.gather(-1, self.codes(node_BW))
        return log_prob_BWM.masked_fill(nth_M >= count_BW[..., None], -torch.inf)

    def codes(self, node_BW: Tensor) -> Tensor:
        """Codeword of each candidate of each node, (B, W, M) int64; any codeword without a child."""
        nth_M = torch.arange(self.num_candidates, device=node_BW.device)
        if self.code is None:
            return nth_M.expand(*node_BW.shape, -1)
        child_BWM = self.first_child[node_BW][..., None] + nth_M
        return self.code[child_BWM.clamp(max=self.num_children - 1)].long()

    def follow(self, node_BW: Tensor, nth_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Child and codeword of candidate number `nth_BW` of each node, (B, W) int64 each."""
        if self.barred is not None:
            code_BW = nth_BW
            before_C = torch.arange(self.num_candidates, device=node_BW.device) < nth_BW[..., None]
            nth_BW = (before_C & ~self.barred[node_BW]).sum(-1)
        child_BW = (self.first_child[node_BW] + nth_BW).clamp(max=self.num_children - 1)
        if self.code is not None:
            code_BW = self.code[child_BW].long()
        return child_BW, code_BW

    def find(self, node_E: Tensor, code_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates by codeword.

        Args:
            node_E: nodes, (E,) int64.
            code_E: codewords, (E,) int64.

        Returns:
            Number of the candidate within its node, (E,) int64; its child, (E,) int64; and true if the
            codeword follows the node, (E,) bool.
        """
        if self.barred is not None:
            there_E = code_E < self.num_candidates
            nth_E = code_E.clamp(max=self.num_candidates - 1)
            there_E = there_E & ~self.barred[node_E, nth_E]
        else:
            count_E = self.first_child[node_E + 1] - self.first_child[node_E]
            nth_M = torch.arange(self.num_candidates, device=node_E.device)
            same_EM = (self.codes(node_E) == code_E[:, None]) & (nth_M < count_E[:, None])
            there_E, nth_E = same_EM.max(-1)
        return nth_E, self.follow(node_E, nth_E)[0], there_E


class Barred(NamedTuple):
    """Candidates of one level that are barred for some users.

    >>> trie = Trie.build(np.array([[0, 0], [0, 1], [1, 0]], np.int16), np.ones(3, bool))
    >>> first, last = trie.find_barred(torch.tensor([[1, 0]]), torch.tensor([0]))
    >>> first.nth_E.tolist(), last.node_E.tolist(), last.nth_E.tolist()
    ([1], [1], [0])
    """

    user_E: Tensor
    """Place of the user in the batch, (E,) int64."""
    node_E: Tensor
    """Node of the beam, (E,) int64."""
    nth_E: Tensor
    """Number of the candidate within that node, (E,) int64."""


@dataclass(frozen=True)
class Trie:
    """The prefix tree of the eligible Semantic IDs.

    >>> trie = Trie.build(np.array([[1, 0], [0, 1], [0, 0]], np.int16), np.array([True, True, False]))
    >>> trie.item_index.tolist()
    [1, 0]
    """

    edges: tuple[Edges, ...]
    """Edges from depth 0 to 1, ... from depth I - 1 to I."""
    item_index: Tensor
    """Item of each leaf, (leaves,) int32."""

    @classmethod
    def build(cls, codes_NI: npt.NDArray[np.int16], eligible_N: npt.NDArray[np.bool_]) -> Trie:
        """The trie of all eligible items.

        Args:
            codes_NI: Semantic IDs, (N, I) int16; those of eligible items are distinct.
            eligible_N: true for an item that may be recommended, (N,) bool.

        Raises:
            DataError: no item is eligible, or two eligible items share a Semantic ID.

        Source: ours; tables above, lists below is STATIC's (arXiv 2602.22647).
        """
        item_index = np.flatnonzero(eligible_N).astype(np.int32)
        if not len(item_index):
            raise DataError(
                f"none of the {len(eligible_N)} items may be recommended; "
                "check the column that catalog.available names, and the catalog itself"
            )
        codes_NI = codes_NI if len(item_index) == len(codes_NI) else codes_NI[item_index]
        order = _lexicographic_order(codes_NI)
        if order is not None:
            item_index = item_index[order]
        # true for the first row of each prefix, in lexicographic order
        is_first = np.zeros(len(item_index), dtype=bool)
        is_first[0] = True
        parent_starts = np.array([0, len(item_index)], dtype=np.int32)
        edges = []
        for column in codes_NI.T:
            column = np.ascontiguousarray(column) if order is None else column[order]
            is_first[1:] |= column[1:] != column[:-1]
            starts = np.append(np.flatnonzero(is_first), len(column)).astype(np.int32)
            first_child = np.searchsorted(starts, parent_starts).astype(np.int32)
            edges.append(Edges.build(first_child, column[starts[:-1]]))
            parent_starts = starts
        if not is_first.all():
            twin = int(np.argmin(is_first))
            twins = sorted(item_index[twin - 1 : twin + 1].tolist())
            row = twin if order is None else order[twin]
            raise DataError(
                f"items {twins[0]} and {twins[1]} share the Semantic ID {tuple(codes_NI[row].tolist())}; "
                "the Semantic IDs are damaged"
            )
        return cls(tuple(edges), torch.from_numpy(item_index))

    def to(self, device: torch.device | str) -> Trie:
        """The trie on another device."""
        return Trie(tuple(edges.to(device) for edges in self.edges), self.item_index.to(device))

    def find_barred(self, codes_EI: Tensor, user_E: Tensor) -> tuple[Barred, ...]:
        """Candidates without a leaf that the user may get: all leaves below them are excluded.

        Args:
            codes_EI: Semantic IDs of the excluded items of all users, (E, I) int64; repeats and items that
                are not eligible have no effect.
            user_E: place in the batch of each excluded item's user, (E,) int64.

        Returns:
            The candidates to bar, one entry for each level.
        """
        node_E = torch.zeros_like(user_E)
        there_E = torch.ones_like(user_E, dtype=torch.bool)
        path = []
        for edges, code_E in zip(self.edges, codes_EI.T, strict=True):
            nth_E, child_E, found_E = edges.find(node_E, code_E)
            there_E &= found_E
            path.append((node_E, nth_E, child_E))
            node_E = child_E
        # Keep each pair of user and leaf once, sorted; this is their order at every depth.
        pair_E, place_E = (user_E * len(self.item_index) + node_E)[there_E].sort()
        is_new = torch.ones_like(pair_E, dtype=torch.bool)
        is_new[1:] = pair_E[1:] != pair_E[:-1]
        kept_E = there_E.nonzero()[:, 0][place_E[is_new]]
        user_E = user_E[kept_E]
        barred = []
        for depth, (edges, step) in enumerate(zip(self.edges, path, strict=True), start=1):
            node_E, nth_E, child_E = (column[kept_E] for column in step)
            pair_E = user_E * edges.num_children + child_E
            _, count_E = torch.unique_consecutive(pair_E, return_counts=True)
            first_E = count_E.cumsum(0) - count_E
            full_E = first_E[count_E == self._num_leaves(depth, child_E[first_E])]
            barred.append(Barred(user_E[full_E], node_E[full_E], nth_E[full_E]))
        return tuple(barred)

    def _num_leaves(self, depth: int, node_E: Tensor) -> Tensor:
        """Number of leaves below nodes of one depth."""
        end_E = node_E + 1
        for edges in self.edges[depth:]:
            node_E, end_E = edges.first_child[node_E].long(), edges.first_child[end_E].long()
        return end_E - node_E


def _lexicographic_order(codes_NI: npt.NDArray[np.int16]) -> npt.NDArray[np.int64] | None:
    """Rows in the order of their codes; None if they are in order already."""
    sizes = [int(column.max()) + 1 for column in codes_NI.T]
    if math.prod(sizes) >= 2**63:
        return np.lexsort(codes_NI.T[::-1])
    # Sorting one integer per row is much faster than sorting by columns.
    key_N = np.zeros(len(codes_NI), dtype=np.int64)
    for column, size in zip(codes_NI.T, sizes, strict=True):
        key_N *= size
        key_N += column
    return None if (key_N[1:] > key_N[:-1]).all() else np.argsort(key_N)
