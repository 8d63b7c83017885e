"""A whole night on S3: what it publishes is complete, valid, and readable by anybody."""

import json
import math
from collections import Counter

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.night_fixtures import BOT, COMPOSED, DECOMPOSED, NEWCOMER, REPEATER, STRANGER
from tests.worlds import STAGES, TUESDAY, published_dates, run_night, tiny_settings
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.metadata import MODELS
from tiger_ray.core.hashing import canonical_json
from tiger_ray.data.histories import user_shards
from tiger_ray.errors import ArtifactError
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.report import tables as report
from tiger_ray.stages import recommendations, stage

pytestmark = pytest.mark.ray


K = 10


@pytest.fixture(scope="module")
def by_user(night):
    rows = night.rows().to_pylist()
    return {row["user_id"]: row for row in rows}


@pytest.fixture(scope="module")
def histories(night):
    ids = load_semantic_ids(night.storage, night["semantic_ids"]).item_id.to_pylist()
    rows = night.rows("sequences", "shard-").to_pylist()
    return {row["user_id"]: [ids[index] for index in row["history"]] for row in rows}


def test_every_stage_is_published_once_under_its_date(night):
    assert night.statuses == dict.fromkeys(STAGES, "computed")
    assert published_dates(night.storage) == {(artifact, night.settings.date) for artifact in STAGES}


def test_every_user_of_the_events_has_exactly_one_row(night, world):
    assert Counter(night.rows().column("user_id").to_pylist()) == dict.fromkeys(
        set(world.events.column("user_id").to_pylist()), 1
    )


def test_rows_follow_the_published_schema(night):
    table = night.rows()
    assert table.schema == schemas.recommendations(pa.string(), pa.string())
    assert set(table.column("date").to_pylist()) == {night.settings.date}
    assert set(table.column("model_version").to_pylist()) == {night["model"].run_id}
    assert set(table.column("semantic_ids_version").to_pylist()) == {night["semantic_ids"].run_id}


def test_item_ids_keep_their_bytes_from_the_catalog_to_the_registry(night, world, histories):
    given = world.catalog.column("item_id").to_pylist()
    ids = load_semantic_ids(night.storage, night["semantic_ids"])
    assert sorted(ids.item_id.to_pylist()) == sorted(given)
    assert sorted(night.rows("catalog").column("item_id").to_pylist()) == sorted(given)
    assert histories[REPEATER][:2] == [COMPOSED, DECOMPOSED]


def test_lists_are_full_without_repeats_and_best_first(by_user):
    for row in by_user.values():
        assert len(row["item_ids"]) == len(set(row["item_ids"])) == K
        assert len(row["scores"]) == len(row["semantic_ids"]) == len(row["sources"]) == K
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert all(math.isfinite(score) and score < 0 for score in row["scores"])
        assert len(set(row["sources"])) == 1


def test_all_items_are_available_and_carry_their_own_semantic_id(night, by_user, world):
    available = {row["item_id"] for row in world.catalog.to_pylist() if row["available"]}
    assert len(available) < world.catalog.num_rows
    ids = load_semantic_ids(night.storage, night["semantic_ids"])
    code_of = dict(zip(ids.item_id.to_pylist(), ids.codes_NI.tolist(), strict=True))
    for row in by_user.values():
        assert set(row["item_ids"]) <= available
        assert row["semantic_ids"] == [code_of[item] for item in row["item_ids"]]


def test_histories_are_those_of_the_event_log(world, histories):
    events = world.events.to_pandas()
    known = events[events.item_id.isin(set(world.catalog.column("item_id").to_pylist()))]
    expected = {
        user: group.drop_duplicates(["item_id", "timestamp"])
        .sort_values(["timestamp", "item_id"])
        .item_id.tolist()
        for user, group in known.groupby("user_id")
    }
    assert histories == {user: expected.get(user, [])[-30:] for user in set(events.user_id)}
    assert (len(histories[BOT]), len(histories[NEWCOMER]), histories[STRANGER]) == (30, 1, [])
    assert len(histories[REPEATER]) == 3


