"""Section `serving`: the endpoint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tiger_ray.settings.base import Count, Positive, Section, operational


class ServingSettings(Section):
    """The HTTP endpoint."""

    host: str = operational("127.0.0.1")
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = operational(8000)
    """Port to listen on."""
    num_replicas: Count = operational(1)
    """Decoder replicas."""
    max_batch_size: Count = operational(32)
    """Requests decoded in one batch."""
    batch_wait_s: Annotated[float, Field(ge=0.0)] = operational(0.01)
    """Seconds a request may wait for others of its batch."""
    max_k: Count = operational(20)
    """Most items a request may ask for; at most `decoding.beam_width`."""
    max_history: Count = operational(1000)
    """Most history items a request may send; the model reads the last `model.max_history`."""
    max_queued_requests: Count = operational(64)
    """Requests waiting per replica before the endpoint answers 503."""
    request_timeout_s: Positive = operational(2.0)
    """Seconds after which the endpoint gives up a request."""
