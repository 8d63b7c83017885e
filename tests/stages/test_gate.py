"""What is copied from the night before says which night it is for, and by what it was made."""

import pyarrow as pa
import pytest

from tests.manifests import manifest_of, metadata_of
from tests.worlds import tiny_settings
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import QualityError
from tiger_ray.stages.gate import require_gate
from tiger_ray.stages.recommendations import _find_twin, _RedateShard


def rows(date, model, ids):
    values = [["u", "v"], [["a"], []], [[-0.5], []], [[[1, 2, 0]], []], [["generated"], []]]
    columns = [*values, *([value] * 2 for value in (date, model, ids))]
    return pa.table(columns, schema=schemas.recommendations(pa.string(), pa.string()))


def test_a_copied_file_differs_by_date_and_versions_alone(tmp_path):
    storage = Storage(str(tmp_path))
    run = storage.begin("recommendations", "0" * 64)
    entry = run.write_table("shard-00000.parquet", rows("2026-11-23", "m1", "s1"), {"users": 2})
    tonight = storage.begin("recommendations", "1" * 64)
    values = {"date": "2026-11-24", "model_version": "m2", "semantic_ids_version": "s2"}
    copied = _RedateShard(tonight, storage, run.as_manifest([entry]), values, 1)(entry)
    assert tonight.read_table(copied).equals(rows("2026-11-24", "m2", "s2"))
    assert copied.facts == {"users": 2}


def test_recommendations_whose_files_are_damaged_are_made_anew_and_not_copied(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    run = storage.begin("recommendations", "0" * 64)
    entry = run.write_table("shard-00000.parquet", rows("2026-11-23", "m1", "s1"))
    facts = {"settings": {}, "inputs": {}, "metadata": metadata_of("recommendations", scoring="x")}
    published = storage.publish(run, date="2026-11-23", files=[entry], **facts)
    assert _find_twin(storage, "x") == published
    assert _find_twin(storage, "y") is None
    damaged = published.model_copy(update={"metadata": {"scoring": "x"}})
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "resolve", lambda *_: damaged)
        assert _find_twin(storage, "x") is None
    (tmp_path / "recommendations" / entry.path).write_bytes(b"half")
    assert _find_twin(storage, "x") is None


def evaluated(ndcg):
    metadata = metadata_of("evaluation")
    metadata["model"]["ndcg@10"] = ndcg
    return manifest_of("evaluation", metadata)


def test_a_night_much_worse_than_the_last_is_refused_and_a_damaged_last_one_is_no_bar(
    monkeypatch, caplog, tmp_path
):
    """The last recommendations have ndcg@10 0.25, and max_drop is 0.2."""
    settings = tiny_settings(
        str(tmp_path), "unused", evaluation={"min_ratio_to_popularity": 0.0, "max_drop": 0.2}
    )
    last = manifest_of("recommendations")
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(Storage, "resolve", lambda *_: last)
    require_gate(settings, storage, evaluated(0.2001))
    with pytest.raises(
        QualityError, match=r"ndcg@10 is 0\.1999, 20% below the 0\.2500 of the last published"
    ):
        require_gate(settings, storage, evaluated(0.1999))
    del last.metadata["evaluation"]["ndcg@10"]  # measured at other places
    require_gate(settings, storage, evaluated(0.1999))
    assert not caplog.records
    del last.metadata["evaluation"]
    require_gate(settings, storage, evaluated(0.1999))
    assert "max_drop is not applied tonight: the manifest of recommendations" in caplog.text
    assert "metadata.evaluation is missing" in caplog.text
