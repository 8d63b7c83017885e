"""The night after: only what changed is done again, and what people may rely on stays."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.worlds import STAGES, TUESDAY, WEDNESDAY, published_dates, run, run_night, tiny_settings
from tiger_ray.artifacts.lineage import id_space
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import ArtifactError, DataError, PublishError, QualityError
from tiger_ray.published.model import load_model
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.stages import baselines, gate, recommendations
from tiger_ray.stages import night as night_of_stages
from tiger_ray.stages.evaluation import STAGE as EVALUATION_STAGE
from tiger_ray.stages.gate import require_gate
from tiger_ray.stages.model import STAGE as MODEL_STAGE
from tiger_ray.synthetic import world as synthetic

pytestmark = pytest.mark.ray


LATER_US = 1_796_000_000_000_000
"""A moment after all events of the world."""


def codes_by_item(night):
    ids = load_semantic_ids(night.storage, night["semantic_ids"])
    return dict(zip(ids.item_id.to_pylist(), ids.codes_NI.tolist(), strict=True))


def recommended(night):
    return Counter(item for items in night.rows().column("item_ids").to_pylist() for item in items)


def encoded(night):
    return sum(entry.facts["encoded"] for entry in night["embeddings"].files)


def test_a_sold_out_and_a_removed_item_are_not_recommended_and_nothing_is_retrained(
    night, night_root, world, edited_world
):
    (sold_out, _), (removed, _) = recommended(night).most_common(2)
    ids, available = world.catalog.column("item_id"), world.catalog.column("available")
    catalog = world.catalog.set_column(
        world.catalog.schema.get_field_index("available"),
        "available",
        pc.and_(available, pc.not_equal(ids, sold_out)),
    ).filter(pc.not_equal(ids, removed))
    tuesday = run_night(tiny_settings(night_root, edited_world(catalog), TUESDAY))

    assert tuesday.statuses["quantizer"] == tuesday.statuses["model"] == "reused"
    assert encoded(tuesday) == 0
    assert tuesday["semantic_ids"].metadata["new_items"] == 0
    assert codes_by_item(tuesday) == codes_by_item(night)
    assert not {sold_out, removed} & set(recommended(tuesday))
    assert all(len(items) == 10 for items in tuesday.rows().column("item_ids").to_pylist())


def test_new_items_are_encoded_and_appended_and_move_no_old_item(night, night_root, world, edited_world):
    retitled = world.catalog.column("item_id")[3].as_py()
    title = pc.if_else(
        pc.equal(world.catalog.column("item_id"), retitled), "Another title", world.catalog.column("title")
    )
    new = pa.table(
        [
            [f"A new {n}" for n in range(7)],  # sorts before all others
            [f"New book {n}" for n in range(7)],
            ["New author"] * 7,
            [["Books", "New"]] * 7,
            [True] * 7,
        ],
        schema=world.catalog.schema,
    )
    place = world.catalog.schema.get_field_index("title")
    catalog = pa.concat_tables([new, world.catalog.set_column(place, "title", title)])
    tuesday = run_night(tiny_settings(night_root, edited_world(catalog), TUESDAY), until="semantic_ids")

    assert tuesday.statuses["quantizer"] == "reused"
    assert encoded(tuesday) == 7 + 1
    assert tuesday["semantic_ids"].metadata["new_items"] == 7
    before, after = codes_by_item(night), codes_by_item(tuesday)
    assert {item: after[item] for item in before} == before
    assert list(after)[: len(before)] == list(before)  # item_index too
    assert set(after) - set(before) == set(new.column("item_id").to_pylist())
    assert len({tuple(codes) for codes in after.values()}) == len(after)
    # Unchanged texts keep their embeddings bit for bit.
    old, now = (
        {row["item_id"]: row["embedding"] for row in one.rows("embeddings").to_pylist()}
        for one in (night, tuesday)
    )
    assert {item for item in old if old[item] != now[item]} == {retitled}

    again = run_night(tuesday.settings, until="semantic_ids")
    assert set(again.statuses.values()) == {"skipped"}


def test_new_events_redo_only_what_follows_from_events(night, night_root, world, edited_world):
    item = world.catalog.column("item_id")[9].as_py()
    more = pa.table(
        [["U000001", "somebody new"], [item, item], pa.array([LATER_US, LATER_US]).cast(pa.timestamp("us"))],
        schema=synthetic.EVENTS_SCHEMA,
    )
    tuesday = run_night(tiny_settings(night_root, edited_world(more_events=more), TUESDAY), until="sequences")
    # The catalog files were written anew, so they are read again; their content is the same.
    assert tuesday["catalog"].digest == night["catalog"].digest
    assert {
        name: tuesday.statuses[name] for name in ("embeddings", "quantizer", "semantic_ids")
    } == dict.fromkeys(("embeddings", "quantizer", "semantic_ids"), "reused")
    assert tuesday.statuses["events"] == tuesday.statuses["sequences"] == "computed"
    before, after = (
        {row["user_id"]: row["history"] for row in one.rows("sequences", "shard-").to_pylist()}
        for one in (night, tuesday)
    )
    index = list(codes_by_item(night)).index(item)
    assert after == before | {
        "U000001": [*before["U000001"], index][-30:],
        "somebody new": [index],
    }


def test_changed_data_of_a_published_date_is_refused_and_the_date_stays(
    night, night_root, world, edited_world
):
    more = world.events.slice(0, 1).set_column(0, "user_id", pa.array(["late"]))
    with pytest.raises(PublishError, match=r"events/date=.* was published from other inputs"):
        run_night(
            tiny_settings(
                night_root,
                edited_world(more_events=more),
                catalog={"uri": night.settings.catalog.uri},
            )
        )
    storage = Storage(night_root)
    for artifact in STAGES:
        assert storage.published(artifact, night.settings.date) == night[artifact]


def test_the_quality_gate_publishes_no_recommendations(night, night_root, world):
    settings = tiny_settings(night_root, world.data, TUESDAY, evaluation={"min_ratio_to_popularity": 1000.0})
    storage = Storage(night_root)
    with pytest.raises(
        QualityError,
        match=r"ndcg@10 is 0\.\d+, popularity has 0\.\d+, and evaluation\.min_ratio_to_popularity asks for",
    ):
        night_of_stages.run_night(settings, storage)
    assert ("evaluation", TUESDAY) in published_dates(storage)
    assert ("recommendations", TUESDAY) not in published_dates(storage)
    assert storage.resolve("recommendations").date == night.settings.date
    # the gate is no part of what was measured: relaxed, it lets the same evaluation pass
    evaluated = storage.published("evaluation", TUESDAY)
    relaxed = tiny_settings(night_root, world.data, TUESDAY)
    night_of_stages.run_night(relaxed, storage)
    assert storage.published("evaluation", TUESDAY) == evaluated
    assert ("recommendations", TUESDAY) in published_dates(storage)


def test_the_gate_holds_what_was_measured_whatever_k_is_set_by_now(night):
    assert set(night["evaluation"].settings["evaluation"]["ks"]) == {5, 10}
    measured = night["evaluation"].metadata
    better = measured["model"]["ndcg@10"] / measured["popularity"]["ndcg@10"]

    def asking_for(ratio):
        changed = {"ks": (5, 20), "min_ratio_to_popularity": ratio}
        evaluation = night.settings.evaluation.model_copy(update=changed)
        return night.settings.model_copy(update={"evaluation": evaluation})

    assert require_gate(asking_for(better * 0.999), night.storage, night["evaluation"]) is None
    with pytest.raises(QualityError, match=rf"ndcg@10 is {measured['model']['ndcg@10']:.4f}, popularity has"):
        require_gate(asking_for(better * 1.001), night.storage, night["evaluation"])


def test_a_night_much_worse_than_the_last_published_one_is_refused(night):
    metadata = night["evaluation"].metadata
    drop = night.settings.evaluation.max_drop

    def at(share):
        users = {"users": metadata["model"]["users"]}
        model = {name: value * share for name, value in metadata["model"].items()} | users
        return night["evaluation"].model_copy(update={"metadata": {**metadata, "model": model}})

    require_gate(night.settings, night.storage, at(1 - drop + 0.01))
    with pytest.raises(
        QualityError, match=r"21% below .* evaluation\.max_drop allows a loss of 20%; .* higher eval"
    ):
        require_gate(night.settings, night.storage, at(1 - drop - 0.01))
    # Another protocol is not comparable.
    other = at(0.1)
    other.metadata["protocol"] = {**metadata["protocol"], "beam_width": 1}
    require_gate(night.settings, night.storage, other)


def test_a_model_that_was_not_evaluated_or_not_well_is_not_recommended_by_the_job_alone(night):
    gate.require_evaluated(night.settings, night.storage, night["model"])
    evaluation = night.settings.evaluation.model_copy(update={"min_ratio_to_popularity": 1e6})
    strict = night.settings.model_copy(update={"evaluation": evaluation})
    with pytest.raises(QualityError, match=r"evaluation\.min_ratio_to_popularity"):
        gate.require_evaluated(strict, night.storage, night["model"])
    unknown = night.settings.model_copy(update={"date": WEDNESDAY})
    with pytest.raises(ArtifactError, match=r"has no evaluation, .* run `tiger-ray run evaluation` first"):
        gate.require_evaluated(unknown, night.storage, night["model"])
    refit = night["model"].model_copy(update={"metadata": {**night["model"].metadata, "holdout": "none"}})
    gate.require_evaluated(unknown, night.storage, refit)


def test_a_model_of_another_id_space_is_refused(night, night_root, world):
    settings = tiny_settings(
        night_root, world.data, WEDNESDAY, quantizer={"version": 2, "level_sizes": [12, 12, 12]}
    )
    other = run_night(settings, until="semantic_ids")
    assert other.statuses["quantizer"] == other.statuses["semantic_ids"] == "computed"
    load_model(night.storage, night["model"], night["semantic_ids"])
    with pytest.raises(ArtifactError, match=r"was trained on ID space .*train a model on these"):
        load_model(other.storage, night["model"], other["semantic_ids"])
    arguments = (settings, other.storage, night["model"], other["semantic_ids"], night["sequences"])
    with pytest.raises(ArtifactError, match="was trained on ID space"):
        run(recommendations.STAGE, *arguments)
    with pytest.raises(ArtifactError, match="was trained on ID space"):
        run(EVALUATION_STAGE, *arguments, night["catalog"])
    # an item_index of the old histories would be another item of the new registry
    histories, ids = night["sequences"], other["semantic_ids"]
    for begin in (
        lambda: run(MODEL_STAGE, settings, other.storage, histories, ids),
        lambda: run(baselines.sasrec_stage(settings.sasrec), settings, other.storage, histories, ids),
        lambda: baselines.run_baseline(
            settings,
            other.storage,
            semantic_ids=ids,
            sequences=histories,
            catalog=night["catalog"],
            embeddings=night["embeddings"],
        ),
    ):
        with pytest.raises(
            ArtifactError, match=r"were not built on Semantic IDs .*`tiger-ray run events sequences`"
        ):
            begin()
    model = night["model"].model_copy(
        update={"metadata": {**night["model"].metadata, "space": id_space(ids)}}
    )
    arguments = (settings, other.storage, model, ids, histories)
    with pytest.raises(ArtifactError, match="were not built on Semantic IDs"):
        run(recommendations.STAGE, *arguments)
    with pytest.raises(ArtifactError, match="were not built on Semantic IDs"):
        run(EVALUATION_STAGE, *arguments, night["catalog"])


def test_a_model_that_saw_every_event_cannot_be_evaluated(night):
    saw_all = night["model"].model_copy(update={"metadata": {**night["model"].metadata, "holdout": "none"}})
    with pytest.raises(DataError, match=r"trained on all events \(training\.holdout is 'none'\)"):
        run(
            EVALUATION_STAGE,
            night.settings,
            night.storage,
            saw_all,
            night["semantic_ids"],
            night["sequences"],
            night["catalog"],
        )
