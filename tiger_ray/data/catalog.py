"""What the catalog must be: columns and types, known from the footers, and the rows as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from tiger_ray.errors import DataError
from tiger_ray.settings.catalog import CatalogSettings


def wanted_columns(settings: CatalogSettings) -> dict[str, str]:
    """Setting -> the column of the input that the setting names."""
    wanted = {"catalog.item_id": settings.item_id}
    wanted |= {f"catalog.text[{place}]": column for place, column in enumerate(settings.text)}
    for name in ("title", "category", "available", "vector"):
        if getattr(settings, name) is not None:
            wanted[f"catalog.{name}"] = getattr(settings, name)
    return wanted


def require_readable(schema: pa.Schema, settings: CatalogSettings) -> None:
    """Refuse columns that are no text, and an `available` that is neither true nor false.

    Raises:
        DataError: names the column, its type and the setting.
    """
    for name in dict.fromkeys([*settings.text, settings.title, settings.category]):
        if name is None:
            continue
        found = schema.field(name).type
        inner = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else found
        inner = inner.value_type if pa.types.is_dictionary(inner) else inner
        if pa.types.is_nested(inner) or pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
            raise DataError(
                f"column {name!r} of {settings.uri} is {found}; item text, title and category are read from text, numbers "
                "or a list of them. Write it that way, or name another column (catalog.text, .title, .category)"
            )
    if settings.available is not None:
        found = schema.field(settings.available).type
        if not (pa.types.is_boolean(found) or pa.types.is_integer(found)):
            raise DataError(
                f"column {settings.available!r} of {settings.uri} is {found}; catalog.available must be boolean, or an "
                "integer that is 0 for no"
            )


def vector_type(schema: pa.Schema, settings: CatalogSettings) -> pa.DataType | None:
    """Type of the vectors in the artifact; None where `catalog.vector` names no column.

    Raises:
        DataError: the column holds no lists of one length with floats.
    """
    if settings.vector is None:
        return None
    found = schema.field(settings.vector).type
    if not (pa.types.is_fixed_size_list(found) and pa.types.is_floating(found.value_type)):
        raise DataError(
            f"column {settings.vector!r} of {settings.uri} is {found}; catalog.vector must be FixedSizeList<float>"
        )
    return pa.list_(pa.float32(), found.list_size)


def repeated_ids(num_rows: int, examples: Sequence[object], settings: CatalogSettings) -> DataError:
    """The error of item ids that come twice.

    Args:
        num_rows: rows whose id another row has too.
        examples: some of these ids.
        settings: names input and column.
    """
    return DataError(
        f"{num_rows:,} rows of {settings.uri} repeat an item id of another row, among them "
        f"{', '.join(map(str, examples))}; item ids must be unique (column {settings.item_id!r})"
    )


def require_usable(items: int, empty: int, available: int, settings: CatalogSettings) -> None:
    """Refuse a catalog with too little text, or with nothing to recommend.

    Args:
        items: rows.
        empty: rows without any text.
        available: rows that may be recommended.
        settings: the limit, and the columns.

    Raises:
        DataError: says which limit.
    """
    if empty > settings.max_empty_text_share * items:
        raise DataError(
            f"{empty:,} of {items:,} items of {settings.uri} have no text in {', '.join(settings.text)}; at most "
            f"{settings.max_empty_text_share:.0%} may (catalog.max_empty_text_share). Name other columns in catalog.text."
        )
    if available == 0:
        raise DataError(
            f"none of the {items:,} items of {settings.uri} is available ({settings.available} is never true)"
        )
