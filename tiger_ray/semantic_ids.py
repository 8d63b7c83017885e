"""Codewords to unique Semantic IDs, in an append-only registry.

The n-th item ever registered has item_index n for good. Its Semantic ID is its L codewords and a
disambiguator: the count of items registered earlier under the same codewords.

N items in the registry, M items in a batch, L levels, I id_length = L + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.errors import ArtifactError, CollisionError, DataError
from tiger_ray.schemas import ID_TYPES


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Every item ever registered, by item_index."""

    item_id: pa.ChunkedArray
    """(N,) string, large_string or int64."""
    codes_NI: np.ndarray
    """(N, I) int16: codewords, then the disambiguator."""
    level_sizes: tuple[int, ...]
    """(I,) codewords of each level, then how many items the disambiguator can count."""
    eligible_N: np.ndarray
    """(N,) bool: may the item be recommended today?"""

    @classmethod
    def from_segments(
        cls, segments: Sequence[pa.Table], level_sizes: Sequence[int], eligible: np.ndarray | None = None
    ) -> SemanticIds:
        """The registry that segments written by `assign` make up.

        Args:
            segments: tables of `assign`, oldest first, at least one.
            level_sizes: (I,) codewords of each level, then the disambiguator's size.
            eligible: (N,) bool; none: every item.

        Raises:
            ArtifactError: a segment is missing, doubled, out of order or damaged.
        """
        level_sizes = tuple(level_sizes)
        types = sorted({str(segment.schema.field("item_id").type) for segment in segments})
        if len(types) != 1:
            raise ArtifactError(
                f"a registry needs segments with one type of item_id; found {types or 'no segment'}"
            )
        item_index_N = np.concatenate([segment["item_index"].to_numpy() for segment in segments])
        wrong = np.flatnonzero(item_index_N != np.arange(len(item_index_N)))
        if len(wrong):
            raise ArtifactError(
                f"row {wrong[0]} of the registry has item_index {item_index_N[wrong[0]]}; a segment is "
                "missing, doubled or out of order"
            )
        codes_NI = np.concatenate([_codes(segment["codes"], len(level_sizes)) for segment in segments])
        outside_I = ((codes_NI < 0) | (codes_NI >= np.array(level_sizes))).sum(axis=0)
        if outside_I.any():
            level = int(outside_I.argmax())
            raise ArtifactError(
                f"{outside_I[level]} codes of level {level} are outside 0..{level_sizes[level] - 1}; the "
                "registry was made for another quantizer or another semantic_ids.disambiguator_size"
            )
        item_id = pa.chunked_array(
            [chunk for segment in segments for chunk in segment["item_id"].chunks], types[0]
        )
        if item_id.null_count or pc.count_distinct(item_id).as_py() != len(item_id):
            raise ArtifactError(f"the registry holds null or repeated item ids: {_repeated(item_id)}")
        group_N = _groups(codes_NI)
        if len(codes_NI) and group_N.max() + 1 < len(codes_NI):
            twice = int(np.flatnonzero(np.bincount(group_N) > 1)[0])
            rows = np.flatnonzero(group_N == twice)[:10]
            raise ArtifactError(
                f"items {', '.join(map(str, item_id.take(rows).to_pylist()))} have the same Semantic ID "
                f"{codes_NI[rows[0]].tolist()}"
            )
        everyone = np.ones(len(codes_NI), bool)
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
            DataError: the ids are numbers and the registry's are text, or the other way round.
        """
        if item_id.type != self.item_id.type:
            if pa.types.is_integer(item_id.type) or pa.types.is_integer(self.item_id.type):
                raise _type_error(item_id.type, self.item_id.type)
            item_id = item_id.cast(self.item_id.type)
        found = pc.index_in(item_id, value_set=self.item_id, skip_nulls=True)
        return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int32)

    def item_ids(self, item_index: np.ndarray) -> pa.Array:
        """The id of each item_index, of the registry's type.

        Args:
            item_index: any length, integer, 0 to N - 1.
        """
        return pa.concat_arrays(
            self.item_id.take(pa.array(item_index)).chunks or [pa.array([], self.item_id.type)]
        )

    def with_eligible(self, eligible: np.ndarray) -> SemanticIds:
        """The same registry with other items allowed today.

        Args:
            eligible: (N,) bool.
        """
        if eligible.shape != (len(self),):
            raise ArtifactError(
                f"eligibility of {eligible.shape} items does not fit a registry of {len(self)}"
            )
        return replace(self, eligible_N=np.asarray(eligible, bool))


def assign(
    registry: SemanticIds | None,
    item_id: pa.Array | pa.ChunkedArray,
    codewords_ML: np.ndarray,
    disambiguator_size: int,
) -> pa.Table:
    """Semantic IDs for the items that the registry does not hold yet; the order of the input does not matter.

    Args:
        registry: what earlier nights assigned; none on the first night.
        item_id: (M,) string, large_string or int64.
        codewords_ML: (M, L) int16.
        disambiguator_size: items that may share all codewords.

    Returns:
        The next segment, ordered by item_id: item_index int32, item_id of the type that came in, codes
        FixedSizeList<int16>[L + 1].

    Raises:
        DataError: an id is null, comes twice, or has another type than the registry's.
        CollisionError: too many items share all codewords.
        ArtifactError: the codewords are not those of the registry's quantizer.
    """
    assert len(item_id) == len(codewords_ML)
    item_id = pa.chunked_array([item_id]) if isinstance(item_id, pa.Array) else item_id
    if item_id.type not in ID_TYPES:
        raise DataError(
            f"item_id must be {', '.join(map(str, ID_TYPES))}, not {item_id.type}; see catalog.item_id"
        )
    if item_id.null_count or pc.count_distinct(item_id).as_py() != len(item_id):
        raise DataError(f"the catalog holds null or repeated item ids: {_repeated(item_id)}")
    num_levels = codewords_ML.shape[1]
    old_codes_NI = np.empty((0, num_levels + 1), np.int16)
    if registry is not None:
        if item_id.type != registry.item_id.type:
            raise _type_error(item_id.type, registry.item_id.type)
        sizes = np.array(registry.level_sizes[:-1])
        if num_levels != len(sizes) or (codewords_ML >= sizes).any():
            raise ArtifactError(
                f"codewords up to {codewords_ML.max(axis=0, initial=0).tolist()} do not come from the "
                f"quantizer of this registry, whose levels have {sizes.tolist()} codewords"
            )
        old_codes_NI = registry.codes_NI
        new = np.flatnonzero(registry.lookup(item_id) < 0)
        item_id, codewords_ML = item_id.take(pa.array(new)), codewords_ML[new]
    order = pc.sort_indices(item_id)
    item_id, codewords_ML = item_id.take(order), codewords_ML[order.to_numpy()]

    group = _groups(np.concatenate([old_codes_NI[:, :-1], codewords_ML]))
    old_group_N, group_M = np.split(group, [len(old_codes_NI)])
    next_free_G = np.zeros(group.max(initial=-1) + 1, np.int64)
    np.maximum.at(next_free_G, old_group_N, old_codes_NI[:, -1].astype(np.int64) + 1)
    disambiguator_M = next_free_G[group_M] + _rank_within(group_M)
    _require_room(disambiguator_M, codewords_ML, group_M, disambiguator_size)

    codes_MI = np.column_stack([codewords_ML, disambiguator_M]).astype(np.int16)
    item_index_M = np.arange(len(old_codes_NI), len(old_codes_NI) + len(codes_MI), dtype=np.int32)
    schema = pa.schema(
        [
            pa.field("item_index", pa.int32(), nullable=False),
            pa.field("item_id", item_id.type, nullable=False),
            pa.field("codes", pa.list_(pa.int16(), num_levels + 1), nullable=False),
        ]
    )
    codes = pa.FixedSizeListArray.from_arrays(pa.array(codes_MI.ravel()), num_levels + 1)
    return pa.table([pa.array(item_index_M), item_id, codes], schema=schema)


def id_report(codewords_NL: np.ndarray, level_sizes: Sequence[int]) -> dict[str, Any]:
    """How well codewords tell items apart, ready for JSON.

    Args:
        codewords_NL: (N, L) integer.
        level_sizes: (L,) codewords of each level.

    Returns:
        `items`; `prefixes`, the distinct rows of codewords; `disambiguated_share`, the share of items that
        are not the first under their prefix, 1 - prefixes / items; `largest_group`, most items under one
        prefix; `group_sizes`, number of prefixes by how many items share them; `levels`, per level the
        `size`, the codewords `used`, their share `usage`, and the `perplexity`: exp of the entropy in nats
        of the codewords' frequencies, at most `size`.
    """
    items = len(codewords_NL)
    group_size = np.bincount(_groups(codewords_NL))
    sizes, counts = np.unique(group_size, return_counts=True)
    levels = []
    for level, size in enumerate(level_sizes):
        count_C = np.bincount(codewords_NL[:, level], minlength=size)
        share = count_C[count_C > 0] / max(items, 1)
        levels.append(
            {
                "size": int(size),
                "used": len(share),
                "usage": len(share) / size,
                "perplexity": float(np.exp(-(share * np.log(share)).sum())) if items else 0.0,
            }
        )
    return {
        "items": items,
        "prefixes": len(group_size),
        "disambiguated_share": 1 - len(group_size) / items if items else 0.0,
        "largest_group": int(group_size.max(initial=0)),
        "group_sizes": {str(size): int(count) for size, count in zip(sizes, counts, strict=True)},
        "levels": levels,
    }


def _codes(codes: pa.ChunkedArray, id_length: int) -> np.ndarray:
    if codes.type != pa.list_(pa.int16(), id_length) or codes.null_count:
        raise ArtifactError(
            f"codes of a registry must be {id_length} int16 per item, never null, not {codes.type}"
        )
    chunks = [chunk.flatten().to_numpy() for chunk in codes.chunks]
    return np.concatenate([np.empty(0, np.int16), *chunks]).reshape(-1, id_length)


def _groups(codes: np.ndarray) -> np.ndarray:
    """Number equal rows alike: int64 from 0 without gaps, in the order of the rows' codes."""
    key, span = np.zeros(len(codes), np.int64), 1
    for code in codes.T:
        size = int(code.max(initial=0)) + 1
        if span * size > np.iinfo(np.int64).max:
            distinct, key = np.unique(key, return_inverse=True)
            span = len(distinct)
        key, span = key * size + code, span * size
    return np.unique(key, return_inverse=True)[1]


