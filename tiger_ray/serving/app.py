"""The HTTP endpoint on Ray Serve: a history in, the next items out.

    curl http://127.0.0.1:8000/v1/recommendations -H 'Content-Type: application/json' \
         -d '{"history": ["item-17", "item-4"], "k": 10}'

`GET /openapi.json` describes requests, answers and errors; the models are in `http.py`. `GET /livez` answers while
the process does, `GET /readyz` once a decoder serves the model and the Semantic IDs of this endpoint.

Endpoint replicas read and check requests and never touch the model; decoder replicas answer requests in batches.
A request that finds all queues full is refused at once.
"""

# No `from __future__ import annotations`: FastAPI reads the types of a route, and those of `recommendations` are
# made at run time, from the settings and the catalog.

import asyncio
import contextlib
import logging
import threading
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from tiger_ray.artifacts.lineage import require_same_registry
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import SemanticIdsMetadata, SequencesMetadata
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.connect import connect, is_local
from tiger_ray.errors import TigerError
from tiger_ray.published.model import load_vocabulary
from tiger_ray.rankers.tiger import needs_user
from tiger_ray.serving.http import (
    RETRY_AFTER_S,
    Alive,
    BodyLimit,
    IdTypes,
    Query,
    Ready,
    Refused,
    answer_model,
    describe_problems,
    invalid_request,
    json_route,
    problem_response,
    request_model,
)
from tiger_ray.serving.replica import NO_DECODER, Replica, versions_of
from tiger_ray.settings.serving import ServingSettings
from tiger_ray.settings.settings import Settings

APP_NAME = "tiger_ray"


_log = logging.getLogger(__name__)


