"""A stage computes only what no complete run has, and never replaces what is published unless told to."""

import json
import logging
import re
from dataclasses import dataclass, field

import pyarrow as pa
import pytest

from tests.manifests import metadata_of
from tiger_ray.artifacts.metadata import SequencesMetadata
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import ArtifactError, PublishError, TigerError
from tiger_ray.settings.settings import Settings
from tiger_ray.stages import stage
from tiger_ray.stages.stage import Stage, run_stage

MONDAY, TUESDAY = "2026-11-23", "2026-11-24"


@dataclass
class Night:
    """One artifact, `sequences`, computed from nothing by a function that counts its calls."""

    storage: Storage
    computed: list[str] = field(default_factory=list)
    connected: int = 0
    format_version: int = 3

    def run(
        self,
        date=MONDAY,
        value=1,
        *,
        source=None,
        seed=0,
        draws=True,
        inputs=None,
        fail=False,
        metadata=None,
        **changed,
    ):
        settings = Settings(
            date=date,
            seed=seed,
            storage={"root": self.storage.root, "replace": changed.pop("replace", False)},
            catalog={"uri": "/c"},
            events={"uri": "/e"},
            sequences=changed,
        )

        def compute(run):
            self.computed.append(run.run_id)
            entry = run.write_table("shard-00000.parquet", pa.table({"value": [value]}))
            if fail:
                raise TigerError("the worker died")
            return [entry], metadata_of("sequences", summary=f"value {value}", users=value) | (metadata or {})

        tested = Stage(
            name="sequences",
            does="counts its calls",
            inputs=(),
            sections=("sequences",),
            compute=lambda run, context: compute(run),
            source=lambda context: source or {},
            draws=lambda settings: draws,
            format_version=self.format_version,
        )
        return run_stage(tested, settings, self.storage, **(inputs or {}))


@pytest.fixture
def night(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    night = Night(Storage(str(tmp_path / "root")))

    def connect(settings):
        night.connected += 1

    monkeypatch.setattr(stage, "connect", connect)
    monkeypatch.setattr(stage, "require_room", lambda *_: None)
    return night


def test_the_first_run_computes_publishes_and_says_so(night, caplog):
    result = night.run(max_events=5)
    assert result.status == "computed"
    assert night.storage.published("sequences", MONDAY) == result.manifest
    assert night.storage.resolve("sequences") == result.manifest
    assert result.manifest.settings["sequences"]["max_events"] == 5
    assert result.manifest.metadata["users"] == 1
    line = caplog.messages[-1]
    assert line.startswith("sequences ")
    assert line.rstrip().endswith(f"value 1  {night.storage.root}/sequences/date={MONDAY}")


def test_the_same_night_again_is_skipped_and_needs_no_cluster(night, caplog):
    first = night.run()
    again = night.run()
    assert again.status == "skipped"
    assert again.manifest == first.manifest
    assert len(night.computed) == night.connected == 1
    assert "(skipped: already published)" in caplog.text


def test_another_night_with_the_same_inputs_reuses_the_files(night):
    monday = night.run(MONDAY)
    tuesday = night.run(TUESDAY)
    assert tuesday.status == "reused"
    assert tuesday.manifest.files == monday.manifest.files
    assert (tuesday.manifest.date, night.storage.resolve("sequences").date) == (TUESDAY, TUESDAY)
    assert len(night.computed) == night.connected == 1


def test_another_seed_is_another_night_only_where_something_is_drawn(night):
    night.run(MONDAY, draws=False)
    assert night.run(MONDAY, draws=False, seed=1).status == "skipped"
    assert night.run(TUESDAY, draws=False, seed=1).status == "reused"
    assert night.run(TUESDAY, draws=True, seed=1, replace=True).status == "computed"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"max_events": 7}, r"sequences\.max_events 1000 -> 7"),
        ({"seed": 3}, r"seed 0 -> 3"),
        ({"source": {"files": ["b"]}}, r"other input files or format version"),
    ],
    ids=["setting", "seed", "input files"],
)
def test_a_published_night_is_not_replaced_by_another_and_the_refusal_names_the_difference(
    night, changed, reason
):
    first = night.run(source=changed.get("source") and {"files": ["a"]})
    with pytest.raises(
        PublishError, match=rf"published from other inputs or settings \({reason}\).*--storage\.replace true"
    ):
        night.run(**changed)
    assert night.storage.published("sequences", MONDAY) == first.manifest
    assert len(night.computed) == 1


