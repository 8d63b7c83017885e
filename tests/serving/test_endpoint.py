"""The HTTP endpoint: `jobs/serve.py` as a process, asked over HTTP; a fake decoder plays the faults.

The world is 40 items and a random model, published without training. Scoring every item one by one gives the
expected answers. Every answer of the endpoint is checked against the endpoint's own OpenAPI document.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from openapi_spec_validator import validate as validate_openapi
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from tests.published_worlds import DATE, INELIGIBLE, NUM_ITEMS, World, make_world
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import stable_hash
from tiger_ray.errors import ArtifactError
from tiger_ray.rankers.tiger import needs_user
from tiger_ray.serving import app as serving
from tiger_ray.serving.app import Endpoint
from tiger_ray.serving.http import MAX_BODY_BYTES, PROBLEMS, IdTypes, Problem, Query
from tiger_ray.serving.replica import Snapshot
from tiger_ray.settings.serving import ServingSettings
from tiger_ray.stages import recommendations
from tiger_ray.stages.stage import Context

pytestmark = [pytest.mark.ray, pytest.mark.serve]


REPOSITORY = Path(__file__).parents[2]
JSON = {"Content-Type": "application/json"}
START_S = 120


def require_described(document: dict[str, Any], answer: httpx.Response) -> None:
    """Check status, media type, body and required headers of an answer against an OpenAPI document.

    OpenAPI has no place for unknown paths and methods; their problem documents are checked against the model.
    """
    request = answer.request
    operation = document["paths"].get(request.url.path, {}).get(request.method.lower())
    if operation is None:
        assert answer.headers["content-type"] == "application/problem+json"
        described = Problem.model_json_schema()
    else:
        response = operation["responses"][str(answer.status_code)]
        ((media_type, content),) = response["content"].items()
        assert answer.headers["content-type"] == media_type
        assert set(response.get("headers", ())) <= {name.title() for name in answer.headers}
        described = content["schema"]
    schema = without_more_properties({**described, "components": document["components"]})
    jsonschema.Draft202012Validator(schema).validate(answer.json())


def without_more_properties(schema: Any) -> Any:
    """A JSON Schema that allows only the properties that the schema names."""
    if isinstance(schema, list):
        return [without_more_properties(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: without_more_properties(part) for name, part in schema.items()}
    return closed | {"additionalProperties": False} if schema.get("type") == "object" else closed


def require_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of an answer with the expected status and code."""
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code), answer.text
    assert (problem["type"], problem["title"]) == (f"urn:tiger-ray:problem:{code}", PROBLEMS[code][1])
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
    return problem


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("artifacts"))


class Server(NamedTuple):
    """The job, running."""

    process: subprocess.Popen[bytes]
    log: Path
    http: httpx.Client

    def ask(self, history: list[Any], k: int, **more: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/recommendations", json={"history": history, "k": k, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`jobs/serve.py` on a free port, with a Ray of its own; stopped by the last test, or here."""
    folder = tmp_path_factory.mktemp("job")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = world.settings.model_dump(
        mode="json", include={"date", "storage", "catalog", "events", "decoding"}
    )
    values |= {"serving": world.settings.serving.model_dump() | {"port": port}, "ray": {"num_cpus": 2}}
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    log = folder / "log"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / "jobs/serve.py"), "--config", str(folder / "serve.yaml")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        ) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
    ):
        try:
            deadline = time.monotonic() + START_S
            while b"serving the model of" not in log.read_bytes():
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            document = http.get("/openapi.json").json()

            def check(answer: httpx.Response) -> None:
                answer.read()
                require_described(document, answer)

            http.event_hooks["response"] = [check]
            yield Server(process, log, http)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


# Over HTTP


