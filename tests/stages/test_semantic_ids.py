"""Semantic IDs assigned by many workers are those of one process, and two nights never share one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.worlds import MONDAY, TUESDAY, WEDNESDAY, publish, published_dates, run, tiny_settings
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.schemas import matrix_of
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import shard_of, stable_hash
from tiger_ray.errors import ArtifactError, CollisionError, DataError, QualityError
from tiger_ray.ids import quantizers, semantic_ids
from tiger_ray.published import quantizer as published_quantizer
from tiger_ray.published import semantic_ids as published_ids
from tiger_ray.settings.settings import Settings
from tiger_ray.stages import semantic_ids as semantic_ids_stage
from tiger_ray.stages.stage import StageResult

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

NUM_ITEMS = 400
GROUPS = 90
"""Items of one group have equal vectors, and so equal codewords."""


def items(numbers: range, seed: int = 0) -> pa.Table:
    """Items whose vectors repeat: about 4 or 5 of each."""
    rng = np.random.default_rng(seed)
    group_vector = rng.normal(size=(GROUPS, 6)).astype(np.float32)
    group = np.random.default_rng(1).integers(0, GROUPS, 10_000)[numbers.start : numbers.stop]
    return pa.table(
        {
            "item_id": [f"item-{n:04d}" for n in numbers],
            "category": [f"kind {g % 7}" for g in group],
            "available": [n % 10 != 0 for n in numbers],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(group_vector[group].ravel()), 6),
        }
    )


class Registry:
    """The stage under test, over inputs of this test's own."""

    def __init__(self, folder: Path) -> None:
        self.storage = Storage(str(folder / "root"))

    def settings(self, date: str, **changed: Any) -> Settings:
        chosen: dict[str, Any] = {
            "quantizer": {"level_sizes": [8, 4], "validation_share": 0.0},
            "semantic_ids": {"max_disambiguated_share": 1.0},
        }
        for section, values in changed.items():
            chosen[section] = {**chosen.get(section, {}), **values}
        return tiny_settings(self.storage.root, "/nowhere", date, **chosen)

    def inputs(
        self, numbers: range, settings: Settings, num_shards: int = 3, seed: int = 0
    ) -> tuple[Manifest, ...]:
        """Catalog, embeddings and quantizer of a night with these items."""
        table, date = items(numbers, seed), settings.date
        shard = shard_of(stable_hash(table.column("item_id")), num_shards)
        parts = {
            f"shard-{n:05d}.parquet": table.filter(pa.array(shard == n))
            for n in range(num_shards)
            if n in shard
        }
        rows = {name: part.drop_columns(["embedding"]) for name, part in parts.items()}
        vectors = {name: part.select(["item_id", "embedding"]) for name, part in parts.items()}
        id_type = {"id_type": str(table.schema.field("item_id").type)}
        chosen = {"catalog": {"num_shards": num_shards}}
        try:  # fitted on the first night, and kept
            quantizer = self.storage.resolve("quantizer")
        except ArtifactError:
            all_vectors = np.array(matrix_of(table.column("embedding")))
            fitted = quantizers.fit(settings.quantizer, [all_vectors], seed=0)
            files, facts = fitted.to_files(), {"level_sizes": list(fitted.level_sizes)}
            quantizer = publish(self.storage, "quantizer", files, facts, date=date)
        return (
            publish(self.storage, "catalog", rows, id_type, date=date, settings=chosen),
            publish(self.storage, "embeddings", vectors, {}, date=date, settings=chosen),
            quantizer,
        )

    def night(self, numbers: range, date: str = MONDAY, num_shards: int = 3, **changed: Any) -> StageResult:
        settings = self.settings(date, **changed)
        inputs = self.inputs(numbers, settings, num_shards)
        return run(semantic_ids_stage.STAGE, settings, self.storage, *inputs)

    def read(self, result: StageResult) -> semantic_ids.SemanticIds:
        return published_ids.load_semantic_ids(self.storage, result.manifest)


def by_item(ids: semantic_ids.SemanticIds) -> dict[str, tuple[int, ...]]:
    return dict(zip(ids.item_id.to_pylist(), map(tuple, ids.codes_NI.tolist()), strict=True))


def in_one_process(nights: list[range], quantizer: Any, level_sizes: tuple[int, ...]) -> Any:
    """The oracle: the same nights through `semantic_ids.assign`."""
    segments: list[pa.Table] = []
    ids = None
    for numbers in nights:
        table = items(numbers)
        codewords = quantizer.encode(matrix_of(table.column("embedding")), table.column("item_id"))
        segments.append(semantic_ids.assign(ids, table.column("item_id"), codewords, level_sizes))
        ids = semantic_ids.SemanticIds.from_segments(segments, level_sizes)
    return ids


