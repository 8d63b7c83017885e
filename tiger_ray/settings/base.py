"""What all sections of the settings share: strict types, one error for an unknown name, and the fingerprint."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from datetime import date as calendar_date
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]


CountOrZero = Annotated[int, Field(ge=0)]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


Positive = Annotated[float, Field(gt=0.0)]


LevelSize = Annotated[int, Field(ge=1, le=32767)]  # codes are int16


def _in_utc(value: Any) -> datetime:
    """A day or a time; left to itself, pydantic would also take numbers, and guess their unit."""
    if isinstance(value, str) and re.match(r"\d{4}-\d{2}-\d{2}", value):
        value = datetime.fromisoformat(value)
    elif isinstance(value, calendar_date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    elif not isinstance(value, datetime):
        raise ValueError("must be a day or a time like 2014-01-01 or 2014-01-01T12:00:00Z")
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Moment = Annotated[datetime, BeforeValidator(_in_utc)]


def operational(default: Any) -> Any:
    """A setting that leaves what a stage writes the same, but for rounding: how fast it runs, or when a night is stopped."""
    return Field(default, json_schema_extra={"operational": True})


class Section(BaseModel):
    """One group of settings; frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide what is computed, ready for JSON."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        hidden = {
            name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("operational")
        }
        return self.model_dump(mode="json", exclude=hidden)