def test_items_are_the_best_of_scoring_every_item(world: World, server: Server) -> None:
    history = [7, 0, 12]
    answer = server.ask([world.item_ids[item] for item in history], 10)
    expected = world.best(history)[:10]
    assert [item["item_id"] for item in answer["items"]] == [item_id for item_id, _ in expected]
    scores = [item["score"] for item in answer["items"]]
    np.testing.assert_allclose(scores, [score for _, score in expected], atol=1e-4)
    first = world.item_ids.index(expected[0][0])
    assert answer["items"][0]["semantic_id"] == world.codes_NI[first].tolist()
    del answer["items"]
    assert answer == {
        "source": "generated",
        "unknown_items": 0,
        "model_version": world.manifests["model"].run_id,
        "semantic_ids_version": world.manifests["semantic_ids"].run_id,
        "date": DATE,
    }


def test_unknown_items_are_counted_and_do_not_change_the_answer(world: World, server: Server) -> None:
    known = world.item_ids[:2]
    clean, mixed = server.ask(known, 5), server.ask([known[0], "nobody", known[1], ""], 5)
    assert (clean.pop("unknown_items"), mixed.pop("unknown_items")) == (0, 2)
    assert clean == mixed


@pytest.mark.parametrize("history", [[], ["nobody", "nowhere"]], ids=["empty", "unknown"])
def test_a_history_without_a_known_item_gets_popular_items(
    world: World, server: Server, history: list[str]
) -> None:
    answer = server.ask(history, 10)
    assert answer["source"] == "fallback"
    assert answer["unknown_items"] == len(history)
    assert [item["item_id"] for item in answer["items"]] == [world.item_ids[item] for item in (7, 1, 0, 2)]
    expected = np.log(np.array([50, 10, 8, 2]) / 125)
    np.testing.assert_allclose([item["score"] for item in answer["items"]], expected, rtol=1e-6)
    assert answer["reason"] == "too_few_popular_items"


def test_an_answer_with_fewer_than_k_items_says_why(world: World, server: Server) -> None:
    answer = server.ask(world.item_ids[:1], NUM_ITEMS)
    found = {item["item_id"] for item in answer["items"]}
    assert found == set(world.item_ids) - {world.item_ids[item] for item in INELIGIBLE}
    assert answer["reason"] == "too_few_eligible_items"


def test_requests_in_parallel_get_the_answers_they_get_alone(world: World, server: Server) -> None:
    histories = [[world.item_ids[(3 * i + j) % NUM_ITEMS] for j in range(1 + 3 * i)] for i in range(8)]
    alone = [server.ask(history, 1 + i) for i, history in enumerate(histories)]
    with ThreadPoolExecutor(len(histories)) as threads:
        together = list(threads.map(server.ask, histories, range(1, 9)))
    for one, other in zip(alone, together, strict=True):
        scores = [[item.pop("score") for item in answer["items"]] for answer in (one, other)]
        np.testing.assert_allclose(*scores, atol=1e-5)
        assert one == other


