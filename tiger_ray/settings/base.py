"""What the sections of the settings share: strict types, closed names, the fingerprint, and the fields of workers."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from datetime import date as calendar_date
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tiger_ray.errors import SettingsError

Count = Annotated[int, Field(ge=1)]


CountOrZero = Annotated[int, Field(ge=0)]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


Positive = Annotated[float, Field(gt=0.0)]


LevelSize = Annotated[int, Field(ge=1, le=32767)]  # codes are int16


def calendar_day(text: str) -> str:
    """The text, if it is a day of the calendar as YYYY-MM-DD.

    Raises:
        SettingsError: any other text.
    """
    try:
        if calendar_date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise SettingsError(f"date must be a day like 2026-11-23, not {text!r}")


def _in_utc(value: Any) -> datetime:
    """A day or a time. Numbers are refused: pydantic would accept them and guess their unit."""
    if isinstance(value, str) and re.match(r"\d{4}-\d{2}-\d{2}", value):
        value = datetime.fromisoformat(value)
    elif isinstance(value, calendar_date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    elif not isinstance(value, datetime):
        raise ValueError("must be a day or a time like 2014-01-01 or 2014-01-01T12:00:00Z")
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Moment = Annotated[datetime, BeforeValidator(_in_utc)]


def operational(default: Any) -> Any:
    """A setting that does not change results (up to rounding), such as speed or deadlines.

    The fingerprint of its section leaves it out.
    """
    return Field(default, json_schema_extra={"operational": True})


class Section(BaseModel):
    """One group of settings; frozen, and closed to unknown keys.

    >>> class Demo(Section):
    ...     depth: Count = 2
    ...     num_threads: Count = operational(1)
    >>> Demo(num_threads=8).fingerprint()
    {'depth': 2}
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide what is computed, ready for JSON."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        hidden = {
            name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("operational")
        }
        return self.model_dump(mode="json", exclude=hidden)


class Workers(Section):
    """How many workers a stage has, and what each worker gets."""

    num_workers: Count = operational(1)
    """Workers at most. Encoders and decoders start one by one, as CPUs or GPUs become free; the workers of
    `quantizer` and of `training` compute together, so the cluster must have room for all of them at once."""
    cpus_per_worker: Positive = operational(1)
    """CPUs reserved for each worker, and its torch threads (an encoder's threads are torch's own choice)."""
    use_gpu: bool = operational(False)
    """Reserve one GPU for each worker, instead of CPUs. Workers that compute together talk by NCCL on GPUs and by
    gloo on CPUs."""

    starts_together: ClassVar[bool] = False
    """Must all workers fit in the cluster at once?"""


class WorkerGroup(Workers):
    """Workers that compute one thing together: when one dies, all start again."""

    max_failures: CountOrZero = operational(3)
    """Deaths of workers that a stage survives. `quantizer` starts its fit again, `training` goes on from its last
    checkpoint."""

    starts_together: ClassVar[bool] = True
