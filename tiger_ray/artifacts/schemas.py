"""The Arrow schema of every artifact: the contract between stages, and with the readers of the output.

Item and user ids have the type of the input (string, large_string or int64) in every artifact; `id_type` below is
that type.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import pyarrow as pa

ID_TYPES = (pa.string(), pa.large_string(), pa.int64())
"""Types an item id or a user id may have."""


SOURCES = ("generated", "fallback")
"""Where a recommended item came from: the model, or popularity (for users without history)."""


MOMENTS = ("events_before_validation", "events_before_test")
"""Columns of a user shard where `sequences.validation_from` and `.test_from` are set: number of events
of the history before each moment."""


def catalog(id_type: pa.DataType, vector_type: pa.DataType | None = None) -> pa.Schema:
    """One row per item, sorted by item_id within a file; `text` is never null, but may be empty."""
    fields = [
        pa.field("item_id", id_type, nullable=False),
        pa.field("title", pa.string()),
        pa.field("text", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("available", pa.bool_(), nullable=False),
    ]
    return pa.schema(fields if vector_type is None else [*fields, pa.field("vector", vector_type)])


def embeddings(id_type: pa.DataType, dim: int) -> pa.Schema:
    """One row per item, in the order of the catalog file of the same name; `text_hash` finds changed texts."""
    return pa.schema(
        [
            pa.field("item_id", id_type, nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("text_hash", pa.uint64(), nullable=False),
        ]
    )


def exported_semantic_ids(id_type: pa.DataType) -> pa.Schema:
    """One row per item ever registered, in that order; `eligible` is true if the night may recommend the item."""
    return pa.schema(
        [
            pa.field("item_id", id_type, nullable=False),
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("eligible", pa.bool_(), nullable=False),
        ]
    )


def sequences(id_type: pa.DataType, *, has_moments: bool = False) -> pa.Schema:
    """One row per user; `history` is oldest first and may be empty."""
    fields = [
        pa.field("user_id", id_type, nullable=False),
        pa.field("user_hash", pa.uint64(), nullable=False),
        pa.field("history", pa.list_(pa.int32()), nullable=False),
    ]
    moments = [pa.field(name, pa.int32(), nullable=False) for name in MOMENTS if has_moments]
    return pa.schema([*fields, *moments])


def popularity(*, has_moments: bool = False) -> pa.Schema:
    """The most popular items, most popular first, counted over all events and over training events.

    `training_events` counts the events that leave-one-out lets training see, `training_events_time` the events that
    the time split lets training see, if the split is set.
    """
    fields = [
        pa.field("item_index", pa.int32(), nullable=False),
        pa.field("events", pa.int64(), nullable=False),
        pa.field("training_events", pa.int64(), nullable=False),
    ]
    time = [pa.field("training_events_time", pa.int64(), nullable=False)] if has_moments else []
    return pa.schema([*fields, *time])


def ranked_lists(num_places: int) -> pa.Schema:
    """One row per user with a held-out event; `items` are item_index, best first, -1 after the last.

    `history_length` counts the events that the ranker was given. `popularity_rank` is the rank of the target among the
    most popular items; num_places + 1 if the target is not among them.
    """
    return pa.schema(
        [
            pa.field("user_hash", pa.uint64(), nullable=False),
            pa.field("target", pa.int32(), nullable=False),
            pa.field("history_length", pa.int32(), nullable=False),
            pa.field("target_in_history", pa.bool_(), nullable=False),
            pa.field("popularity_rank", pa.int32(), nullable=False),
            pa.field("items", pa.list_(pa.int32(), num_places), nullable=False),
        ]
    )


def recommendations(user_id_type: pa.DataType, item_id_type: pa.DataType) -> pa.Schema:
    """Wide form: one row per user, best item first; the lists of a row are equally long."""
    return pa.schema(
        [
            pa.field("user_id", user_id_type, nullable=False),
            pa.field("item_ids", pa.list_(item_id_type), nullable=False),
            pa.field("scores", pa.list_(pa.float32()), nullable=False),
            pa.field("semantic_ids", pa.list_(pa.list_(pa.int16())), nullable=False),
            pa.field("sources", pa.list_(pa.string()), nullable=False),
            pa.field("date", pa.string(), nullable=False),
            pa.field("model_version", pa.string(), nullable=False),
            pa.field("semantic_ids_version", pa.string(), nullable=False),
        ]
    )


def recommendations_long(user_id_type: pa.DataType, item_id_type: pa.DataType) -> pa.Schema:
    """Long form: one row per user and rank (1 is best)."""
    return pa.schema(
        [
            pa.field("user_id", user_id_type, nullable=False),
            pa.field("rank", pa.int16(), nullable=False),
            pa.field("item_id", item_id_type, nullable=False),
            pa.field("score", pa.float32(), nullable=False),
            pa.field("semantic_id", pa.list_(pa.int16()), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("date", pa.string(), nullable=False),
            pa.field("model_version", pa.string(), nullable=False),
            pa.field("semantic_ids_version", pa.string(), nullable=False),
        ]
    )


def as_large_string(ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Ids that fit into one array: text gets offsets of 64 bits, because the ids of a catalog may exceed 2 GiB."""
    return ids.cast(pa.large_string()) if pa.types.is_string(ids.type) else ids


def matrix_of(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of fixed-size lists without nulls as a matrix with one row per list."""
    values = column.combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(values), values.type.list_size)
