"""The HTTP endpoint on Ray Serve: a history in, the next items out.

    curl http://127.0.0.1:8000/v1/recommendations -H 'Content-Type: application/json' \\
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
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from tiger_ray.beam_search import best_first
from tiger_ray.cluster import connect
from tiger_ray.config import ServingSettings, Settings
from tiger_ray.errors import ArtifactError, TigerError
from tiger_ray.hashing import stable_hash
from tiger_ray.recommendations import FALLBACK, GENERATED, Scorer
from tiger_ray.registry import require_same_registry
from tiger_ray.storage import Manifest, Storage
from tiger_ray.tokens import Vocabulary
from tiger_ray.training import load_model

APP_NAME = "tiger_ray"

MAX_BODY_BYTES = 2**20
MAX_ID_BYTES = 256

REASONS = ("too_few_eligible_items", "history_excluded", "too_few_popular_items")
"""Why an answer has fewer than k items."""

RETRY_AFTER_S = 1

STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}

NO_DECODER = (DeploymentUnavailableError, RayActorError)


class Query(NamedTuple):
    """A request that passed every check."""

    history: list[int] | list[str]
    """Item ids, oldest first."""
    k: int
    user_id: int | str | None


class Refused(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"code": code, "message": message} | ({} if field is None else {"field": field})


class QueryReader:
    """Bytes of a request to a `Query`, within bounds.

    Args:
        settings: the bounds.
        item_id_type: `string`, `large_string` or `int64`, of the catalog's item ids.
        user_id_type: the same of the user ids.
        needs_user: must a request say who asks?
    """

    def __init__(
        self, settings: ServingSettings, item_id_type: str, user_id_type: str, *, needs_user: bool
    ) -> None:
        item_id, user_id = _id_field(item_id_type), _id_field(user_id_type)
        self._body: type[BaseModel] = create_model(
            "Body",
            __config__=ConfigDict(strict=True, extra="forbid"),
            history=(Annotated[list[item_id], Field(max_length=settings.max_history)], ...),  # type: ignore[valid-type]
            k=(Annotated[int, Field(ge=1, le=settings.max_k)], ...),
            user_id=(user_id, ...) if needs_user else (user_id | None, None),
        )

    def read(self, body: bytes) -> Query:
        """The query in a JSON body.

        Raises:
            Refused: says which field is wrong, and repeats nothing of what was sent but the name of a field.
        """
        try:
            return Query(**dict(self._body.model_validate_json(body)))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            raise Refused(400, "invalid_json", problem["msg"])
        field = ".".join(str(part) for part in problem["loc"])[:100]
        raise Refused(422, "invalid_request", problem["msg"].removeprefix("Value error, "), field)


class Recommender:
    """Queries to answers in one process; no Ray in here."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        model: Manifest,
        semantic_ids: Manifest,
        sequences: Manifest,
    ) -> None:
        self.versions = _versions(settings, model, semantic_ids)
        self._max_k = settings.serving.max_k
        self._exclude_history = settings.recommendations.exclude_history
        self._scorer = Scorer(storage, settings, model, semantic_ids, sequences)
        self._needs_user = needs_user(settings, self._scorer.vocabulary)
        # a hash table that is built once; `SemanticIds.lookup` would build one for every batch
        self._items = pd.Index(self._scorer.ids.item_id.to_pandas())
        self._items.get_indexer(self._items[:1])  # here, or the first requests would wait for it
        self._user_id_type = pa.type_for_alias(sequences.metadata["user_id_type"])
        self._popular = self._scorer.most_popular(self._max_k)
        self.check()

    def check(self) -> None:
        """Decode one history, to be sure that it works.

        Raises:
            ArtifactError: nothing, or not a number, came out.
        """
        item = np.flatnonzero(self._scorer.ids.eligible_N)[:1].astype(np.int32)
        found_1K, score_1K = self._scorer.recommend(
            item, np.ones(1, np.int64), np.zeros(1, np.uint64), self._max_k
        )
        if found_1K[0, 0] < 0 or not np.isfinite(score_1K[0, 0]):
            raise ArtifactError(f"the model recommends nothing after item_index {item[0]} ({self.versions})")

    def answer(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """One answer per query, ready for JSON; in fp32 it does not depend on the others of the batch."""
        item_index = self._items.get_indexer(
            pd.Index([item for query in queries for item in query.history], dtype=self._items.dtype)
        )
        user_E = np.repeat(np.arange(len(queries)), [len(query.history) for query in queries])
        known_E = item_index >= 0
        lengths_B = np.bincount(user_E[known_E], minlength=len(queries)).astype(np.int64)
        unknown_B = np.bincount(user_E[~known_E], minlength=len(queries))
        generated_B = lengths_B > 0
        found_BK = np.full((len(queries), self._max_k), -1, np.int64)
        score_BK = np.full(found_BK.shape, -np.inf, np.float32)
        if generated_B.any():
            # always for the largest k, so that a batch may mix them
            found_BK[generated_B], score_BK[generated_B] = self._scorer.recommend(
                item_index[known_E].astype(np.int32),
                lengths_B[generated_B],
                self._user_hash(queries)[generated_B],
                self._max_k,
                exclude_history=self._exclude_history,
            )
        popular_K, share_K = self._popular
        found_BK[~generated_B, : len(popular_K)] = popular_K
        score_BK[~generated_B, : len(popular_K)] = share_K
        return [
            self._answer(
                query.k, found_BK[user], score_BK[user], bool(generated_B[user]), int(unknown_B[user])
            )
            for user, query in enumerate(queries)
        ]

    def _answer(
        self,
        k: int,
        found_K: npt.NDArray[np.int64],
        score_K: npt.NDArray[np.float32],
        generated: bool,
        unknown: int,
    ) -> dict[str, Any]:
        ids = self._scorer.ids
        (found_k,), (score_k,) = best_first(found_K[None, :k], score_K[None, :k])
        item_index = found_k[found_k >= 0]
        columns = [
            ids.item_ids(item_index).to_pylist(),
            score_k.tolist(),
            ids.codes_NI[item_index].tolist(),
        ]
        names = ("item_id", "score", "semantic_id")
        answer = {
            "items": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=False)],
            "source": GENERATED if generated else FALLBACK,
            "unknown_items": unknown,
            **self.versions,
        }
        if len(item_index) < k:
            few_eligible = int(ids.eligible_N.sum()) < k
            answer["reason"] = REASONS[0] if few_eligible else REASONS[1] if generated else REASONS[2]
        return answer

    def _user_hash(self, queries: Sequence[Query]) -> npt.NDArray[np.uint64]:
        if not self._needs_user:
            return np.zeros(len(queries), np.uint64)
        return stable_hash(pa.array([query.user_id for query in queries], self._user_id_type))