def test_overload_is_refused_with_503_and_leaves_no_mark(world: World, server: Server) -> None:
    def ask(_: int) -> httpx.Response:
        return server.http.post("/v1/recommendations", json={"history": world.item_ids[:5], "k": 5})

    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(ask, range(120)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        require_problem(answer, 503, "overloaded")
    assert server.ask(world.item_ids[:5], 5)["source"] == "generated"


BAD_BODIES = {
    "empty": (b"", 400),
    "not json": (b"history=1", 400),
    "byte order mark": (b'\xef\xbb\xbf{"history":[],"k":1}', 400),
    "utf-16": ('{"history":[],"k":1}'.encode("utf-16"), 400),
    "not utf-8": (b'{"history":["\xff"],"k":1}', 400),
    "lone surrogate": (b'{"history":["\\ud800"],"k":1}', 400),
    "surrogate key": (b'{"history":[],"k":1,"\\udfff":1}', 400),
    "deep nesting": (b'{"history":' + b"[" * 100_000, 400),
    "long number": (b'{"history":[],"k":' + b"9" * 10_000 + b"}", 400),
    "null": (b"null", 422),
    "array": (b"[]", 422),
    "no k": (b'{"history":[]}', 422),
    "no history": (b'{"k":1}', 422),
    "extra key": (b'{"history":[],"k":1,"model_uri":"http://127.0.0.1/x"}', 422),
    "k zero": (b'{"history":[],"k":0}', 422),
    "k negative": (b'{"history":[],"k":-1}', 422),
    "k too large": (b'{"history":[],"k":41}', 422),
    "k huge": (b'{"history":[],"k":9223372036854775808}', 422),
    "k fraction": (b'{"history":[],"k":1.5}', 422),
    "k float": (b'{"history":[],"k":1.0}', 422),
    "k text": (b'{"history":[],"k":"10"}', 422),
    "k true": (b'{"history":[],"k":true}', 422),
    "k null": (b'{"history":[],"k":null}', 422),
    "k NaN": (b'{"history":[],"k":NaN}', 422),
    "k Infinity": (b'{"history":[],"k":Infinity}', 422),
    "item NaN": (b'{"history":[NaN],"k":1}', 422),
    "item number": (b'{"history":[1],"k":1}', 422),
    "item null": (b'{"history":[null],"k":1}', 422),
    "item list": (b'{"history":[["a"]],"k":1}', 422),
    "item too long": (b'{"history":["' + b"a" * 257 + b'"],"k":1}', 422),
    "history text": (b'{"history":"item-01","k":1}', 422),
    "history too long": (json.dumps({"history": ["a"] * 51, "k": 1}).encode(), 422),
    "user number": (b'{"history":[],"k":1,"user_id":7}', 422),
    "too many bytes": (b'{"history":["' + b"a" * 2**20 + b'"],"k":1}', 413),
    "20 MB": (b" " * 20_000_000, 413),
}
CODES = {400: "invalid_json", 413: "body_too_large", 422: "invalid_request"}


@pytest.mark.parametrize(("body", "status"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_wrong_body_gets_4xx_and_a_code(server: Server, body: bytes, status: int) -> None:
    answer = server.http.post("/v1/recommendations", content=body, headers=JSON)
    problem = require_problem(answer, status, CODES[status])
    assert ("field" in problem) == (status == 422)
    assert len(answer.content) < 500


def test_two_errors_have_two_names(server: Server) -> None:
    names = {server.http.get("/nowhere").json()["instance"] for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("urn:uuid:") for name in names)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_declared_json_is_refused(server: Server, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = server.http.post("/v1/recommendations", content=b'{"history":[],"k":1}', headers=headers)
    require_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/redoc", 404, "not_found"),
        ("GET", "/v1/%2e%2e/%2e%2e/etc/passwd", 404, "not_found"),
        ("POST", "/v1/recommendations/", 404, "not_found"),
        ("GET", "/v1/recommendations", 405, "method_not_allowed"),
        ("DELETE", "/v1/recommendations", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/recommendations", 405, "method_not_allowed"),
        ("POST", "/readyz", 405, "method_not_allowed"),
    ],
)
def test_an_unknown_path_or_method_is_refused(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    answer = server.http.request(method, path)
    require_problem(answer, status, code)


def test_readyz_names_model_and_semantic_ids(world: World, server: Server) -> None:
    assert server.http.get("/livez").status_code == 200
    answer = server.http.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {
        "ready": True,
        "model_version": world.manifests["model"].run_id,
        "semantic_ids_version": world.manifests["semantic_ids"].run_id,
        "date": DATE,
    }


def test_sigterm_stops_the_job_cleanly(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0, server.log.read_text()[-3000:]
    assert server.log.read_text().rstrip().endswith("stopped")
    for noise in ("Traceback", "Started Serve", "Connecting to existing Serve", "retries", "max_restarts"):
        assert noise not in server.log.read_text()
    with pytest.raises(httpx.ConnectError):
        server.http.get("/livez")


# The endpoint with a decoder that misbehaves


class FakeDecoder:
    """A handle whose every call does the same."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.cancelled = 0
        self.queries: list[Query] = []
        self.answer = self.versions = self

    def remote(self, *queries: Query) -> "FakeDecoder":
        self.queries += queries
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def __await__(self) -> Iterator[Any]:
        return asyncio.wait_for(self._run(), None).__await__()

    async def _run(self) -> Any:
        result = self.act()
        return await result if asyncio.iscoroutine(result) else result


VERSIONS = {"model_version": "m", "semantic_ids_version": "s", "date": DATE}
ANSWER = {
    "items": [],
    "source": "fallback",
    "unknown_items": 0,
    "reason": "too_few_popular_items",
    **VERSIONS,
}
GOOD_BODY = b'{"history":[],"k":1}'
STRING_IDS = IdTypes("string", "string", needs_user=False)


def ask_fake(
    act: Callable[[], Any],
    path: str = "/v1/recommendations",
    *,
    content: Any = GOOD_BODY,
    timeout_s: float = 5.0,
    ids: IdTypes = STRING_IDS,
) -> tuple[httpx.Response, FakeDecoder]:
    decoder = FakeDecoder(act)
    app = Endpoint(ServingSettings(request_timeout_s=timeout_s), ids, VERSIONS, decoder).asgi_app()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            if path == "/readyz":
                return await http.get(path)
            return await http.post(path, content=content, headers=JSON)

    answer = asyncio.run(asyncio.wait_for(ask(), 10))
    require_described(app.openapi(), answer)
    return answer, decoder


def failing(error: Exception) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


def test_a_decoder_that_does_not_answer_gives_504_and_is_told_to_stop() -> None:
    answer, decoder = ask_fake(lambda: asyncio.sleep(60), timeout_s=0.05)
    require_problem(answer, 504, "timeout")
    assert decoder.cancelled == 1


def test_a_body_that_does_not_arrive_gives_504() -> None:
    async def trickle() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    answer, _ = ask_fake(dict, content=trickle(), timeout_s=0.05)
    require_problem(answer, 504, "timeout")


def test_a_large_body_is_read_no_further_than_the_limit() -> None:
    sent = 0

    async def large() -> Any:
        nonlocal sent
        for _ in range(64):
            sent += 2**16
            yield b" " * 2**16

    answer, decoder = ask_fake(dict, content=large())
    require_problem(answer, 413, "body_too_large")
    assert MAX_BODY_BYTES < sent <= MAX_BODY_BYTES + 2 * 2**16
    assert decoder.queries == []


def test_a_full_queue_gives_503_but_stays_ready() -> None:
    full = failing(BackPressureError(num_queued_requests=4, max_queued_requests=4))
    answer, _ = ask_fake(full)
    require_problem(answer, 503, "overloaded")
    assert ask_fake(full, "/readyz")[0].status_code == 200


@pytest.mark.parametrize("path", ["/v1/recommendations", "/readyz"])
def test_a_dead_decoder_gives_503(path: str) -> None:
    answer, _ = ask_fake(failing(RayActorError()), path)
    require_problem(answer, 503, "not_ready")


def test_an_unforeseen_error_gives_500_and_only_the_log_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    answer, _ = ask_fake(failing(KeyError("s3://canary-bucket/secret")))
    (record,) = (record for record in caplog.records if record.name == "tiger_ray.serving.app")
    assert answer.json()["instance"] in record.message
    assert "canary" in record.message
    require_problem(answer, 500, "internal")
    assert "canary" not in answer.text


def test_an_answer_that_breaks_the_schema_is_not_passed_on() -> None:
    item = {"item_id": 7, "score": -1.0, "semantic_id": [1, 2]}
    for wrong in ({**ANSWER, "items": [item]}, {**ANSWER, "source": "elsewhere"}, VERSIONS):
        answer, _ = ask_fake(lambda wrong=wrong: wrong)
        require_problem(answer, 500, "internal")


def test_a_decoder_of_another_model_is_not_ready() -> None:
    assert ask_fake(lambda: VERSIONS, "/readyz")[0].status_code == 200
    answer, _ = ask_fake(lambda: {**VERSIONS, "model_version": "other"}, "/readyz")
    require_problem(answer, 503, "not_ready")
    answer, _ = ask_fake(lambda: asyncio.sleep(60), "/readyz", timeout_s=0.05)
    assert answer.status_code == 503


# Requests and answers without a server


ANY_JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists)


@given(st.binary() | ANY_JSON.map(lambda value: json.dumps(value).encode()))
@effort(max_examples=40, deadline=None)
def test_any_bytes_give_a_query_or_a_problem(body: bytes) -> None:
    for wrapped in (body, b'{"history":%s,"k":1}' % body, b'{"history":[],"k":%s}' % body):
        answer, decoder = ask_fake(lambda: ANSWER, content=wrapped)
        assert answer.status_code in (200, 400, 422), answer.text
        assert len(answer.content) < 1000
        assert len(decoder.queries) == (answer.status_code == 200)
        assert all(1 <= query.k <= 20 for query in decoder.queries)


@pytest.mark.parametrize(("id_type", "json_type"), [("int64", "integer"), ("string", "string")])
def test_the_document_is_openapi_and_states_the_bounds_of_the_settings(id_type: str, json_type: str) -> None:
    bounds = ServingSettings(max_k=7, max_history=9)
    document = (
        Endpoint(bounds, IdTypes(id_type, id_type, True), VERSIONS, FakeDecoder(dict)).asgi_app().openapi()
    )
    validate_openapi(document)
    schemas = document["components"]["schemas"]
    asked = schemas["Query"]["properties"]
    assert (asked["k"]["minimum"], asked["k"]["maximum"], asked["history"]["maxItems"]) == (1, 7, 9)
    assert asked["history"]["items"]["type"] == asked["user_id"]["type"] == json_type
    assert schemas["Item"]["properties"]["item_id"]["type"] == json_type
    assert set(schemas["Query"]["required"]) == {"history", "k", "user_id"}


def test_the_document_names_every_code_once() -> None:
    document = Endpoint(ServingSettings(), STRING_IDS, VERSIONS, FakeDecoder(dict)).asgi_app().openapi()
    errors = document["paths"]["/v1/recommendations"]["post"]["responses"].items()
    codes = [
        (code, int(status))
        for status, response in errors
        if status != "200"
        for code in response["content"]["application/problem+json"]["schema"]["properties"]["code"]["enum"]
    ]
    # Unknown paths and methods have no operation that could describe them.
    assert sorted(codes) == sorted(
        (code, status) for code, (status, _) in PROBLEMS.items() if status not in (404, 405)
    )


def test_integer_ids_and_user_tokens_are_served(tmp_path: Path) -> None:
    world = make_world(tmp_path, pa.int64(), num_user_buckets=5)
    snapshot = world.snapshot()
    history = [4, 9]
    users = [12345678901, 3]
    queries = [Query([world.item_ids[item] for item in history], 5, user) for user in users]
    answers = snapshot.answer(queries)
    for user, answer in zip(users, answers, strict=True):
        bucket = int(stable_hash(pa.array([user]))[0] % 5)
        expected = world.best(history, bucket)[:5]
        assert [item["item_id"] for item in answer["items"]] == [item_id for item_id, _ in expected]
    assert answers[0]["items"] != answers[1]["items"], "the two users must differ, or the test says nothing"


def test_a_draw_belongs_to_its_user_and_a_shorter_one_is_its_beginning(world: World) -> None:
    snapshot = world.snapshot(decoding={"sample": True})
    decoding = world.settings.decoding.model_copy(update={"sample": True})
    drawing = world.settings.model_copy(update={"decoding": decoding})
    assert needs_user(world.network.vocabulary, drawing.decoding)
    assert not needs_user(world.network.vocabulary, world.settings.decoding)
    history = [world.item_ids[4], world.item_ids[9]]
    users = [f"user-{number}" for number in range(20)]
    drawn = snapshot.answer([Query(history, 6, user) for user in users])
    alone = [snapshot.answer([Query(history, 3, user)])[0] for user in users]
    chosen = [[item["item_id"] for item in answer["items"]] for answer in drawn]
    best = [item_id for item_id, _ in world.best([4, 9])]
    assert len({tuple(items) for items in chosen}) > 10
    assert sum(items == best[:6] for items in chosen) < 10
    for items, few in zip(chosen, alone, strict=True):
        assert items == sorted(items, key=best.index)
        assert {item["item_id"] for item in few["items"]} < set(items)
    other = Snapshot(world.storage, drawing.model_copy(update={"seed": 1}), *world.manifests.values())
    assert other.answer([Query(history, 6, user) for user in users]) != drawn
    shorter = [[item["item_id"] for item in few["items"]] for few in alone]
    assert sum(few == items[:3] for items, few in zip(chosen, shorter, strict=True)) < 20


def test_a_model_with_user_tokens_needs_a_user_id_of_the_right_type() -> None:
    ids = IdTypes("int64", "int64", needs_user=True)
    good = b'{"history":[-9223372036854775808],"k":1,"user_id":5}'
    answer, decoder = ask_fake(lambda: ANSWER, content=good, ids=ids)
    assert answer.status_code == 200
    assert decoder.queries == [Query([-(2**63)], 1, 5)]
    for wrong in (b"", b',"user_id":null', b',"user_id":"5"', b',"user_id":9223372036854775808'):
        answer, _ = ask_fake(lambda: ANSWER, content=b'{"history":[],"k":1' + wrong + b"}", ids=ids)
        assert require_problem(answer, 422, "invalid_request")["field"] == "user_id"
    answer, _ = ask_fake(lambda: ANSWER, content=b'{"history":["7"],"k":1,"user_id":5}', ids=ids)
    assert require_problem(answer, 422, "invalid_request")["field"] == "history.0"


def test_an_excluded_history_is_the_reason_for_a_short_answer(world: World) -> None:
    snapshot = world.snapshot(recommendations={"exclude_history": True})
    history = [item for item in world.item_ids if world.item_ids.index(item) not in INELIGIBLE][:20]
    (answer,) = snapshot.answer([Query(history, 30, None)])
    assert len(answer["items"]) == 17
    assert not {item["item_id"] for item in answer["items"]} & set(history)
    assert answer["reason"] == "history_excluded"


def test_model_and_semantic_ids_of_other_spaces_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path, space="another space")
    with pytest.raises(ArtifactError, match="trained on ID space space"):
        serving.application(*world.artifacts)


def test_the_driver_reads_no_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read_file = Storage.read_file
    names = []

    def record(storage: Storage, manifest: Manifest, name: str) -> bytes:
        names.append(name)
        return read_file(storage, manifest, name)

    monkeypatch.setattr(Storage, "read_file", record)
    serving.application(*world.artifacts)
    assert names == ["config.json"]


def test_popularity_of_another_registry_is_refused(world: World) -> None:
    settings, storage, model, ids, sequences = world.artifacts
    other = sequences.model_copy(update={"inputs": {"semantic_ids": "0" * 64}})
    with pytest.raises(ArtifactError, match="were not built on Semantic IDs"):
        serving.application(settings, storage, model, ids, other)


def test_only_a_draw_is_made_again_for_another_seed(world: World) -> None:
    """Otherwise last night's recommendations would be published again under a new date."""
    for sample in (False, True):
        decoding = world.settings.decoding.model_copy(update={"sample": sample})
        names = [
            recommendations._scoring_fingerprint(
                Context(
                    world.settings.model_copy(update={"decoding": decoding, "seed": seed}),
                    world.storage,
                    world.manifests,
                )
            )
            for seed in (0, 1)
        ]
        assert len(set(names)) == 1 + sample
