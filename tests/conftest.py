"""Fixtures of every test: an S3 server on loopback, and credentials that are good for nothing else."""

import multiprocessing
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import boto3
import pytest

from tiger_ray.cluster.connect import IDLE_MS, IDLE_VARIABLE

pytest_plugins = ["tests.night_fixtures", "tests.cluster_fixtures"]

# Forked from a server that has done the slow imports, processes of torch.distributed begin at once.
multiprocessing.set_forkserver_preload(
    ["torch.distributed", "tiger_ray.training.validation", "tiger_ray.stages.quantizer"]
)
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault(IDLE_VARIABLE, str(IDLE_MS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A whole night is the setup of the first test with Ray; on a busy machine it takes minutes."""
    for item in items:
        if item.get_closest_marker("ray") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))


class S3Faults:
    """Stands before the S3 server and refuses what a test tells it to."""

    def __init__(self) -> None:
        self.answers: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        """(method, path) -> HTTP status and error code; None lets the request pass."""

    def before(self, server: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            refusal = self.answers(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            if refusal is None:
                return server(environ, start_response)
            status, code = refusal
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>so says the test</Message></Error>".encode()]

        return answer


@pytest.fixture(scope="session")
def all_s3_faults() -> S3Faults:
    return S3Faults()


@pytest.fixture
def s3_faults(all_s3_faults: S3Faults) -> Iterator[S3Faults]:
    """Refusals for the time of one test."""
    well = all_s3_faults.answers
    yield all_s3_faults
    all_s3_faults.answers = well


@pytest.fixture(scope="session")
def s3_endpoint(all_s3_faults: S3Faults) -> Iterator[str]:
    """An S3 server of this test session; child processes find it through the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = all_s3_faults.before(server._server.app)
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    variables = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test-access-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"])),
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(variable, raising=False)
        for variable, value in variables.items():
            patch.setenv(variable, value)
        yield endpoint
    server.stop()


@pytest.fixture(scope="session")
def s3_client(s3_endpoint: str) -> Any:
    """A boto3 client of that server that knows nothing of tiger_ray."""
    return boto3.session.Session().client("s3", endpoint_url=s3_endpoint)


@pytest.fixture
def s3_root(s3_client: Any) -> str:
    """`s3://bucket/prefix` in a bucket of this test alone."""
    bucket = f"bucket-{secrets.token_hex(6)}"
    s3_client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prefix"