def test_a_user_nobody_knows_anything_of_gets_the_most_popular_items(night, by_user, world, histories):
    row = by_user[STRANGER]
    assert set(row["sources"]) == {"fallback"}
    assert {user for user, other in by_user.items() if other["sources"][0] == "fallback"} == {STRANGER}
    available = {item["item_id"] for item in world.catalog.to_pylist() if item["available"]}
    counts = Counter(item for history in histories.values() for item in history if item in available)
    top = sorted(counts.values(), reverse=True)[:K]
    assert [counts[item] for item in row["item_ids"]] == top
    events = sum(map(len, histories.values()))
    assert np.allclose(row["scores"], np.log(np.array(top) / events), atol=1e-5)
    assert night["recommendations"].metadata["fallback_users"] == 1


def test_users_with_one_event_and_with_very_many_get_generated_items(by_user):
    for user in (NEWCOMER, BOT, REPEATER):
        assert set(by_user[user]["sources"]) == {"generated"}


def test_pandas_duckdb_and_pyarrow_read_the_same_rows_from_the_store(night, s3_client, tmp_path):
    """The files are fetched by a client that knows nothing of tiger_ray, by the address in the manifest."""
    bucket, prefix = night.storage.root.removeprefix("s3://").split("/", 1)
    key = f"{prefix}/recommendations/date={night.settings.date}/_manifest.json"
    manifest = json.loads(s3_client.get_object(Bucket=bucket, Key=key)["Body"].read())
    for entry in manifest["files"]:
        name = entry["path"].rsplit("/", 1)[-1]
        s3_client.download_file(bucket, f"{prefix}/recommendations/{entry['path']}", str(tmp_path / name))
    read = {
        "pyarrow": pq.read_table(tmp_path).to_pylist(),
        "pandas": pd.read_parquet(tmp_path).to_dict("records"),
        "duckdb": duckdb.sql(f"select * from '{tmp_path}/*.parquet'").to_arrow_table().to_pylist(),
    }

    def plain(rows):
        return sorted(
            (
                row["user_id"],
                list(row["item_ids"]),
                [float(score) for score in row["scores"]],
                [list(map(int, codes)) for codes in row["semantic_ids"]],
                list(row["sources"]),
                row["date"],
            )
            for row in rows
        )

    assert plain(read["pandas"]) == plain(read["pyarrow"])
    assert plain(read["duckdb"]) == plain(read["pyarrow"])
    assert len(read["pyarrow"]) == len(night.rows())


def test_the_metadata_of_every_stage_is_that_of_its_artifact(night):
    """Known to the last field, so that the page of the artifacts says all."""
    assert list(night.results) == list(MODELS)
    for artifact, model in MODELS.items():
        held = night[artifact].metadata
        unknown = {name for name in held if name not in model.model_fields and "@" not in name}
        assert not unknown
        # as JSON, byte by byte
        found = model.of(night[artifact]).model_dump(mode="json", exclude_unset=True)
        assert canonical_json(found) == canonical_json({name: held[name] for name in found})


def test_evaluation_covers_every_user_with_three_events_and_says_how(night, histories):
    metadata = night["evaluation"].metadata
    assert metadata["model"]["users"] == sum(len(history) >= 3 for history in histories.values())
    for who in ("model", "popularity"):
        assert 0 <= metadata[who]["ndcg@10"] <= metadata[who]["recall@10"] <= 1
        assert metadata[who]["recall@5"] <= metadata[who]["recall@10"]
    assert metadata["protocol"]["split"] == "leave-one-out, test"
    # Popularity again, by hand: the most popular items by the events that training saw.
    seen = Counter(i for h in histories.values() for i in (h[:-2] if len(h) > 2 else h))
    ids = load_semantic_ids(night.storage, night["semantic_ids"])
    eligible = dict(zip(ids.item_id.to_pylist(), ids.eligible_N.tolist(), strict=True))
    index = {item: n for n, item in enumerate(ids.item_id.to_pylist())}
    top = sorted((i for i in seen if eligible[i]), key=lambda i: (-seen[i], index[i]))[:10]
    targets = [history[-1] for history in histories.values() if len(history) >= 3]
    hits = sum(target in top for target in targets)
    assert metadata["popularity"]["recall@10"] == pytest.approx(hits / len(targets), abs=1e-9)


