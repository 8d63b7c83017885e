"""Codewords to unique Semantic IDs, in an append-only registry.

The n-th registered item (from 0) has item_index n, which never changes. Its Semantic ID is its L codewords and a
disambiguator: the number of earlier items with the same codewords. Items of one night are registered in the
order of the hash of their ids. Hence a Semantic ID depends on the items only: not on files, blocks or workers.

N items in the registry, M items in a batch, L levels, I id_length = L + 1, C chunks of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts import schemas
from tiger_ray.core.hashing import stable_hash
from tiger_ray.errors import ArtifactError, CollisionError, DataError


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Every registered item, by item_index.

    >>> codewords_ML = np.array([[0, 1], [2, 1], [0, 1]], np.int16)
    >>> segment = assign(None, pa.array(["a", "b", "c"]), codewords_ML, (3, 2, 4))
    >>> ids = SemanticIds.from_segments([segment], (3, 2, 4))
    >>> ids.codes_NI[ids.lookup(pa.array(["b", "unknown"]))[0]].tolist()
    [2, 1, 0]
    """

    item_id: pa.ChunkedArray
    """(N,) string, large_string or int64."""
    codes_NI: npt.NDArray[np.int16]
    """(N, I) int16: codewords, then the disambiguator."""
    level_sizes: tuple[int, ...]
    """(I,) codewords of each level, then the number of values of the disambiguator."""
    eligible: pa.BooleanArray
    """(N,) true for an item that may be recommended today. One bit per item."""

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[pa.Table],
        level_sizes: Sequence[int],
        eligible: pa.BooleanArray | None = None,
    ) -> SemanticIds:
        """The registry that consists of these segments.

        Args:
            segments: tables of `segment_of` in the order of item_index, at least one.
            level_sizes: (I,) codewords of each level, then the disambiguator's size.
            eligible: (N,) bool; None for every item.

        Raises:
            ArtifactError: a segment is missing, doubled, out of order or damaged.
        """
        level_sizes = tuple(level_sizes)
        types = sorted({str(segment.schema.field("item_id").type) for segment in segments})
        if len(types) != 1:
            raise ArtifactError(
                f"a registry needs segments with one type of item_id; found {types or 'no segment'}"
            )
        codes_NI = np.empty((sum(segment.num_rows for segment in segments), len(level_sizes)), np.int16)
        first = 0
        for segment in segments:
            item_index = segment["item_index"].to_numpy()
            wrong = np.flatnonzero(item_index != np.arange(first, first + len(item_index)))
            if len(wrong):
                raise ArtifactError(
                    f"row {first + wrong[0]} of the registry has item_index {item_index[wrong[0]]}; a segment "
                    "is missing, doubled or out of order"
                )
            codes_NI[first : first + len(item_index)] = codes_of(segment, level_sizes)
            first += len(item_index)
        item_id = pa.chunked_array(
            [chunk for segment in segments for chunk in segment["item_id"].chunks],
            segments[0].schema.field("item_id").type,
        )
        everyone = pa.array(np.ones(len(codes_NI), bool))
        ids = cls(item_id, codes_NI, level_sizes, everyone)
        return ids if eligible is None else ids.with_eligible(eligible)

    def __len__(self) -> int:
        return len(self.codes_NI)

    @property
    def id_length(self) -> int:
        """Codes of one Semantic ID: L levels and the disambiguator."""
        return len(self.level_sizes)

    def lookup(self, item_id: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """The item_index of each id, int32; -1 for an id that is null or not registered.

        Raises:
            DataError: the ids are numbers and the registry's ids are text, or the reverse.
        """
        types = item_id.type, self.item_id.type
        if types[0] != types[1] and any(map(pa.types.is_integer, types)):
            raise type_error(*types)
        found = pc.index_in(
            schemas.as_large_string(item_id), value_set=schemas.as_large_string(self.item_id), skip_nulls=True
        )
        return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int32)

    def item_ids(self, item_index: np.ndarray) -> pa.Array:
        """The id of each item_index, of the registry's type.

        Args:
            item_index: any length, integer, 0 to N - 1.
        """
        chunks = self.item_id.chunks
        # Take chunk by chunk: `ChunkedArray.take` would first copy all ids into one array.
        end_C = np.cumsum([len(chunk) for chunk in chunks])
        chunk_N = np.searchsorted(end_C, item_index, side="right")
        order_N = np.argsort(chunk_N, kind="stable")
        count_C = np.bincount(chunk_N, minlength=len(chunks))
        found = [pa.array([], self.item_id.type)]
        for chunk, end, rows in zip(chunks, end_C, np.split(order_N, np.cumsum(count_C)[:-1]), strict=True):
            if len(rows):
                found.append(chunk.take(pa.array(item_index[rows] - (end - len(chunk)))))
        return pa.concat_arrays(found).take(pa.array(np.argsort(order_N, kind="stable")))

    @property
    def eligible_N(self) -> npt.NDArray[np.bool_]:
        """True for an item that may be recommended today, (N,) bool; each call makes a new array."""
        return self.eligible.to_numpy(zero_copy_only=False)

    def with_eligible(self, eligible: pa.BooleanArray | npt.NDArray[np.bool_]) -> SemanticIds:
        """The same registry with another `eligible`, (N,) bool.

        Raises:
            ArtifactError: `eligible` has another length than the registry.
        """
        if len(eligible) != len(self):
            raise ArtifactError(
                f"eligibility of {len(eligible)} items does not fit a registry of {len(self)}"
            )
        return replace(self, eligible=pa.array(eligible, pa.bool_()))


