"""An exported folder is enough: transformers and pandas alone give the logits, the ranking and the items of tiger_ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import T5ForConditionalGeneration

from tests.hugging_face import LevelSoftmax, generate
from tests.worlds import MONDAY, Night, publish, tiny_settings
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.core.hashing import stable_hash
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.errors import ArtifactError, SettingsError, StorageError
from tiger_ray.ids import semantic_ids
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import PAD, Vocabulary, user_buckets
from tiger_ray.published.model import load_model
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.report import export
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.model import ModelSettings
from tiger_ray.settings.settings import Settings

pytestmark = pytest.mark.ray


REPOSITORY = Path(__file__).parents[2]
STRING = pa.string()
LEVEL_SIZES = (5, 4, 6, 8)
NUM_ITEMS = 60
WIDTH = 10


class Published:
    """A model that nobody trained, and Semantic IDs for it, in a folder."""

    def __init__(self, root: Path, id_type: pa.DataType = STRING, **model: Any) -> None:
        torch.manual_seed(0)
        sizes = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 32, "max_history": 5}
        own = ModelSettings(**(sizes | model))
        self.network = TigerModel(own, Vocabulary(LEVEL_SIZES, own.num_user_buckets)).eval()
        numbers = range(10**12, 10**12 + NUM_ITEMS)
        item_id = pa.array([f"item {n}" for n in numbers] if id_type == STRING else numbers, id_type)
        codewords = np.random.default_rng(1).integers(0, 4, (NUM_ITEMS, 3)).astype(np.int16)
        segment = semantic_ids.assign(None, item_id, codewords, LEVEL_SIZES)
        eligible = np.arange(NUM_ITEMS) % 4 > 0
        self.storage = Storage(str(root / "root"))
        self.settings = tiny_settings(
            self.storage.root, "unused", model=own.model_dump(), export={"to": str(root / "export")}
        )
        self.semantic_ids = self.publish_ids("space", segment, eligible)
        self.model = publish(
            self.storage,
            "model",
            self.network.to_files(),
            {"space": "space", "holdout": "none", "summary": "no steps"},
            settings=self.settings.resolved(),
            inputs={"sequences": "5" * 64, "semantic_ids": "1" * 64},
        )
        self.ids = load_semantic_ids(self.storage, self.semantic_ids)

    def publish_ids(
        self, space: str, segment: pa.Table, eligible: np.ndarray, date: str = MONDAY
    ) -> Manifest:
        facts = {"items": NUM_ITEMS, "eligible": int(eligible.sum()), "level_sizes": list(LEVEL_SIZES)}
        files = {"segment-00000.parquet": segment, "eligible.parquet": pa.table({"eligible": eligible})}
        return publish(self.storage, "semantic_ids", files, {**facts, "space": space}, date=date)

    def export(self, to: str | None = None) -> Path:
        settings = self.settings if to is None else with_folder(self.settings, to)
        return export.run(settings, self.storage, self.model, self.semantic_ids)


def with_folder(settings: Settings, to: str | None) -> Settings:
    return settings.model_copy(update={"export": settings.export.model_copy(update={"to": to})})


def snippet_of(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec(snippet_of(folder), scope)  # our own
    return scope["recommended"]


MODELS = pytest.mark.parametrize(
    "model",
    [
        {"softmax": softmax, "tie_embeddings": tied, "num_user_buckets": buckets}
        for softmax, tied, buckets in [
            ("vocabulary", True, 0),
            ("vocabulary", False, 7),
            ("level", True, 7),
            ("level", False, 0),
        ]
    ],
    ids=str,
)


@MODELS
def test_transformers_gives_the_same_logits_and_the_ranking_of_beam_search(tmp_path, model):
    published = Published(tmp_path, **model)
    folder = published.export()
    theirs = T5ForConditionalGeneration.from_pretrained(folder).eval()
    network, vocabulary = published.network, published.network.vocabulary
    rows = pq.read_table(folder / "semantic_ids.parquet").to_pylist()
    histories = [[0, 5, 7], [11], [3, 50, 40, 21, 9]]
    bucket = [3] if vocabulary.num_user_buckets else None
    user = [vocabulary.user_offset + 3] if vocabulary.num_user_buckets else []
    reads = [user + [token for item in history for token in rows[item]["token_ids"]] for history in histories]

    history_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(read) for read in reads], batch_first=True)
    target_BI = torch.tensor([rows[item]["token_ids"] for item in (8, 30, 59)])
    with torch.no_grad():
        expected = theirs(input_ids=history_BT, attention_mask=(history_BT != PAD).long(), labels=target_BI)
        found_BIV = network.logits(history_BT, target_BI)
    torch.testing.assert_close(found_BIV, expected.logits, atol=1e-5, rtol=0)

    decoder = Decoder(
        network, published.ids.codes_NI, published.ids.eligible_N, DecodingSettings(beam_width=WIDTH)
    )
    item_of = {tuple(row["token_ids"]): row["item_id"] for row in rows if row["eligible"]}
    level_softmax = LevelSoftmax(vocabulary) if model["softmax"] == "level" else None
    for history, read in zip(histories, reads, strict=True):
        found_1W, score_1W = decoder.recommend(
            np.array(history, np.int32), np.array([len(history)]), bucket and np.array(bucket), WIDTH
        )
        best, score = generate(theirs, read, item_of, WIDTH, level_softmax)
        assert [item_of[tokens] for tokens in best] == published.ids.item_ids(found_1W[0]).to_pylist()
        np.testing.assert_allclose(score, score_1W[0], atol=1e-4)


@MODELS
def test_the_snippet_of_the_card_recommends_what_beam_search_does(tmp_path, model, monkeypatch):
    published = Published(tmp_path, **model)
    found = run_snippet(published.export(), monkeypatch)
    vocabulary, ids = published.network.vocabulary, published.ids
    bucket = None
    if vocabulary.num_user_buckets:
        bucket = user_buckets(stable_hash(pa.array(["user 1"])), vocabulary)
    decoder = Decoder(published.network, ids.codes_NI, ids.eligible_N, DecodingSettings(beam_width=WIDTH))
    expected_1W, _ = decoder.recommend(np.arange(3, dtype=np.int32), np.array([3]), bucket, WIDTH)
    assert found == ids.item_ids(expected_1W[0]).to_pylist()


@pytest.mark.parametrize("id_type", [STRING, pa.int64()], ids=str)
def test_semantic_ids_are_written_item_by_item_in_small_groups(tmp_path, id_type, monkeypatch):
    monkeypatch.setattr(export, "ROWS_PER_GROUP", 7)
    published = Published(tmp_path, id_type)
    file = pq.ParquetFile(published.export() / "semantic_ids.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [7] * 8 + [4]
    table = file.read()
    assert table.schema == schemas.exported_semantic_ids(id_type)
    ids = published.ids
    assert table.column("item_id").to_pylist() == ids.item_id.to_pylist()
    assert table.column("eligible").to_pylist() == ids.eligible_N.tolist()
    first_I = 1 + np.cumsum([0, *LEVEL_SIZES[:-1]])
    assert table.column("token_ids").to_pylist() == (first_I + ids.codes_NI).tolist()


def test_generation_writes_exactly_one_semantic_id(tmp_path):
    theirs = T5ForConditionalGeneration.from_pretrained(Published(tmp_path).export())
    assert theirs.generate(torch.tensor([[1, 6, 10]])).shape == (1, 1 + len(LEVEL_SIZES))
    config = theirs.generation_config
    assert (config.decoder_start_token_id, config.eos_token_id) == (PAD, None)


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path):
    published = Published(tmp_path)
    folder = tmp_path / "export"
    folder.mkdir()
    published.export()  # an empty one is fine
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(SettingsError, match=r"export\.to is .*export, which exists and is not empty"):
        published.export()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(SettingsError, match="exists and is not empty"):
        published.export(str(folder / "README.md"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["export", "root"]


def test_what_is_no_local_folder_is_refused(tmp_path):
    published = Published(tmp_path)
    with pytest.raises(SettingsError, match=r"export\.to is s3://bucket/x, but an export is a local folder"):
        published.export("s3://bucket/x")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write the folder .*file/x of export\.to"):
        published.export(str(tmp_path / "file" / "x"))
    with pytest.raises(SettingsError, match=r"--export\.to FOLDER"):
        export.run(
            with_folder(published.settings, None),
            published.storage,
            published.model,
            published.semantic_ids,
        )


def test_semantic_ids_of_another_space_are_refused_and_nothing_is_written(tmp_path):
    published = Published(tmp_path)
    segment = published.storage.read_table(published.semantic_ids, "segment-00000.parquet")
    other = published.publish_ids("another", segment, published.ids.eligible_N, "2026-11-24")
    with pytest.raises(ArtifactError, match=r"trained on ID space space, .* are of another"):
        export.run(published.settings, published.storage, published.model, other)
    assert not (tmp_path / "export").exists()


def test_the_card_says_that_no_evaluation_is_published(tmp_path):
    card = (Published(tmp_path).export() / "README.md").read_text()
    assert f"None is published for {MONDAY} and this model (training.holdout none)" in card


@pytest.fixture(scope="module")
def exported(night: Night, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The night's model, exported by the job, in a process of its own."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "night.yaml").write_text(json.dumps(night.settings.resolved()))
    job = [sys.executable, str(REPOSITORY / "jobs/export_model.py"), "--config", str(folder / "night.yaml")]
    done = subprocess.run(
        [*job, "--export.to", str(folder / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{folder / 'out'}\n"
    again = subprocess.run([*job, "--export.to", str(folder / "out")], capture_output=True, text=True)
    assert (again.returncode, again.stderr.startswith("SettingsError: export.to")) == (2, True)
    return folder / "out"


def test_a_stranger_gets_the_published_recommendations_from_the_folder_alone(night, exported):
    theirs = T5ForConditionalGeneration.from_pretrained(exported).eval()
    items = pd.read_parquet(exported / "semantic_ids.parquet")
    tokens = [row.tolist() for row in items["token_ids"]]
    item_of = {tuple(tokens[n]): items["item_id"][n] for n in np.flatnonzero(items["eligible"])}
    published = {row["user_id"]: row["item_ids"] for row in night.rows().to_pylist()}
    users = [row for row in night.rows("sequences", "shard-").to_pylist() if row["history"]][:10]
    for user in users:
        last = user["history"][-night.settings.model.max_history :]
        read = [token for item in last for token in tokens[item]]
        best, _ = generate(theirs, read, item_of, night.settings.decoding.beam_width)
        assert [item_of[row] for row in best[:10]] == published[user["user_id"]]


def test_the_snippet_runs_on_the_night_s_model(night, exported, monkeypatch):
    ids = load_semantic_ids(night.storage, night["semantic_ids"])
    network = load_model(night.storage, night["model"], night["semantic_ids"])
    decoder = Decoder(network, ids.codes_NI, ids.eligible_N, DecodingSettings(beam_width=WIDTH))
    expected_1W, _ = decoder.recommend(np.arange(3, dtype=np.int32), np.array([3]), None, WIDTH)
    assert run_snippet(exported, monkeypatch) == ids.item_ids(expected_1W[0]).to_pylist()


def test_the_card_names_what_the_model_was_made_from_and_how_good_it_is(night, exported):
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers"
    loaded = ModelCard.load(exported / "README.md")
    measured = {
        f"{name}@{k}": round(night["evaluation"].metadata["model"][f"{name}@{k}"], 4)
        for name in ("recall", "ndcg")
        for k in (5, 10)
    }
    assert {result.metric_type: result.metric_value for result in loaded.data.eval_results} == measured
    assert {result.dataset_revision for result in loaded.data.eval_results} == {night["sequences"].digest}
    for manifest in (night["model"], night["semantic_ids"], night["sequences"]):
        assert manifest.digest in card
    assert night["model"].metadata["space"] in card
    evaluated = night["evaluation"].metadata
    for who in ("model", "popularity"):
        for name in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
            assert f"{evaluated[who][name]:.4f}" in card
    for words in (
        "leave-one-out, test",
        "full, item level",
        f"beam {night.settings.decoding.beam_width}",
        "not masked",
        "ties by hash",
        "seed 0",
        f"{night['model'].metadata['step']} steps of 64",
    ):
        assert words in card, words
    (written,) = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    resolved = night.settings.resolved()
    assert json.loads(written) == {name: resolved[name] for name in ("model", "training")}
    for package, version in night["model"].software.items():
        assert f"{package} {version}" in card
    assert night.storage.root not in card


def test_an_evaluation_of_another_model_is_not_quoted(night, exported, tmp_path):
    other = night["model"].model_copy(update={"metadata": {**night["model"].metadata, "loss": -1.0}})
    folder = export.run(
        with_folder(night.settings, str(tmp_path / "out")), night.storage, other, night["semantic_ids"]
    )
    assert "None is published" in (folder / "README.md").read_text()
