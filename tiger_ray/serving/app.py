"""The HTTP endpoint on Ray Serve: a history in, the next items out.

    curl http://127.0.0.1:8000/v1/recommendations -H 'Content-Type: application/json' \
         -d '{"history": ["item-17", "item-4"], "k": 10}'

The answer holds `items` (`item_id`, `score`: natural log probability, `semantic_id`), best first; the
`source` (`generated`, or `fallback`: popular items, because no item of the history is known);
`unknown_items` of the history; `model_version`, `semantic_ids_version` and `date`; and, if there are
fewer than k items, a `reason`: one of `REASONS`. `GET /livez` answers while the process does, `GET /readyz` once
a decoder serves this endpoint's model and Semantic IDs.

An error is `{"error": {"code", "message"}}` and, for a wrong request, its `field`:

    400 invalid_json             404 not_found       405 method_not_allowed     413 body_too_large
    415 unsupported_media_type   422 invalid_request
    503 overloaded (come back after Retry-After seconds), not_ready             504 timeout
    500 internal

Endpoint replicas read and check requests and never touch the model; decoder replicas answer them in
batches. A request beyond what the queues hold is refused at once.

B requests in batch, K items per request, E history items of all requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.exceptions import HTTPException

from tiger_ray.artifacts.lineage import require_same_registry
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.connect import connect
from tiger_ray.errors import TigerError
from tiger_ray.published.model import load_model
from tiger_ray.rankers.tiger import needs_user
from tiger_ray.serving.http import MAX_BODY_BYTES, RETRY_AFTER_S, STATUS_CODES, QueryReader, Refused
from tiger_ray.serving.replica import NO_DECODER, Replica, versions_of
from tiger_ray.settings.serving import ServingSettings
from tiger_ray.settings.settings import Settings

APP_NAME = "tiger_ray"


class Endpoint:
    """A replica that speaks HTTP."""

    def __init__(
        self, settings: ServingSettings, reader: dict[str, Any], versions: dict[str, str], decoder: Any
    ) -> None:
        self._timeout_s = settings.request_timeout_s
        self._reader = QueryReader(settings, **reader)
        self._versions = versions
        self._decoder = decoder

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve; built here, so that routes are methods and nothing is registered at import."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.add_api_route("/v1/recommendations", self.recommendations, methods=["POST"])
        app.add_api_route("/livez", self.livez, methods=["GET"])
        app.add_api_route("/readyz", self.readyz, methods=["GET"])
        app.add_exception_handler(Refused, _refused)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _internal_error)
        return app

    async def recommendations(self, request: Request) -> JSONResponse:
        """The next items after a history."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "unsupported_media_type", "Content-Type must be application/json")
        try:
            async with asyncio.timeout(self._timeout_s):
                query = self._reader.read(await _body(request))
                return JSONResponse(await self._ask(self._decoder.answer.remote(query)))
        except TimeoutError:
            raise Refused(504, "timeout", f"no answer within {self._timeout_s:g} s") from None
        except BackPressureError:
            raise Refused(503, "overloaded", "too many requests are waiting") from None
        except NO_DECODER:
            raise _not_ready("no decoder answers") from None

    async def livez(self) -> JSONResponse:
        """Is this process alive?"""
        return JSONResponse({"alive": True})

    async def readyz(self) -> JSONResponse:
        """Is there a decoder, with the model and Semantic IDs of this endpoint?"""
        try:
            async with asyncio.timeout(self._timeout_s):
                versions = await self._ask(self._decoder.versions.remote())
        except BackPressureError:
            versions = self._versions  # a full queue is a decoder at work
        except (TimeoutError, *NO_DECODER):
            raise _not_ready("no decoder answers") from None
        if versions != self._versions:
            raise _not_ready("the decoder serves another model or other Semantic IDs")
        return JSONResponse({"ready": True, **versions})

    async def _ask(self, response: Any) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # a request that nobody waits for is not worth decoding
            raise


