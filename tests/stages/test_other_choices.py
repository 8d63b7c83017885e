"""The same pipeline with everything else: int64 ids, vectors of one's own, RQ-VAE, two workers, no holdout."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from tests.worlds import STAGES, run_night, tiny_settings, write
from tiger_ray.artifacts import schemas
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.report import tables as report
from tiger_ray.synthetic import world as synthetic

pytestmark = pytest.mark.ray


def item_number(n: int) -> int:
    """int64 ids that no float64 holds exactly."""
    return (n + 1) * (2**53 + 1)


def user_number(n: int) -> int:
    return -(n + 1) * (2**53 + 3)


@pytest.fixture(scope="module")
def tables():
    """A world whose ids are numbers and whose times are positions; (catalog, events)."""
    planted = synthetic.World.build(60, seed=1)
    events = planted.events(120, seed=1)
    names = planted.item_ids().to_pylist()
    index = {name: n for n, name in enumerate(names)}
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 16)).astype(np.float32)
    catalog = pa.table(
        {
            "sku": pa.array([item_number(n) for n in range(60)], pa.int64()),
            "title": planted.catalog().column("title"),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 16),
        }
    )
    log = pa.table(
        {
            "member": pa.array(
                [user_number(int(u[1:])) for u in events.column("user_id").to_pylist()], pa.int64()
            ),
            "sku": pa.array(
                [item_number(index[i]) for i in events.column("item_id").to_pylist()], pa.int64()
            ),
            "place": pa.array(range(events.num_rows), pa.int64()),
            "kind": pa.array(["read"] * events.num_rows).dictionary_encode(),
        }
    )
    views = log.slice(0, 50).set_column(3, "kind", pa.array(["view"] * 50).dictionary_encode())
    views = views.set_column(0, "member", pa.array([12345] * 50, pa.int64()))
    return catalog, log, views


@pytest.fixture(scope="module")
def other_night(local_ray, tables, new_bucket, tmp_path_factory):
    catalog, log, views = tables
    data = new_bucket()
    write(f"{data}/catalog", catalog)
    write(f"{data}/events", log, views)
    settings = tiny_settings(
        str(tmp_path_factory.mktemp("root")),
        data,
        seed=3,
        catalog={
            "item_id": "sku",
            "text": ["title"],
            "category": None,
            "available": None,
            "vector": "vector",
            "num_shards": 2,
        },
        events={
            "user_id": "member",
            "item_id": "sku",
            "timestamp": "place",
            "timestamp_unit": "position",
            "event_type": "kind",
            "event_types": ["read"],
            "ties": "item_id",
        },
        embeddings={"encoder": "catalog"},
        quantizer={
            "kind": "rqvae",
            "num_epochs": 20,
            "hidden_dims": [32],
            "latent_dim": 8,
            "level_sizes": [8, 4, 8],
            "num_workers": 2,
        },
        model={"num_user_buckets": 7},
        training={"num_workers": 2, "num_steps": 20, "holdout": "none", "precision": "bf16"},
        recommendations={"form": "long", "exclude_history": True, "top_k": 5},
    )
    return run_night(settings)


def test_a_night_without_holdout_trains_on_two_workers_and_evaluates_nothing(other_night):
    assert other_night.statuses == dict.fromkeys([s for s in STAGES if s != "evaluation"], "computed")
    model = other_night["model"]
    assert model.settings["training"]["num_workers"] == 2
    assert model.metadata["holdout"] == "none"
    assert 0 < model.metadata["loss"] < math.log(3 * 8 + 256)  # better than guessing
    assert other_night["recommendations"].metadata["evaluation"] is None
    assert (
        report.metrics_table(None, model) == "no evaluation: training saw every event (training.holdout none)"
    )


def test_int64_ids_arrive_exact_to_the_last_bit(other_night, tables):
    catalog, log, _ = tables
    table = other_night.rows()
    assert table.schema == schemas.recommendations_long(pa.int64(), pa.int64())
    assert set(table.column("user_id").to_pylist()) == set(log.column("member").to_pylist())
    assert set(table.column("item_id").to_pylist()) <= set(catalog.column("sku").to_pylist())
    ids = load_semantic_ids(other_night.storage, other_night["semantic_ids"])
    assert ids.item_id.type == pa.int64()
    assert sorted(ids.item_id.to_pylist()) == sorted(catalog.column("sku").to_pylist())


def test_ranks_count_from_one_and_scores_never_rise(other_night):
    users = {}
    for row in other_night.rows().to_pylist():
        users.setdefault(row["user_id"], []).append(row)
    for rows in users.values():
        rows.sort(key=lambda row: row["rank"])
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
        assert len({row["item_id"] for row in rows}) == len(rows)


def test_no_item_of_a_history_is_recommended_if_so_wished(other_night, tables):
    _, log, _ = tables
    history = {}
    for user, item in zip(log.column("member").to_pylist(), log.column("sku").to_pylist(), strict=True):
        history.setdefault(user, set()).add(item)
    rows = other_night.rows().to_pylist()
    assert not [row for row in rows if row["item_id"] in history[row["user_id"]]]
    full = Counter(row["user_id"] for row in rows)
    short = sum(full[user] < 5 for user in history)
    published = other_night["recommendations"].metadata
    assert short == published["short_lists"]
    assert short == 0 or f"{short} with fewer than 5 items" in published["summary"]
    assert short < 10


def test_the_vectors_of_the_catalog_are_the_embeddings(other_night, tables):
    catalog, _, _ = tables
    given = dict(zip(catalog.column("sku").to_pylist(), catalog.column("vector").to_pylist(), strict=True))
    rows = other_night.rows("embeddings").to_pylist()
    assert {row["item_id"]: row["embedding"] for row in rows} == given


def test_the_examples_of_a_long_table_show_titles(other_night, tables):
    names = ("catalog", "semantic_ids", "sequences", "recommendations")
    shown = report.examples_table(other_night.storage, *(other_night[name] for name in names))
    assert shown.count("user -") == 5
    assert "not in the catalog" not in shown
