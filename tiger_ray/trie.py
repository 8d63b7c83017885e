"""Semantic IDs of the eligible items as a prefix tree in flat arrays, for constrained decoding.

N items, I id_length, B users in batch, E excluded items of all users in batch.

A node is a prefix of an eligible Semantic ID. The nodes of one depth are numbered from 0 in
lexicographic order, so the children of a node are a range of the next depth, and a lower number is a
lower Semantic ID. Depth 0 is the root alone; the nodes of depth I are the leaves, one per eligible item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger_ray.errors import DataError


@dataclass(frozen=True)
class Trie:
    """Which codeword may follow which prefix."""

    child_start: tuple[Tensor, ...]
    """Per depth 0 to I - 1: first child of each node, and the end of the last one, (nodes + 1,) int32."""
    child_code: tuple[Tensor, ...]
    """Per depth 0 to I - 1: codeword that leads to each node of the next depth, (nodes there,) int16."""
    max_children: tuple[int, ...]
    """Per depth 0 to I - 1: most children of one node."""
    item_index: Tensor
    """Item of each leaf, (leaves,) int32."""
    leaf: npt.NDArray[np.int32]
    """Leaf of each item, -1 where it is not eligible, (N,) int32; on the CPU."""
    first_leaf: tuple[npt.NDArray[np.int32], ...]
    """Per depth 0 to I: first leaf under each node, and the end of the last one, (nodes + 1,); on the CPU."""

    @property
    def id_length(self) -> int:
        """Codewords of one Semantic ID."""
        return len(self.child_code)

    def num_nodes(self, depth: int) -> int:
        """Prefixes of this many codewords."""
        return 1 if depth == 0 else len(self.child_code[depth - 1])

    @classmethod
    def build(cls, codes_NI: npt.NDArray[np.int16], eligible_N: npt.NDArray[np.bool_]) -> Trie:
        """The trie of all eligible items.

        Args:
            codes_NI: Semantic IDs, (N, I) int16; no two of eligible items are equal.
            eligible_N: may the item be recommended, (N,) bool.

        Raises:
            DataError: no item is eligible, or two of them share a Semantic ID.

        Source: ours; the flat layout is that of STATIC (arXiv 2602.22647).
        """
        item_index = np.flatnonzero(eligible_N).astype(np.int32)
        if not len(item_index):
            raise DataError(
                f"none of the {len(eligible_N)} items may be recommended; "
                "check the column that catalog.available names, and the catalog itself"
            )
        id_length = codes_NI.shape[1]
        columns = [np.ascontiguousarray(codes_NI[item_index, level]) for level in range(id_length)]
        order = np.lexsort(columns[::-1])
        item_index = item_index[order]
        # is this row, in order, the first one of its prefix?
        is_first = np.zeros(len(order), dtype=bool)
        is_first[0] = True
        first_leaf = [np.array([0, len(order)], dtype=np.int32)]
        child_start, child_code = [], []
        for column in columns:
            column = column[order]
            is_first[1:] |= column[1:] != column[:-1]
            starts = np.append(np.flatnonzero(is_first), len(order)).astype(np.int32)
            child_start.append(np.searchsorted(starts, first_leaf[-1]).astype(np.int32))
            child_code.append(column[starts[:-1]])
            first_leaf.append(starts)
        if not is_first.all():
            twin = int(np.argmin(is_first))
            raise DataError(
                f"items {item_index[twin - 1]} and {item_index[twin]} share the Semantic ID "
                f"{tuple(codes_NI[item_index[twin]].tolist())}; the Semantic IDs are damaged"
            )
        leaf = np.full(len(eligible_N), -1, dtype=np.int32)
        leaf[item_index] = np.arange(len(item_index), dtype=np.int32)
        return cls(
            child_start=tuple(map(torch.from_numpy, child_start)),
            child_code=tuple(map(torch.from_numpy, child_code)),
            max_children=tuple(int(np.diff(start).max()) for start in child_start),
            item_index=torch.from_numpy(item_index),
            leaf=leaf,
            first_leaf=tuple(first_leaf),
        )

    def to(self, device: torch.device | str) -> Trie:
        """The same trie, its tensors on another device."""
        return Trie(
            child_start=tuple(start.to(device) for start in self.child_start),
            child_code=tuple(code.to(device) for code in self.child_code),
            max_children=self.max_children,
            item_index=self.item_index.to(device),
            leaf=self.leaf,
            first_leaf=self.first_leaf,
        )

    def closed_nodes(
        self, excluded: npt.NDArray[np.int32], lengths_B: npt.NDArray[np.int64]
    ) -> tuple[Tensor, ...]:
        """Nodes under which a user has nothing left, because every leaf there is excluded for that user.

        Args:
            excluded: excluded items of all users one after the other, (E,) int32; repeats are fine.
            lengths_B: excluded items per user, (B,) integer.

        Returns:
            Per depth 1 to I: sorted user x nodes of that depth + node, (closed nodes of all users,) int64.
        """
        user = np.repeat(np.arange(len(lengths_B), dtype=np.int64), lengths_B)
        leaf = self.leaf[excluded]
        num_leaves = len(self.item_index)
        pair = np.unique((user * num_leaves + leaf)[leaf >= 0])
        user, leaf = np.divmod(pair, num_leaves)
        closed = []
        for first_leaf in self.first_leaf[1:]:
            node = np.searchsorted(first_leaf, leaf, side="right") - 1
            pair, count = np.unique(user * (len(first_leaf) - 1) + node, return_counts=True)
            node = pair % (len(first_leaf) - 1)
            pair = pair[count == first_leaf[node + 1] - first_leaf[node]]
            closed.append(torch.from_numpy(pair).to(self.item_index.device))
        return tuple(closed)