def application(
    settings: Settings, storage: Storage, model: Manifest, semantic_ids: Manifest, sequences: Manifest
) -> Any:
    """The Serve application for three artifacts that fit each other.

    Raises:
        ArtifactError: model and Semantic IDs, or Semantic IDs and popularity, do not belong together.
    """
    serving, decoding = settings.serving, settings.decoding
    vocabulary = load_model(storage, model, semantic_ids).vocabulary
    require_same_registry(sequences, semantic_ids)
    common = {
        "num_replicas": serving.num_replicas,
        "backpressure_config": {"retry_after_s": RETRY_AFTER_S},
        "max_constructor_retry_count": 3,
    }
    ongoing = 2 * serving.max_batch_size
    decoder = serve.deployment(Replica).options(
        max_ongoing_requests=ongoing,
        max_queued_requests=serving.max_queued_requests,
        ray_actor_options={"num_gpus": 1} if decoding.use_gpu else {"num_cpus": decoding.cpus_per_worker},
        **common,
    )
    # Much more than the decoders take: an endpoint has to accept a request to refuse it in its own words.
    # Beyond that Serve's proxy refuses, also with 503 and Retry-After, but in plain text.
    capacity = ongoing + serving.max_queued_requests
    endpoint = serve.deployment(serve.ingress()(Endpoint)).options(
        max_ongoing_requests=2 * capacity,
        max_queued_requests=8 * capacity,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    reader = {
        "item_id_type": semantic_ids.metadata["item_id_type"],
        "user_id_type": sequences.metadata["user_id_type"],
        "needs_user": needs_user(vocabulary, decoding),
    }
    return endpoint.bind(
        serving,
        reader,
        versions_of(settings, model, semantic_ids),
        decoder.bind(storage, settings, model, semantic_ids, sequences),
    )


def start(
    settings: Settings, storage: Storage, model: Manifest, semantic_ids: Manifest, sequences: Manifest
) -> None:
    """Start Serve on the cluster and return once the endpoint answers.

    Raises:
        ArtifactError: the artifacts do not fit each other.
        TigerError: Serve runs there already, or a replica does not start.
    """
    app = application(settings, storage, model, semantic_ids, sequences)
    connect(settings.ray)
    if serve.status().proxies:
        raise TigerError("Ray Serve runs on this cluster already; stop that first (`serve shutdown`)")
    http_options = {
        "host": settings.serving.host,
        "port": settings.serving.port,
        # the endpoint's own timeout comes first, with a better answer
        "request_timeout_s": settings.serving.request_timeout_s + 1,
    }
    quiet = {"log_level": "WARNING"}
    try:
        serve.start(proxy_location="EveryNode", http_options=http_options, logging_config=quiet)
        serve.run(app, name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        serve.shutdown()
        raise TigerError(f"the endpoint did not start: {str(error).strip().splitlines()[-1]}") from error
    except KeyboardInterrupt:
        serve.shutdown()
        raise


def run(
    settings: Settings, storage: Storage, model: Manifest, semantic_ids: Manifest, sequences: Manifest
) -> None:
    """Serve until Ctrl-C or SIGTERM; requests under way are answered before it returns.

    Raises: as `start`.
    """
    start(settings, storage, model, semantic_ids, sequences)
    address = f"http://{settings.serving.host}:{settings.serving.port}"
    print(f"serving the model of {settings.date} on {address}; Ctrl-C or SIGTERM stops it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    serve.shutdown()
    print("stopped", flush=True)


def _not_ready(message: str) -> Refused:
    return Refused(503, "not_ready", message)


async def _refused(request: Request, error: Any) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else None
    return JSONResponse({"error": error.error}, error.status, headers)


async def _http_error(request: Request, error: Any) -> JSONResponse:
    code = STATUS_CODES.get(error.status_code, "invalid_request")
    return JSONResponse({"error": {"code": code, "message": error.detail}}, error.status_code, error.headers)


async def _internal_error(request: Request, error: Any) -> JSONResponse:
    return await _refused(request, Refused(500, "internal", "internal error; the log has more"))


async def _body(request: Request) -> bytes:
    """The body, without ever holding more than the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refused(413, "body_too_large", f"a body may have at most {MAX_BODY_BYTES} bytes")
    return bytes(body)
