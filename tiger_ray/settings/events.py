"""Section `events`: where the events are, and what each column means."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tiger_ray.settings.base import Section, Share


class EventsSettings(Section):
    """What users did with items."""

    uri: str = Field(min_length=1)
    """Parquet file or folder of events."""
    user_id: str = "user_id"
    """Column with the user's id: string or int64."""
    item_id: str = "item_id"
    """Column with the item's id, of the same type as in the catalog."""
    timestamp: str = "timestamp"
    """Column with the time of the event."""
    timestamp_unit: Literal["s", "ms", "us", "ns", "position"] | None = None
    """Unit of the timestamp, required if the column holds integers; `position`: an order of one user's events, not a
    time."""
    event_type: str | None = None
    """Column with the kind of event. Empty: every event counts."""
    event_types: tuple[str, ...] = ()
    """Kinds of event that count; required with `event_type`."""
    ties: Literal["hash", "item_id", "column"] = "hash"
    """Order of one user's events with equal timestamps: by a hash of user id, item id and seed, by item id, or by
    the column `tie`. Item ids order all users alike: the held-out item is the highest id of its moment, and a model
    learns this instead of the user's taste. Events of the same user, item and timestamp count once in
    any case."""
    tie: str | None = None
    """Integer column for `ties: column`, smallest first, for example the position of the event in the log. Where
    it is equal too, the hash decides."""
    max_unknown_share: Share = 0.05
    """Refuse the events if the item of a larger share of them is not in the catalog."""
    max_null_share: Share = 0.01
    """Refuse the events if the user, item or timestamp of a larger share of them is null."""

    @model_validator(mode="after")
    def _event_types_belong_together(self) -> EventsSettings:
        if (self.event_type is None) != (not self.event_types):
            raise ValueError("events.event_type and events.event_types must be given together")
        return self

    @model_validator(mode="after")
    def _tie_belongs_to_ties(self) -> EventsSettings:
        if self.ties == "column" and self.tie is None:
            raise ValueError("events.ties is 'column', so events.tie must name the column")
        if self.ties != "column" and self.tie is not None:
            raise ValueError(
                f"events.tie names the column {self.tie!r}, but events.ties is {self.ties!r} and does not read it; "
                "set events.ties to 'column', or leave events.tie out"
            )
        if self.tie == self.timestamp:
            raise ValueError(
                f"events.tie is the column of events.timestamp, {self.tie!r}, which cannot tell equal timestamps apart"
            )
        return self
