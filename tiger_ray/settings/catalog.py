"""Section `catalog`: where the items are, and what each column means."""

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
    """Column with the item's id: string or int64, unique, never null."""
    text: Annotated[tuple[str, ...], Field(min_length=1)] = ("title",)
    """Columns of the item text, in this order; lists are joined with ` > `."""
    template: str | None = None
    """Item text as a format string over the columns of `text`, for example `{title}, by {brand}`. Empty:
    `title: ...; brand: ...`, without the columns that are null in a row."""
    title: str | None = None
    """Column with the item's name, for people. Empty: the first column of `text`."""
    category: str | None = None
    """Column with the item's category; of a list, the last entry. Read by the metrics of diversity and by the report
    on Semantic IDs."""
    available: str | None = None
    """Boolean column: may the item be recommended today? Empty: every item may."""
    vector: str | None = None
    """Column with the item's own embedding (`FixedSizeList<float>`); required by `embeddings.encoder: catalog`."""
    max_text_chars: Count = 8192
    """Characters of the item text; the rest is cut off."""
    max_empty_text_share: Share = 0.2
    """Refuse the catalog if a larger share of its items has no text."""
    num_shards: Count = 8
    """Files of the catalog; choose about 128 MB each."""

    @model_validator(mode="after")
    def _the_template_uses_the_text(self) -> CatalogSettings:
        try:
            parts = list(string.Formatter().parse(self.template or ""))
        except ValueError as error:
            raise ValueError(f"catalog.template {self.template!r} is not a format string: {error}") from None
        for _, field, form, conversion in parts:
            if field is not None and field not in self.text:
                raise ValueError(f"catalog.template uses {{{field}}}, which catalog.text does not name")
            if form or conversion:
                raise ValueError(
                    f"catalog.template gives {{{field}}} a format or a conversion, but columns are inserted as they are: "
                    f"write {{{field}}} alone, and format the column before the job"
                )
        return self