def assign(
    registry: SemanticIds | None,
    item_id: pa.Array | pa.ChunkedArray,
    codewords_ML: npt.NDArray[np.int16],
    level_sizes: Sequence[int],
) -> pa.Table:
    """Semantic IDs of the items that the registry does not hold yet, computed in one process.

    `stages.semantic_ids` computes the same in many processes, with the functions below.

    Args:
        registry: Semantic IDs of earlier nights; None on the first night.
        item_id: (M,) string, large_string or int64, in any order.
        codewords_ML: (M, L) int16.
        level_sizes: (I,) codewords of each level, then the disambiguator's size.

    Returns:
        The next segment of the registry; see `segment_of`.

    Raises:
        DataError: an id is null, comes twice, or has another type than the registry's ids.
        CollisionError: more items share all codewords than the disambiguator has values.
        ArtifactError: the codewords come from another quantizer than the registry's.
    """
    require_codewords(codewords_ML, level_sizes)
    old_codes_NI = np.empty((0, len(level_sizes)), np.int16)
    if registry is not None:
        old_codes_NI = registry.codes_NI
        new = np.flatnonzero(registry.lookup(item_id) < 0)
        item_id, codewords_ML = item_id.take(pa.array(new)), codewords_ML[new]
    order = registration_order(item_id)
    item_id, codewords_ML = item_id.take(pa.array(order)), codewords_ML[order]
    prefix = prefixes(np.concatenate([old_codes_NI[:, :-1], codewords_ML]), level_sizes)
    disambiguator = disambiguators(prefix, np.arange(len(prefix)))
    require_room(prefix, disambiguator, level_sizes)
    return segment_of(len(old_codes_NI), item_id, codewords_ML, disambiguator[len(old_codes_NI) :])


