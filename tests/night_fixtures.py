"""One local Ray and one finished night, shared by all tests that are marked `ray`."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.worlds import Night, run_night, tiny_settings, write
from tiger_ray.synthetic import world as synthetic


@pytest.fixture(scope="session")
def local_ray(s3_endpoint: str) -> Iterator[None]:
    """A Ray of two CPUs; its workers see the S3 server because the fixture comes after it."""
    import ray

    assert not ray.is_initialized(), "a test left Ray running"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class World:
    """120 items and 300 users with a planted taste, and some items and users that are not like others."""

    data: str
    catalog: pa.Table
    events: pa.Table


NEWCOMER, STRANGER, BOT, REPEATER = "one event", "unknown items only", "very many events", " ünïcode ✓"
COMPOSED, DECOMPOSED = "caf\u00e9/ &amp;", "cafe\u0301/ &amp;"
"""Two item ids that look alike and are not to be unescaped, trimmed or normalized."""


def odd_items(like: pa.Table) -> pa.Table:
    return pa.table(
        [[COMPOSED, DECOMPOSED], ["One caf\u00e9", None], [None, None], [["Books"], None], [True, True]],
        schema=like.schema,
    )


def odd_users(catalog: pa.Table) -> pa.Table:
    """One event; only events of unknown items; 200 events; 30 copies of one event."""
    items = catalog.column("item_id").to_pylist()
    rows = [(NEWCOMER, items[0], 1)]
    rows += [(STRANGER, f"gone-{n}", n) for n in range(3)]
    rows += [(BOT, items[n % 60], n) for n in range(200)]
    rows += [(REPEATER, COMPOSED, 7), (REPEATER, DECOMPOSED, 8)] + [(REPEATER, items[7], 9)] * 30
    user_id, item_id, day = zip(*rows, strict=True)
    first = int(datetime(2026, 2, 1).timestamp()) * 10**6
    return pa.table(
        [user_id, item_id, pa.array([first + n * 3600 * 10**6 for n in day]).cast(pa.timestamp("us"))],
        schema=synthetic.EVENTS_SCHEMA,
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    planted = synthetic.World.build(120, seed=5, unavailable_share=0.2)
    catalog = pa.concat_tables([planted.catalog(), odd_items(planted.catalog())])
    events = pa.concat_tables([planted.events(300, seed=5), odd_users(catalog)])
    data = str(tmp_path_factory.mktemp("world"))
    write(f"{data}/catalog", catalog[:70], catalog[70:])
    write(f"{data}/events", events[:1500], events[1500:])
    return World(data, catalog, events)


@pytest.fixture(scope="session")
def new_bucket(s3_client: Any) -> Callable[[], str]:
    """`s3://bucket/prefix` in a bucket of its own."""

    def make() -> str:
        bucket = f"bucket-{secrets.token_hex(6)}"
        s3_client.create_bucket(Bucket=bucket)
        return f"s3://{bucket}/prefix"

    return make


@pytest.fixture(scope="session")
def night(local_ray: None, world: World, new_bucket: Callable[[], str]) -> Night:
    """A whole night, published on S3; tests read it and never write beside it."""
    return run_night(tiny_settings(new_bucket(), world.data))


@pytest.fixture(scope="session")
def copy_of_night(night: Night, s3_client: Any, new_bucket: Callable[[], str]) -> Callable[[], str]:
    """Makes a root with everything the night published."""

    def copy() -> str:
        root = new_bucket()
        source, target = (uri.removeprefix("s3://").split("/")[0] for uri in (night.storage.root, root))
        for page in s3_client.get_paginator("list_objects_v2").paginate(Bucket=source):
            for item in page.get("Contents", []):
                s3_client.copy_object(
                    Bucket=target, Key=item["Key"], CopySource={"Bucket": source, "Key": item["Key"]}
                )
        return root

    return copy


@pytest.fixture
def night_root(copy_of_night: Callable[[], str]) -> str:
    """A copy of the night for a test that goes on from there."""
    return copy_of_night()


@pytest.fixture
def edited_world(world: World, tmp_path: Path) -> Callable[..., str]:
    """Writes the world with another catalog or more events, and returns its folder."""

    def make(catalog: pa.Table | None = None, more_events: pa.Table | None = None) -> str:
        data = str(tmp_path / "edited")
        whole = world.catalog if catalog is None else catalog
        write(f"{data}/catalog", whole[:70], whole[70:])
        extra = [] if more_events is None else [more_events]
        write(f"{data}/events", world.events[:1500], world.events[1500:], *extra)
        return data

    return make
