"""The HTTP contract: models of the request, the answer and the error, from which FastAPI writes OpenAPI.

An error is a problem document of RFC 9457 (`application/problem+json`): `type`, `title`, `status`, `detail` and
`instance` of the standard, and two members of our own, `code` and `field`. `PROBLEMS` lists every code.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, NamedTuple, get_args

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiger_ray.settings.serving import ServingSettings

MAX_BODY_BYTES = 2**20


MAX_ID_BYTES = 256


RETRY_AFTER_S = 1


PROBLEM_JSON = "application/problem+json"


Reason = Literal["too_few_eligible_items", "history_excluded", "too_few_popular_items"]


REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why an answer has fewer than k items."""


PROBLEMS = {
    "invalid_json": (400, "The body is not JSON"),
    "not_found": (404, "There is nothing at this path"),
    "method_not_allowed": (405, "This path does not know this method"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The body is not declared as JSON"),
    "invalid_request": (422, "The request breaks the schema"),
    "internal": (500, "The endpoint failed"),
    "not_ready": (503, "No decoder serves this model"),
    "overloaded": (503, "Too many requests are waiting"),
    "timeout": (504, "The answer took too long"),
}
"""Code of an error -> HTTP status and title."""


class Query(NamedTuple):
    """A request that passed every check, as it travels to a decoder."""

    history: list[int] | list[str]
    """Item ids, oldest first."""
    k: int
    user_id: int | str | None


class IdTypes(NamedTuple):
    """What a request must say, as the artifacts decide."""

    item_id_type: str
    """`string`, `large_string` or `int64`: the Arrow type of the catalog's item ids."""
    user_id_type: str
    """The Arrow type of the user ids."""
    needs_user: bool
    """Must a request name the user?"""


class _Described(BaseModel):
    """A model whose docstrings are the descriptions in OpenAPI."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Versions(_Described):
    """The artifacts behind an answer."""

    model_version: str
    """Run ID of the model."""
    semantic_ids_version: str
    """Run ID of the Semantic IDs."""
    date: datetime.date
    """Night of the artifacts."""


class Item(_Described):
    """A recommended item."""

    item_id: int | str
    """ID of the item in the catalog."""
    score: float
    """Natural log of the item's probability; of its share of all events in a `fallback` answer."""
    semantic_id: list[int]
    """Codewords of the item's Semantic ID."""


class Recommendations(Versions):
    """The next items after a history."""

    items: list[Item]
    """Items, best first."""
    source: Literal["generated", "fallback"]
    """`generated`: by the model. `fallback`: popular items, because the catalog knows no item of the history."""
    unknown_items: int
    """History items that the catalog does not know."""
    reason: Reason | None = None
    """Why there are fewer than k items; absent if there are k."""


class Alive(_Described):
    """The process answers."""

    alive: Literal[True]


class Ready(Versions):
    """A decoder serves the model and the Semantic IDs of this endpoint."""

    ready: Literal[True]


class Problem(_Described):
    """An error, as RFC 9457 describes it."""

    type: str
    """Name of the kind of error: `urn:tiger-ray:problem:<code>`. The name is no address."""
    title: str
    """The kind of error in words."""
    status: int
    """HTTP status."""
    detail: str
    """This error in words."""
    instance: str
    """Name of this error, `urn:uuid:...`; the log has the same name beside an internal error."""
    code: str
    """The kind of error for programs."""
    field: str | None = None
    """Path of the wrong field, such as `history.0`; present if `code` is `invalid_request`."""


class Refused(HTTPException):
    """A request that gets a problem document instead of an answer.

    Args:
        code: a key of `PROBLEMS`.
        detail: this error in words; of the request's content it may repeat only the name of a field.
        field: path of the wrong field.
    """

    def __init__(self, code: str, detail: str, field: str | None = None) -> None:
        status, _ = PROBLEMS[code]
        super().__init__(status, detail, {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None)
        self.code = code
        self.field = field


class BodyLimit:
    """ASGI middleware that never holds more of a body than `MAX_BODY_BYTES`.

    FastAPI's own `max_body_size` answers in plain text, so this one raises.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with a `receive` that counts.

        Raises:
            Refused: the body is too large.
        """
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise Refused("body_too_large", f"a body may have at most {MAX_BODY_BYTES} bytes")
            return message

        await self.app(scope, limited, send)


class JsonRequest(Request):
    """A request whose body pydantic parses.

    Python's own parser takes UTF-16, a byte order mark and lone surrogates, and recurses on deep nesting.
    """

    async def json(self) -> Any:
        """The parsed body.

        Raises:
            Refused: the body is not JSON in UTF-8.
        """
        try:
            return from_json(await self.body())
        except ValueError as error:
            raise Refused("invalid_json", str(error)) from None


def json_route(timeout_s: float) -> type[APIRoute]:
    """The class of routes that read a JSON body and answer within `timeout_s` seconds, the reading included."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                request = JsonRequest(request.scope, request.receive)
                declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if declared != "application/json":
                    raise Refused("unsupported_media_type", "Content-Type must be application/json")
                try:
                    async with asyncio.timeout(timeout_s):
                        if not await request.body():
                            raise Refused("invalid_json", "the body is empty")
                        return await handle(request)
                except TimeoutError:
                    raise Refused("timeout", f"no answer within {timeout_s:g} s") from None

            return handle_json

    return JsonRoute


def request_model(settings: ServingSettings, ids: IdTypes) -> type[BaseModel]:
    """The model of a request body: JSON types are not converted, unknown fields are refused."""
    item_id, user_id = id_field(ids.item_id_type), id_field(ids.user_id_type)
    history = Field(max_length=settings.max_history, description="Item ids, oldest first.")
    k = Field(ge=1, le=settings.max_k, description="Number of items to recommend.")
    user = Field(description="Who asks.")
    return create_model(
        "Query",
        __config__=ConfigDict(strict=True, extra="forbid"),
        __doc__="A history, and how many items to recommend after it.",
        history=(Annotated[list[item_id], history], ...),  # type: ignore[valid-type]
        k=(Annotated[int, k], ...),
        user_id=(Annotated[user_id, user], ...)
        if ids.needs_user
        else (Annotated[user_id | None, user], None),
    )


def answer_model(ids: IdTypes) -> type[Recommendations]:
    """`Recommendations` with the item ids of this catalog's type."""
    item_id = int if ids.item_id_type == "int64" else str
    item = create_model("Item", __base__=Item, __doc__=Item.__doc__, item_id=(item_id, ...))
    return create_model(
        "Recommendations",
        __base__=Recommendations,
        __doc__=Recommendations.__doc__,
        items=(list[item], ...),  # type: ignore[valid-type]
    )


def id_field(id_type: str) -> Any:
    """The JSON type of an id whose Arrow type is `id_type`."""
    if id_type == "int64":
        return Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    # A character has at least one byte: OpenAPI can state the limit in characters only.
    return Annotated[str, Field(max_length=MAX_ID_BYTES), AfterValidator(short_enough)]


def short_enough(text: str) -> str:
    """The id, if its UTF-8 is at most `MAX_ID_BYTES` long.

    Raises:
        ValueError: the id is longer.
    """
    if len(text.encode()) > MAX_ID_BYTES:
        raise ValueError(f"an id may have at most {MAX_ID_BYTES} bytes")
    return text


def invalid_request(error: RequestValidationError) -> Refused:
    """The first of FastAPI's findings, without the value that was sent."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])[:100]  # loc begins with "body"
    return Refused("invalid_request", first["msg"].removeprefix("Value error, "), field)


def problem_response(error: HTTPException, instance: str) -> JSONResponse:
    """An error as a problem document; `instance` names this occurrence."""
    by_status = {404: "not_found", 405: "method_not_allowed"}
    code = error.code if isinstance(error, Refused) else by_status.get(error.status_code, "invalid_request")
    problem = Problem(
        type=f"urn:tiger-ray:problem:{code}",
        title=PROBLEMS[code][1],
        status=error.status_code,
        detail=error.detail,
        instance=instance,
        code=code,
        field=error.field if isinstance(error, Refused) else None,
    )
    content = problem.model_dump(exclude_none=True)
    return JSONResponse(content, error.status_code, error.headers, media_type=PROBLEM_JSON)


def describe_problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the errors of one route.

    FastAPI describes every model as `application/json`, so the schema of a problem is written out here.
    """
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted({PROBLEMS[code][0] for code in codes}):
        same = [code for code in codes if PROBLEMS[code][0] == status]
        schema = Problem.model_json_schema()
        schema["properties"]["status"]["const"] = status
        schema["properties"]["code"]["enum"] = same
        described[status] = {
            "description": "; ".join(PROBLEMS[code][1] for code in same),
            "content": {PROBLEM_JSON: {"schema": schema}},
        }
        if status == 503:
            retry = {"description": "Seconds to wait.", "required": True, "schema": {"type": "integer"}}
            described[status]["headers"] = {"Retry-After": retry}
    return described