class Decoder:
    """A replica that decodes requests in batches."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        model: Manifest,
        semantic_ids: Manifest,
        sequences: Manifest,
    ) -> None:
        self._recommender = Recommender(storage, settings, model, semantic_ids, sequences)
        self.answer.set_max_batch_size(settings.serving.max_batch_size)
        self.answer.set_batch_wait_timeout_s(settings.serving.batch_wait_s)

    @serve.batch  # type: ignore[untyped-decorator]
    async def answer(self, queries: list[Query]) -> list[dict[str, Any]]:
        """Answers to the queries of one batch."""
        return self._recommender.answer(queries)

    async def versions(self) -> dict[str, str]:
        """What this replica serves."""
        return self._recommender.versions

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self._recommender.check()


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
    decoder = serve.deployment(Decoder).options(
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
        "needs_user": needs_user(settings, vocabulary),
    }
    return endpoint.bind(
        serving,
        reader,
        _versions(settings, model, semantic_ids),
        decoder.bind(storage, settings, model, semantic_ids, sequences),
    )


def needs_user(settings: Settings, vocabulary: Vocabulary) -> bool:
    """Does an answer depend on who asks: by a user token, or by a draw of the user's own?"""
    return vocabulary.num_user_buckets > 0 or settings.decoding.sample


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


def _versions(settings: Settings, model: Manifest, semantic_ids: Manifest) -> dict[str, str]:
    return {
        "model_version": model.run_id,
        "semantic_ids_version": semantic_ids.run_id,
        "date": settings.date,
    }


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


def _id_field(id_type: str) -> Any:
    """How an id of an Arrow type looks in JSON."""
    if id_type == "int64":
        return Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    return Annotated[str, AfterValidator(_short)]


def _short(text: str) -> str:
    if len(text.encode()) > MAX_ID_BYTES:
        raise ValueError(f"an id may have at most {MAX_ID_BYTES} bytes")
    return text