@pytest.fixture
def at(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


@pytest.fixture(scope="module")
def two_nights(
    local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Registry, list[StageResult]]:
    """A first night, and one with new items, some gone, other shards, and several partitions."""
    at = Registry(tmp_path_factory.mktemp("registry"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic_ids_stage, "ROWS_PER_PARTITION", 60)
        first = at.night(range(0, 300), num_shards=5)
        second = at.night(range(40, NUM_ITEMS), TUESDAY, num_shards=3)
    return at, [first, second]


def test_many_workers_assign_what_one_process_does(two_nights: Any) -> None:
    at, (first, second) = two_nights
    quantizer = published_quantizer.load_quantizer(at.storage, at.storage.resolve("quantizer"))
    expected = in_one_process([range(0, 300), range(40, NUM_ITEMS)], quantizer, (8, 4, 256))
    ids = at.read(second)
    assert ids.item_id.to_pylist() == expected.item_id.to_pylist()
    assert (ids.codes_NI == expected.codes_NI).all()
    assert (at.read(first).codes_NI == expected.codes_NI[:300]).all()
    assert expected.codes_NI[:, -1].max() > 5, "the test wants groups"


def test_shards_and_partitions_change_no_id(two_nights: Any, at: Registry) -> None:
    _, (first, _) = two_nights
    other = at.read(at.night(range(0, 300), num_shards=1))
    ids = two_nights[0].read(first)
    assert ids.item_id.to_pylist() == other.item_id.to_pylist()
    assert (ids.codes_NI == other.codes_NI).all()


def test_an_append_writes_only_what_is_new(two_nights: Any) -> None:
    at, (first, second) = two_nights
    kept = {entry.name: entry for entry in second.manifest.files if entry.name.startswith("segment-00000-")}
    assert kept == {e.name: e for e in first.manifest.files if e.name.startswith("segment-")}
    added = [entry for entry in second.manifest.files if entry.name.startswith("segment-00001-")]
    assert sum(entry.rows for entry in added) == second.manifest.metadata["new_items"] == 100
    assert at.storage.head("semantic_ids", second.manifest.metadata["space"]) is not None


def test_items_that_are_gone_keep_their_id_and_leave_the_trie(two_nights: Any) -> None:
    at, (_, second) = two_nights
    ids = at.read(second)
    eligible = dict(zip(ids.item_id.to_pylist(), ids.eligible_N.tolist(), strict=True))
    assert eligible == {f"item-{n:04d}": n >= 40 and n % 10 != 0 for n in range(NUM_ITEMS)}
    assert second.manifest.metadata["eligible"] == sum(eligible.values())


def test_an_item_whose_text_changed_keeps_its_id(at: Registry) -> None:
    monday = at.read(at.night(range(0, 50)))
    settings = at.settings(TUESDAY)
    changed = run(semantic_ids_stage.STAGE, settings, at.storage, *at.inputs(range(0, 60), settings, seed=9))
    assert changed.manifest.metadata["new_items"] == 10
    assert by_item(monday).items() <= by_item(at.read(changed)).items()


def test_the_report_counts_the_whole_registry(two_nights: Any) -> None:
    at, (_, second) = two_nights
    report = published_ids.load_report(at.storage, second.manifest)
    codes_NI = at.read(second).codes_NI
    groups = np.unique(codes_NI[:, :-1], axis=0, return_counts=True)[1]
    assert report["items"] == NUM_ITEMS
    assert report["prefixes"] == len(groups)
    assert report["largest_group"] == groups.max()
    assert [level["used"] for level in report["levels"]] == [len(np.unique(codes_NI[:, n])) for n in (0, 1)]
    # Equal vectors have equal codewords, so an unseen item of a known group is covered at every level.
    assert report["sample"]["items"] == 360
    assert report["sample"]["unseen"] == 100
    assert min(report["sample"]["coverage"]) > 0.9
    assert report["sample"]["purity"][1] > report["sample"]["purity_by_chance"][1] + 0.1


def test_a_night_that_loses_the_race_appends_behind_the_winner(
    at: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuesday and Wednesday start from Monday's registry; Wednesday's append lands first."""
    at.night(range(0, 100))
    rivals = list[StageResult]()
    move_head = Storage.move_head

    def race(storage: Storage, *link: Any) -> bool:
        if not rivals:
            rivals.append(None)  # type: ignore[arg-type]
            rivals[0] = at.night(range(0, 160), WEDNESDAY)
        return move_head(storage, *link)

    settings = at.settings(TUESDAY)
    inputs = at.inputs(range(130, 200), settings)
    monkeypatch.setattr(Storage, "move_head", race)
    loser = run(semantic_ids_stage.STAGE, settings, at.storage, *inputs)
    winner, both = at.read(rivals[0]), at.read(loser)

    assert (len(winner), len(both)) == (160, 200)
    assert by_item(winner).items() <= by_item(both).items()
    assert len(set(by_item(both).values())) == 200
    assert loser.manifest.metadata["new_items"] == 40
    report = published_ids.load_report(at.storage, loser.manifest)
    assert report["items"] == 200
    assert report["prefixes"] == len(np.unique(both.codes_NI[:, :-1], axis=0))
    again = run(semantic_ids_stage.STAGE, settings, at.storage, *inputs)
    assert again.status == "skipped"


def test_the_order_of_nights_can_be_repeated_in_any_order(at: Registry) -> None:
    results = [at.night(range(0, n), date) for n, date in ((60, MONDAY), (90, TUESDAY), (90, WEDNESDAY))]
    assert [result.status for result in results] == ["computed", "computed", "reused"]
    for n, date in ((60, MONDAY), (90, WEDNESDAY), (90, TUESDAY), (60, MONDAY)):
        assert at.night(range(0, n), date).status == "skipped"


def test_a_collapsed_codebook_stops_the_night_and_appends_nothing(at: Registry) -> None:
    strict = {"semantic_ids": {"max_disambiguated_share": 0.1}}
    with pytest.raises(
        QualityError, match=r"of 200 items share all codewords .*max_disambiguated_share 0\.1"
    ):
        at.night(range(0, 200), **strict)
    assert ("semantic_ids", MONDAY) not in published_dates(at.storage)
    result = at.night(range(0, 200))  # the threshold is raised: the same run goes on
    assert result.status == "computed"
    assert len(at.read(result)) == 200


def test_a_group_too_large_for_the_disambiguator_is_refused_by_name(at: Registry) -> None:
    with pytest.raises(CollisionError, match=r"items share the codewords \[\d+, \d+\], but .* can count 3"):
        at.night(range(0, 200), semantic_ids={"disambiguator_size": 3})
    assert ("semantic_ids", MONDAY) not in published_dates(at.storage)


def test_the_type_of_item_ids_may_not_change(at: Registry) -> None:
    at.night(range(0, 50))
    settings = at.settings(TUESDAY)
    rows, *others = at.inputs(range(0, 50), settings)
    rows = rows.model_copy(update={"metadata": {**rows.metadata, "id_type": "int64"}})
    with pytest.raises(
        DataError, match=r"item_id is int64 in catalog of .*, but the registry .* started with string"
    ):
        run(semantic_ids_stage.STAGE, settings, at.storage, rows, *others)


def test_embeddings_of_another_width_than_the_quantizers_are_refused(at: Registry) -> None:
    at.night(range(0, 50))
    settings = at.settings(TUESDAY)
    rows, vectors, quantizer = at.inputs(range(0, 60), settings)
    wide = {
        entry.name: pa.table(
            {
                "item_id": at.storage.read_table(vectors, entry, columns=["item_id"]).column("item_id"),
                "embedding": pa.array([[1.0] * 9] * entry.rows, pa.list_(pa.float32(), 9)),
            }
        )
        for entry in vectors.files
    }
    wider = publish(at.storage, "embeddings", wide, {}, date=WEDNESDAY)
    with pytest.raises(
        ArtifactError, match=r"fitted on embeddings of width 6, but these have shape \(\d+, 9\)"
    ):
        run(semantic_ids_stage.STAGE, settings, at.storage, rows, wider, quantizer)
    assert ("semantic_ids", TUESDAY) not in published_dates(at.storage)


@pytest.mark.parametrize(("kind", "id_length"), [("lsh", 3), ("random", 3), ("flat", 1)])
def test_every_control_gives_unique_ids(at: Registry, kind: str, id_length: int) -> None:
    chosen: dict[str, Any] = {"quantizer": {"kind": kind}, "semantic_ids": {"disambiguator_size": 500}}
    chosen["semantic_ids"]["max_disambiguated_share"] = 1.0
    ids = at.read(at.night(range(0, 200), **chosen))
    assert ids.codes_NI.shape == (200, id_length)
    assert len(np.unique(ids.codes_NI, axis=0)) == 200
    if kind == "flat":
        more = at.read(at.night(range(0, 230), TUESDAY, **chosen))
        assert sorted(more.codes_NI[:, 0].tolist()) == list(range(230))
        assert (more.codes_NI[:200] == ids.codes_NI).all()