def _rank_within(group: np.ndarray) -> np.ndarray:
    """How many earlier entries are in the same group."""
    order = np.argsort(group, kind="stable")
    in_order = group[order]
    first = np.flatnonzero(np.diff(in_order, prepend=-1))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))
    return rank


def _require_room(disambiguator: np.ndarray, codewords: np.ndarray, group: np.ndarray, size: int) -> None:
    too_many = disambiguator >= size
    if too_many.any():
        worst = int(disambiguator.argmax())
        raise CollisionError(
            f"{disambiguator[worst] + 1} items share the codewords {codewords[worst].tolist()}, but the "
            f"disambiguator can count {size}; {too_many.sum()} items under {len(np.unique(group[too_many]))} "
            "such prefixes are left without a Semantic ID. Raise semantic_ids.disambiguator_size (needs a "
            "new model), or raise quantizer.num_levels or quantizer.codebook_size together with "
            "quantizer.version (new IDs and a new model)"
        )


def _repeated(item_id: pa.ChunkedArray) -> str:
    counts = pc.value_counts(item_id)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    names = repeated.drop_null().slice(0, 10).to_pylist()
    return f"{item_id.null_count} null; {len(repeated.drop_null())} repeated, first {names}"


def _type_error(found: pa.DataType, wanted: pa.DataType) -> DataError:
    return DataError(
        f"item_id is {found}, but the registry of Semantic IDs was started with {wanted}; ids of "
        "another type are other ids: keep the type, or start a new registry by raising quantizer.version"
    )