def test_the_report_shows_titles_and_metrics(night, world):
    names = ("catalog", "semantic_ids", "sequences", "recommendations")
    shown = report.examples_table(night.storage, *(night[name] for name in names))
    titles = [title[:40] for title in world.catalog.column("title").to_pylist() if title]
    assert sum(title in shown for title in titles) >= 5
    metrics = report.metrics_table(night["evaluation"], night["model"])
    assert f"{night['evaluation'].metadata['model']['ndcg@10']:.4f}" in metrics
    assert "not masked" in metrics


def test_running_again_skips_every_stage_and_starts_nothing(night, monkeypatch):
    def connect(settings):
        raise AssertionError("a skipped stage needs no cluster")

    monkeypatch.setattr(stage, "connect", connect)
    again = run_night(night.settings)
    assert again.statuses == dict.fromkeys(STAGES, "skipped")
    assert {name: again[name] for name in STAGES} == {name: night[name] for name in STAGES}


def test_a_new_date_reuses_everything_and_rewrites_only_the_date_column(
    night, night_root, world, monkeypatch
):
    monkeypatch.setattr(recommendations, "_ScoreShard", None)  # nobody may be scored again
    tuesday = run_night(tiny_settings(night_root, world.data, TUESDAY))
    assert tuesday.statuses == {**dict.fromkeys(STAGES, "reused"), "recommendations": "computed"}
    before, after = night.rows(), tuesday.rows()
    assert set(after.column("date").to_pylist()) == {TUESDAY}
    assert after.drop_columns(["date"]).equals(before.drop_columns(["date"]))
    assert after.schema == before.schema
    assert tuesday["recommendations"].metadata["fallback_users"] == 1


def test_the_long_form_holds_the_rows_of_the_wide_form(night, night_root, world):
    settings = tiny_settings(night_root, world.data, TUESDAY, recommendations={"form": "long"})
    long = run_night(settings)
    assert long.statuses["model"] == "reused"
    table = long.rows()
    assert table.schema == schemas.recommendations_long(pa.string(), pa.string())
    unrolled = [
        (row["user_id"], rank, item, score, codes, source)
        for row in night.rows().to_pylist()
        for rank, (item, score, codes, source) in enumerate(
            zip(row["item_ids"], row["scores"], row["semantic_ids"], row["sources"], strict=True), start=1
        )
    ]
    columns = ("user_id", "rank", "item_id", "score", "semantic_id", "source")
    assert sorted(zip(*(table.column(name).to_pylist() for name in columns), strict=True)) == sorted(unrolled)
    names = ("catalog", "semantic_ids", "sequences", "recommendations")
    assert report.examples_table(long.storage, *(long[name] for name in names)) == report.examples_table(
        night.storage, *(night[name] for name in names)
    )


@pytest.mark.parametrize("form", ["wide", "long"])
def test_a_shard_written_some_users_at_a_time_holds_the_same_rows(night, form, monkeypatch):
    settings = night.settings.model_copy(
        update={"recommendations": night.settings.recommendations.model_copy(update={"form": form})}
    )
    inputs = {name: night[name] for name in ("model", "semantic_ids", "sequences")}
    entry = user_shards(night["sequences"])[0]
    num_users, top_k = entry.rows, settings.recommendations.top_k
    tables, groups = [], []
    for slots in (recommendations.SLOTS, top_k * (num_users // 3)):
        monkeypatch.setattr(recommendations, "SLOTS", slots)
        run = night.storage.begin("recommendations", f"{slots:064x}")
        written = recommendations._ScoreShard(run, night.storage, settings, inputs)(entry)
        tables.append(run.read_table(written))
        groups.append(pq.ParquetFile(pa.BufferReader(run.read_file(written))).num_row_groups)
    assert tables[0].equals(tables[1])
    assert groups[0] == 1
    assert groups[1] in (3, 4)


def test_a_published_file_that_was_changed_is_noticed(night, night_root, s3_client):
    entry = night["recommendations"].files[0]
    bucket, prefix = night_root.removeprefix("s3://").split("/", 1)
    key = f"{prefix}/recommendations/{entry.path}"
    data = s3_client.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3_client.put_object(Bucket=bucket, Key=key, Body=data[:-1] + bytes([data[-1] ^ 1]))
    storage = type(night.storage)(night_root)
    with pytest.raises(ArtifactError, match=r"has SHA-256 .*its manifest says"):
        storage.read_table(storage.resolve("recommendations"), entry.name)
    assert pc.count(night.rows().column("user_id")).as_py() > 0