def registration_order(item_id: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Rows in the order in which their items are registered, (M,) int64: by hash of the id, then by the id.

    Raises:
        DataError: an id is null, comes twice, or has a type other than `schemas.ID_TYPES`.
    """
    if item_id.type not in schemas.ID_TYPES:
        raise DataError(
            f"item_id must be {', '.join(map(str, schemas.ID_TYPES))}, not {item_id.type}; see catalog.item_id"
        )
    if isinstance(item_id, pa.ChunkedArray):
        item_id = item_id.combine_chunks()
    if item_id.null_count:
        raise DataError(f"the catalog holds {item_id.null_count} items without an id")
    key_M = stable_hash(item_id)
    order = np.argsort(key_M, kind="stable")
    if (np.diff(key_M[order]) == 0).any():
        table = pa.table({"key": key_M, "item_id": item_id})
        order = pc.sort_indices(table, [("key", "ascending"), ("item_id", "ascending")]).to_numpy()
        in_order = item_id.take(pa.array(order))
        repeated = pc.equal(in_order[1:], in_order[:-1])
        if pc.any(repeated).as_py():
            names = pc.unique(in_order[1:].filter(repeated)).slice(0, 10).to_pylist()
            raise DataError(f"the catalog holds items twice, first {names}; see catalog.item_id")
    return order.astype(np.int64)


def prefixes(codewords_ML: npt.NDArray[np.integer[Any]], level_sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """One number for all codewords of an item, (M,) int64; different codewords have different numbers.

    Args:
        codewords_ML: (M, L) integer.
        level_sizes: (I,) sizes of the levels and of the disambiguator; the product of the first L is below 2^62.
    """
    prefix_M = np.zeros(len(codewords_ML), np.int64)
    for level, size in enumerate(level_sizes[:-1]):
        prefix_M = prefix_M * size + codewords_ML[:, level]
    return prefix_M


def codewords_of(prefix_M: npt.NDArray[np.int64], level_sizes: Sequence[int]) -> npt.NDArray[np.int16]:
    """Codewords of prefixes, (M,) to (M, L); undoes `prefixes`."""
    codewords_ML = np.empty((len(prefix_M), len(level_sizes) - 1), np.int16)
    for level in reversed(range(len(level_sizes) - 1)):
        prefix_M, codewords_ML[:, level] = np.divmod(prefix_M, level_sizes[level])
    return codewords_ML


def disambiguators(
    prefix_M: npt.NDArray[np.int64], item_index_M: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.int64]:
    """Number of items with the same prefix and a lower item_index, (M,) int64.

    Args:
        prefix_M: result of `prefixes`, (M,); if it holds one item of a prefix, it holds all of them.
        item_index_M: (M,) integer.
    """
    order = np.lexsort((item_index_M, prefix_M))
    in_order = prefix_M[order]
    first = np.flatnonzero(np.diff(in_order, prepend=in_order[:1] - 1))
    rank_M = np.empty(len(prefix_M), np.int64)
    rank_M[order] = np.arange(len(prefix_M)) - np.repeat(first, np.diff(first, append=len(prefix_M)))
    return rank_M


def require_room(
    prefix_M: npt.NDArray[np.int64], disambiguator_M: npt.NDArray[np.int64], level_sizes: Sequence[int]
) -> None:
    """Refuse a group of items that is too large for the disambiguator.

    Args:
        prefix_M: result of `prefixes`, (M,).
        disambiguator_M: result of `disambiguators`, (M,).
        level_sizes: (I,) codewords of each level, then the disambiguator's size.

    Raises:
        CollisionError: names the largest group's codewords, its size and the remedy.
    """
    size = level_sizes[-1]
    too_many = disambiguator_M >= size
    if not too_many.any():
        return
    worst = int(disambiguator_M.argmax())
    remedy = (
        "Raise semantic_ids.disambiguator_size (needs a new model), or quantizer.level_sizes together with "
        "quantizer.version (new IDs and a new model). No quantizer can separate items with equal texts: name "
        "more columns in catalog.text"
    )
    if len(level_sizes) == 1:
        remedy = (
            "With quantizer.kind flat the disambiguator counts the whole catalog: raise "
            "semantic_ids.disambiguator_size (at most 32767), or choose a quantizer.kind with codewords"
        )
    codewords = codewords_of(prefix_M[worst : worst + 1], level_sizes)[0].tolist()
    raise CollisionError(
        f"{disambiguator_M[worst] + 1} items share the codewords {codewords}, but the disambiguator can count "
        f"{size}; {too_many.sum()} items under {len(np.unique(prefix_M[too_many]))} such prefixes are left "
        f"without a Semantic ID. {remedy}"
    )


def segment_of(
    first: int,
    item_id: pa.Array | pa.ChunkedArray,
    codewords_ML: npt.NDArray[np.int16],
    disambiguator_M: npt.NDArray[np.integer[Any]],
) -> pa.Table:
    """A segment of the registry: columns item_index int32, item_id, and codes FixedSizeList<int16>[I].

    Args:
        first: item_index of the first row; the following rows count up.
        item_id: (M,) in the order of registration; the column keeps their type.
        codewords_ML: (M, L) int16.
        disambiguator_M: (M,) integer below 2^15.
    """
    codes_MI = np.column_stack([codewords_ML, disambiguator_M]).astype(np.int16)
    id_length = codes_MI.shape[1]
    schema = pa.schema(
        [
            pa.field("item_index", pa.int32(), nullable=False),
            pa.field("item_id", item_id.type, nullable=False),
            pa.field("codes", pa.list_(pa.int16(), id_length), nullable=False),
        ]
    )
    item_index = np.arange(first, first + len(codes_MI), dtype=np.int32)
    codes = pa.FixedSizeListArray.from_arrays(pa.array(codes_MI.ravel()), id_length)
    return pa.table([pa.array(item_index), item_id, codes], schema=schema)


def codes_of(segment: pa.Table, level_sizes: Sequence[int]) -> npt.NDArray[np.int16]:
    """Semantic IDs of a segment, (M, I) int16.

    Raises:
        ArtifactError: a code does not fit `level_sizes`, (I,).
    """
    codes, id_length = segment["codes"], len(level_sizes)
    if codes.type != pa.list_(pa.int16(), id_length) or codes.null_count:
        raise ArtifactError(
            f"codes of a registry must be {id_length} int16 per item, never null, not {codes.type}"
        )
    chunks = [chunk.flatten().to_numpy() for chunk in codes.chunks]
    codes_MI = np.concatenate([np.empty(0, np.int16), *chunks]).reshape(-1, id_length)
    outside_I = [
        ((codes_M < 0) | (codes_M >= size)).sum()
        for codes_M, size in zip(codes_MI.T, level_sizes, strict=True)
    ]
    if any(outside_I):
        level = int(np.argmax(outside_I))
        raise ArtifactError(
            f"{outside_I[level]} codes of level {level} are outside 0..{level_sizes[level] - 1}; the "
            "registry was made for another quantizer or another semantic_ids.disambiguator_size"
        )
    return codes_MI


def require_codewords(codewords_ML: npt.NDArray[np.int16], level_sizes: Sequence[int]) -> None:
    """Refuse codewords, (M, L), that cannot come from the quantizer of the registry.

    Raises:
        ArtifactError: the number of levels is not L, or a codeword is outside of its level.
    """
    sizes = np.array(level_sizes[:-1])
    if codewords_ML.shape[1] != len(sizes) or (codewords_ML >= sizes).any() or (codewords_ML < 0).any():
        raise ArtifactError(
            f"codewords up to {codewords_ML.max(axis=0, initial=0).tolist()} do not come from the "
            f"quantizer of this registry, whose levels have {sizes.tolist()} codewords"
        )


def type_error(found: Any, wanted: Any) -> DataError:
    """The error for item ids with another type than the registry's ids."""
    return DataError(
        f"item_id is {found}, but the registry of Semantic IDs was started with {wanted}; keep the type of "
        "the ids, or start a new registry by raising quantizer.version"
    )
