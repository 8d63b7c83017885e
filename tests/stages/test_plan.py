"""A plan says what a night would do and why, and the night then does so."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.worlds import MONDAY, TUESDAY, Night, run_night, tiny_settings
from tiger_ray.artifacts.record import read_record
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import PublishError
from tiger_ray.stages import stage
from tiger_ray.stages.night import STAGE_NAMES
from tiger_ray.stages.plan import PlannedStage, plan_night

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def plan(
    night: Night, night_root: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, PlannedStage]]:
    """Plans a night on a copy of the finished one, where neither Ray nor a write may be asked for."""
    data = night.settings.catalog.uri.removesuffix("/catalog")

    def make(date: str = MONDAY, data: str = data, **changed: Any) -> dict[str, PlannedStage]:
        storage = Storage(night_root)
        before = {file.path: file.version for file in storage.store.find("")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "connect", lambda *_: pytest.fail("a plan needs no Ray"))
            planned = plan_night(tiny_settings(night_root, data, date, **changed), storage)
        assert {file.path: file.version for file in storage.store.find("")} == before, (
            "a plan wrote something"
        )
        assert [one.stage.name for one in planned] == list(STAGE_NAMES)
        return {one.stage.name: one for one in planned}

    return make


def verdicts(planned: dict[str, PlannedStage]) -> dict[str, str]:
    return {name: one.verdict for name, one in planned.items()}


def test_a_finished_night_would_be_skipped(plan: Any) -> None:
    planned = plan()
    assert set(verdicts(planned).values()) == {"skips"}
    assert planned["catalog"].why == (f"published for {MONDAY}",)


def test_the_next_night_on_the_same_data_reuses_all_but_the_recommendations(plan: Any) -> None:
    planned = plan(TUESDAY)
    assert verdicts(planned) == dict.fromkeys(STAGE_NAMES, "reuses") | {"recommendations": "computes"}
    assert planned["recommendations"].why == (f"date '{MONDAY}' -> '{TUESDAY}'",)
    assert planned["model"].why == (f"same as {MONDAY}",)


def test_a_changed_setting_is_named_and_everything_after_it_is_computed(plan: Any) -> None:
    planned = plan(TUESDAY, training={"num_steps": 70, "checkpoint_every_steps": 35})
    assert verdicts(planned) == dict.fromkeys(STAGE_NAMES[:6], "reuses") | dict.fromkeys(
        STAGE_NAMES[6:], "computes"
    )
    assert set(planned["model"].why) == {
        "training.num_steps 60 -> 70",
        "training.checkpoint_every_steps 30 -> 35",
    }
    assert planned["evaluation"].why == ("model is computed first",)
    assert planned["recommendations"].why == ("model is computed first",)


def test_new_input_files_are_counted(plan: Any, edited_world: Any, world: Any) -> None:
    folder = edited_world(more_events=world.events[:10])
    planned = plan(TUESDAY, events={"uri": f"{folder}/events"})
    assert planned["catalog"].verdict == "reuses"
    assert planned["events"].verdict == "computes"
    assert planned["events"].why[-1] == "files changed (2 -> 3)"
    assert planned["sequences"].why == ("events is computed first",)


def test_a_date_that_is_taken_by_other_settings_is_refused_as_the_night_would(
    plan: Any, night: Night
) -> None:
    planned = plan(sequences={"max_events": 12})
    assert verdicts(planned) == dict.fromkeys(STAGE_NAMES[:5], "skips") | dict.fromkeys(
        STAGE_NAMES[5:], "refuses"
    )
    error = planned["sequences"].error
    assert isinstance(error, PublishError)
    assert "sequences.max_events 30 -> 12" in str(error)
    assert planned["model"].why == ("sequences is refused",)


def test_a_plan_knows_rows_and_bytes_of_the_inputs_and_the_cost_of_the_last_run(
    plan: Any, night: Night
) -> None:
    planned = plan()
    events, sequences = planned["events"], night["sequences"]
    assert planned["catalog"].bytes_in > 0
    assert events.rows_in == night["catalog"].rows
    assert (
        planned["recommendations"].rows_in
        == night["model"].rows + night["semantic_ids"].rows + sequences.rows
    )
    for one in planned.values():
        assert one.last is not None
        assert one.last.date == MONDAY
        assert one.last.seconds > 0
    assert planned["model"].last.workers == 1
    assert 10**8 < planned["model"].last.peak_memory_bytes < 10**10, "torch alone takes a hundred megabytes"
    assert planned["recommendations"].last.workers >= 1


def test_the_record_of_a_reused_artifact_keeps_the_cost_of_the_computation(
    night: Night, night_root: str
) -> None:
    data = night.settings.catalog.uri.removesuffix("/catalog")
    tuesday = run_night(tiny_settings(night_root, data, TUESDAY), until="catalog")
    assert tuesday.statuses == {"catalog": "reused"}
    first, second = (read_record(tuesday.storage, "catalog", date) for date in (MONDAY, TUESDAY))
    assert first is not None
    assert second is not None
    assert (first.status, second.status) == ("computed", "reused")
    assert first.why == ("no earlier night",)
    assert second.why == (f"same as {MONDAY}",)
    assert second.cost == first.cost
    assert second.cost["workers"] >= 1
