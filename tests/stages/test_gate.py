"""What is copied from the night before says which night it is for, and by what it was made."""

import pyarrow as pa

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.stages.recommendations import _RedateShard, _twin


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


def test_recommendations_whose_files_are_damaged_are_made_anew_and_not_copied(tmp_path):
    storage = Storage(str(tmp_path))
    run = storage.begin("recommendations", "0" * 64)
    entry = run.write_table("shard-00000.parquet", rows("2026-11-23", "m1", "s1"))
    facts = {"settings": {}, "inputs": {}, "metadata": {"scoring": "x", "summary": ""}}
    published = storage.publish(run, date="2026-11-23", files=[entry], **facts)
    assert _twin(storage, "x") == published
    assert _twin(storage, "y") is None
    (tmp_path / "recommendations" / entry.path).write_bytes(b"half")
    assert _twin(storage, "x") is None
