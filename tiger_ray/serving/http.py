"""What the endpoint reads and answers: the query, its checks, and the status codes."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from tiger_ray.settings.serving import ServingSettings

MAX_BODY_BYTES = 2**20


MAX_ID_BYTES = 256


REASONS = ("too_few_eligible_items", "history_excluded", "too_few_popular_items")
"""Why an answer has fewer than k items."""


RETRY_AFTER_S = 1


STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}


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
        item_id, user_id = id_field(item_id_type), id_field(user_id_type)
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


def id_field(id_type: str) -> Any:
    """How an id of an Arrow type looks in JSON."""
    if id_type == "int64":
        return Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    return Annotated[str, AfterValidator(short_enough)]


def short_enough(text: str) -> str:
    """The id, if its UTF-8 is at most `MAX_ID_BYTES` long.

    Raises:
        ValueError: it is longer.
    """
    if len(text.encode()) > MAX_ID_BYTES:
        raise ValueError(f"an id may have at most {MAX_ID_BYTES} bytes")
    return text
