"""Embeddings that no quantizer can use are refused, and what is kept from last night is what it was made by."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import FileEntry
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import stable_hash
from tiger_ray.errors import DataError
from tiger_ray.ids.encoders import folder_digest, random_directions, refuse_bad_rows
from tiger_ray.settings.embeddings import EmbeddingsSettings
from tiger_ray.settings.settings import Settings
from tiger_ray.stages import embeddings as embeddings_stage
from tiger_ray.stages.embeddings import _EmbedShard
from tiger_ray.stages.stage import Context


def test_vectors_that_tell_nothing_are_refused_by_item():
    items = pa.table({"item_id": ["a", "b", "c"]})
    useless_ND = np.array([[1, 2], [0, 0], [3, 3]], np.float32)
    with pytest.raises(DataError, match=r"2 embeddings are the same number .*; first items: b, c "):
        refuse_bad_rows(useless_ND, items, "catalog")
    with pytest.raises(DataError, match=r"1 embeddings are not finite; first items: a "):
        refuse_bad_rows(np.array([[np.nan, 2], [0, 1]], np.float32), items[:2], "catalog")
    refuse_bad_rows(useless_ND[:1], items[:1], "hashing")


@pytest.mark.parametrize(("encoder", "differ"), [("catalog", True), ("hashing", False)])
def test_vectors_of_another_column_are_another_space(encoder, differ, monkeypatch):
    """Of one width they would pass for the same, and the old codebooks would be used for them."""
    entry = FileEntry(
        path=f"_runs/{32 * '0'}/shard", rows=1, bytes=1, sha256="0" * 64, facts={"dim": 8, "encoded": 0}
    )
    monkeypatch.setattr(embeddings_stage, "map_shards", lambda *_, **__: [entry])
    catalog, storage = SimpleNamespace(files=[entry]), Storage("/nowhere")
    monkeypatch.setattr(embeddings_stage, "_previous", lambda *_: None)

    def encoder_of(vector):
        settings = Settings(
            date="2026-11-23",
            storage={"root": "/nowhere"},
            catalog={"uri": "/c", "vector": vector},
            events={"uri": "/e"},
            embeddings={"encoder": encoder},
        )
        context = Context(settings, storage, {"catalog": catalog})
        return embeddings_stage.STAGE.compute(None, context)[1]["encoder"]

    assert encoder_of("picture") == encoder_of("picture")
    assert (encoder_of("picture") != encoder_of("text")) == differ


def test_items_without_text_lie_in_directions_of_their_own():
    item_id = pa.array([f"item {n}" for n in range(2000)])
    direction_ND = random_directions(stable_hash(item_id), 64)
    assert direction_ND.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(direction_ND, axis=1), 1, atol=1e-6)
    cosine_NN = direction_ND @ direction_ND.T
    np.fill_diagonal(cosine_NN, 0)
    assert np.abs(cosine_NN).max() < 0.75
    assert abs(direction_ND.mean()) < 0.002
    assert (random_directions(stable_hash(item_id[7:9]), 64) == direction_ND[7:9]).all()


def test_an_item_without_text_is_embedded_by_its_id_and_the_others_by_their_text(tmp_path):
    storage = Storage(str(tmp_path))
    catalog = storage.begin("catalog", "0" * 64)
    # "M 7 !": none of its words has the two letters that the hashing encoder asks for
    items = {"item_id": [*"abcde"], "title": [None] * 5, "text": ["red", "", "red", "", "M 7 !"]}
    items |= {"category": [None] * 5, "available": [True] * 5}
    table = pa.table(items, schema=schemas.catalog(pa.string(), None))
    entry = catalog.write_table("shard-00000.parquet", table)
    embeddings = storage.begin("embeddings", "1" * 64)
    embed = _EmbedShard(
        embeddings, EmbeddingsSettings(dim=16), storage, catalog.as_manifest([entry]), previous=None
    )
    found_ND = np.stack(embeddings.read_table(embed(entry)).column("embedding").to_pylist())
    assert (found_ND[0] == found_ND[2]).all()
    assert (found_ND[[1, 3, 4]] == random_directions(stable_hash(pa.array([*"bde"])), 16)).all()


def test_embeddings_of_ids_of_another_type_are_not_kept(tmp_path):
    storage = Storage(str(tmp_path))
    run = storage.begin("embeddings", "0" * 64)
    columns = [
        pa.array([1, 2]),
        pa.array([[0.5, 1.0]] * 2, pa.list_(pa.float32(), 2)),
        pa.array([3, 4], pa.uint64()),
    ]
    entry = run.write_table(
        "shard-00000.parquet", pa.table(columns, schema=schemas.embeddings(pa.int64(), 2))
    )
    embed = _EmbedShard(run, EmbeddingsSettings(dim=2), storage, None, previous=run.as_manifest([entry]))
    assert embed._last_night(entry, pa.int64()).num_rows == 2
    assert embed._last_night(entry, pa.string()) is None


def test_a_local_model_is_another_one_when_its_weights_change(tmp_path):
    settings = EmbeddingsSettings(encoder="sentence-transformers", model=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = folder_digest(settings)
    assert before == folder_digest(settings) is not None
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert folder_digest(settings) != before
    assert folder_digest(EmbeddingsSettings(model=str(tmp_path))) is None