class Endpoint:
    """A replica that speaks HTTP.

    Args:
        settings: bounds of a request, and the timeout.
        ids: the types of item ids and user ids.
        versions: what the decoder must serve, as `versions_of` says it.
        decoder: Serve's handle of the decoder.
    """

    def __init__(
        self, settings: ServingSettings, ids: IdTypes, versions: dict[str, str], decoder: Any
    ) -> None:
        self._settings = settings
        self._ids = ids
        self._versions = versions
        self._decoder = decoder

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The hook of Serve."""
        return self.asgi_app()

    def asgi_app(self) -> FastAPI:
        """The routes of this replica."""
        query_type, answer_type = request_model(self._settings, self._ids), answer_model(self._ids)

        async def recommendations(query: query_type) -> answer_type:  # type: ignore[valid-type]
            """The next items after a history."""
            # Serve replaces an exception handler for its own errors by one that answers in plain text.
            try:
                return await self._ask(self._decoder.answer.remote(Query(**dict(query))))
            except BackPressureError:
                raise Refused("overloaded", "too many requests are waiting") from None

        app = FastAPI(
            title="tiger_ray",
            version="1",
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            middleware=[Middleware(BodyLimit)],
            exception_handlers=dict.fromkeys(
                (HTTPException, RequestValidationError, Exception), _answer_error
            ),
            generate_unique_id_function=lambda route: route.name,
        )
        app.router.add_api_route(
            "/v1/recommendations",
            recommendations,
            methods=["POST"],
            response_model_exclude_none=True,
            responses=describe_problems(
                "invalid_json",
                "body_too_large",
                "unsupported_media_type",
                "invalid_request",
                "internal",
                "not_ready",
                "overloaded",
                "timeout",
            ),
            route_class_override=json_route(self._settings.request_timeout_s),
        )
        app.add_api_route("/livez", self.livez, methods=["GET"])
        app.add_api_route(
            "/readyz", self.readyz, methods=["GET"], responses=describe_problems("internal", "not_ready")
        )
        return app

    async def livez(self) -> Alive:
        """The process is alive."""
        return Alive(alive=True)

    async def readyz(self) -> Ready:
        """A decoder serves the model and the Semantic IDs of this endpoint."""
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                versions = await self._ask(self._decoder.versions.remote())
        except BackPressureError:
            versions = self._versions  # a full queue is a decoder at work
        except TimeoutError:
            raise Refused("not_ready", "no decoder answers") from None
        if versions != self._versions:
            raise Refused("not_ready", "the decoder serves another model or other Semantic IDs")
        return Ready(ready=True, **versions)

    async def _ask(self, response: Any) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # the client is gone or the time is over: spare the decoder
            raise
        except NO_DECODER:
            raise Refused("not_ready", "no decoder answers") from None


def application(
    settings: Settings, storage: Storage, model: Manifest, semantic_ids: Manifest, sequences: Manifest
) -> Any:
    """The Serve application for three artifacts that fit each other.

    Args:
        settings: of the endpoint and of decoding.
        storage: where the artifacts are published.
        model: manifest of the model; the driver reads only its `config.json`.
        semantic_ids: manifest of the Semantic IDs.
        sequences: manifest of the histories, which hold the popularity of items.

    Raises:
        ArtifactError: model and Semantic IDs, or Semantic IDs and popularity, do not belong together.
    """
    serving, decoding = settings.serving, settings.decoding
    vocabulary = load_vocabulary(storage, model, semantic_ids)
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
    # The endpoint must accept a request to refuse it with a problem document, so it accepts many more than the
    # decoders take. Beyond this limit Serve's proxy refuses, also with 503 and Retry-After, but in plain text.
    capacity = ongoing + serving.max_queued_requests
    endpoint = serve.deployment(serve.ingress()(Endpoint)).options(
        max_ongoing_requests=2 * capacity,
        max_queued_requests=8 * capacity,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    ids = IdTypes(
        item_id_type=SemanticIdsMetadata.of(semantic_ids).item_id_type,
        user_id_type=SequencesMetadata.of(sequences).user_id_type,
        needs_user=needs_user(vocabulary, decoding),
    )
    return endpoint.bind(
        serving,
        ids,
        versions_of(settings, model, semantic_ids),
        decoder.bind(storage, settings, model, semantic_ids, sequences),
    )


def start(
    settings: Settings, storage: Storage, model: Manifest, semantic_ids: Manifest, sequences: Manifest
) -> None:
    """Start Serve on the cluster and return once the endpoint answers.

    Args:
        settings: of the night and the endpoint.
        storage: where the artifacts are.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs.
        sequences: manifest of the histories, which hold the popularity.

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
        # The endpoint's own timeout comes first, with a problem document.
        "request_timeout_s": settings.serving.request_timeout_s + 1,
    }
    # Serve sets the level of its processes by `logging_config`, and the driver's own to INFO when it is imported.
    quiet = {"log_level": "WARNING"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
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
    """Serve until Ctrl-C or SIGTERM; requests under way are answered before the function returns.

    Args:
        settings: of the night and the endpoint.
        storage: where the artifacts are.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs.
        sequences: manifest of the histories, which hold the popularity.

    Raises:
        ArtifactError: the artifacts do not fit each other.
        TigerError: Serve runs there already, or a replica does not start.
    """
    start(settings, storage, model, semantic_ids, sequences)
    address = f"http://{settings.serving.host}:{settings.serving.port}"
    _log.info("serving the model of %s on %s; Ctrl-C or SIGTERM stops it", settings.date, address)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    serve.delete(APP_NAME)
    # A Ray of our own ends with this process. `serve.shutdown` would print that the call which kills Serve's
    # controller failed and will be retried.
    if not is_local(settings.ray):
        serve.shutdown()
    _log.info("stopped")


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    instance = f"urn:uuid:{uuid.uuid4()}"
    match error:
        case HTTPException():
            refusal = error
        case RequestValidationError():
            refusal = invalid_request(error)
        case _:
            _log.error("internal error %s: %r", instance, error)
            refusal = Refused("internal", "internal error; the log of the endpoint names it by `instance`")
    return problem_response(refusal, instance)