def test_replace_puts_the_new_result_in_place_of_the_old(night):
    night.run(value=1)
    replaced = night.run(value=2, max_events=7, replace=True)
    assert replaced.status == "computed"
    assert night.storage.published("sequences", MONDAY).metadata["users"] == 2
    # and back again, from the run that is still there
    back = night.run(value=1, replace=True)
    assert (back.status, back.manifest.metadata["users"]) == ("reused", 1)
    assert len(night.computed) == 2


def test_an_input_with_another_digest_is_another_fingerprint(night):
    one, other = night.run(MONDAY, value=1), night.run(TUESDAY, value=2, max_events=9)
    first = night.run("2026-12-01", inputs={"events": one.manifest})
    second = night.run("2026-12-02", inputs={"events": other.manifest})
    assert first.manifest.fingerprint != second.manifest.fingerprint
    assert second.manifest.inputs == {"events": other.manifest.digest}
    with pytest.raises(PublishError, match="other events"):
        night.run("2026-12-01", inputs={"events": other.manifest})


def test_an_input_of_another_date_with_equal_content_is_the_same_input(night):
    monday, tuesday = night.run(MONDAY), night.run(TUESDAY)
    first = night.run("2026-12-01", inputs={"events": monday.manifest})
    second = night.run("2026-12-02", inputs={"events": tuesday.manifest})
    assert second.status == "reused"
    assert first.manifest.fingerprint == second.manifest.fingerprint


def test_a_stage_that_fails_publishes_nothing_and_goes_on_in_the_same_run(night):
    with pytest.raises(TigerError, match="the worker died"):
        night.run(fail=True)
    assert night.storage.published("sequences", MONDAY) is None
    done = night.run()
    assert done.status == "computed"
    assert night.computed == [done.manifest.run_id] * 2


def test_a_newer_format_is_computed_again(night):
    first = night.run(MONDAY)
    night.format_version = 99
    second = night.run(TUESDAY)
    assert second.status == "computed"
    assert second.manifest.fingerprint != first.manifest.fingerprint


def test_a_complete_run_whose_file_is_gone_is_computed_again(night, tmp_path):
    first = night.run(MONDAY)
    (entry,) = first.manifest.files
    (tmp_path / "root" / "sequences" / entry.path).unlink()
    assert night.run(TUESDAY).status == "computed"


def test_replace_computes_again_only_what_is_damaged(night, tmp_path):
    first = night.run()
    assert night.run(replace=True).status == "reused"
    (entry,) = first.manifest.files
    (tmp_path / "root" / "sequences" / entry.path).unlink()
    again = night.run(replace=True)
    assert again.status == "computed"
    assert night.storage.read_table(again.manifest, entry.name).num_rows == 1
    assert night.storage.published("sequences", MONDAY) == again.manifest


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"users": "many"}, r"metadata\.users is 'many'"),
        ({"users": None}, r"metadata\.users is None"),
        ({"users_tiem": 1}, r"metadata\.users_tiem is not a field of SequencesMetadata"),
    ],
)
def test_metadata_that_no_later_stage_could_read_is_not_published(night, metadata, problem):
    with pytest.raises(
        ArtifactError, match=rf"the stage of sequences returned metadata .*{problem}.* Nothing was"
    ):
        night.run(metadata=metadata)
    assert night.storage.published("sequences", MONDAY) is None


def test_a_damaged_manifest_is_restored_as_its_error_says(night, tmp_path):
    """Both copies of the manifest lack a field: that of the date, and that of the run."""
    good = night.run()
    root = tmp_path / "root" / "sequences"
    copies = [
        root / f"date={MONDAY}" / "_manifest.json",
        root / "_runs" / good.manifest.run_id / "_manifest.json",
    ]
    for copy in copies:
        content = json.loads(copy.read_text())
        del content["metadata"]["events"], content["settings"]["sequences"]
        copy.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"metadata\.events is missing") as refused:
        SequencesMetadata.of(night.storage.resolve("sequences"))
    remedy = re.search(
        r"remove (\S+) below storage\.root, and run the night of (\S+) again with", str(refused.value)
    )
    (tmp_path / "root" / remedy[1]).unlink()
    restored = night.run(remedy[2], replace=True).manifest
    assert night.storage.resolve("sequences") == restored
    assert (restored.run_id, restored.digest) == (good.manifest.run_id, good.manifest.digest)
    assert restored.setting("sequences") == good.manifest.setting("sequences")
