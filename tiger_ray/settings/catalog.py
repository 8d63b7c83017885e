"""Section `catalog`: where items come from, and which columns say what."""

from __future__ import annotations

import string
from typing import Annotated

from pydantic import Field, model_validator

from tiger_ray.settings.base import Count, Section, Share


class CatalogSettings(Section):
    """Items that may be recommended."""

    uri: str = Field(min_length=1)
    """Parquet file or folder of items."""
    item_id: str = "item_id"
    """Column with the item's id: string or int64, never null, never twice."""
    text: Annotated[tuple[str, ...], Field(min_length=1)] = ("title",)
    """Columns that make the item text, in this order; lists are joined with ` > `."""
    template: str | None = None
    """Item text as a format string over the columns of `text`, for example `{title}, by {brand}`;
    empty: `title: ...; brand: ...`, missing columns of a row left out."""
    title: str | None = None
    """Column shown to people as the item's name; empty: the first column of `text`."""
    category: str | None = None
    """Column with the item's category; lists: the last entry. Used for diversity and ID reports."""
    available: str | None = None
    """Boolean column: may the item be recommended today? Empty: every item may."""
    vector: str | None = None
    """Column with the item's own embedding (`FixedSizeList<float>`); required by `embeddings.encoder: catalog`."""
    max_text_chars: Count = 8192
    """Characters of item text kept."""
    max_empty_text_share: Share = 0.2
    """Share of items without any text above which the catalog is refused."""
    num_shards: Count = 8
    """Files that the catalog is written in; about 128 MB each is good."""

    @model_validator(mode="after")
    def _the_template_uses_the_text(self) -> CatalogSettings:
        try:
            parts = list(string.Formatter().parse(self.template or ""))
        except ValueError as error:
            raise ValueError(f"catalog.template {self.template!r} is no format string: {error}") from None
        for _, field, form, conversion in parts:
            if field is not None and field not in self.text:
                raise ValueError(f"catalog.template uses {{{field}}}, which catalog.text does not name")
            if form or conversion:
                raise ValueError(
                    f"catalog.template gives {{{field}}} a format, and columns are put in as they are: write {{{field}}} "
                    "alone, and format the column before the job"
                )
        return self
