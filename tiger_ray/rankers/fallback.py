"""Where a recommendation comes from: the model, or popularity for a user without history."""

from __future__ import annotations

from tiger_ray.artifacts import schemas

GENERATED, FALLBACK = schemas.SOURCES
