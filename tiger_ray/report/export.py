"""A published model -> a folder in the layout of Hugging Face, which transformers reads without tiger_ray.

    model.safetensors, config.json   T5ForConditionalGeneration, with tiger_ray's own settings inside
    generation_config.json           makes `generate` write exactly as many tokens as a Semantic ID has
    semantic_ids.parquet             item_id, token_ids, eligible: translates items to tokens and back
    README.md                        the model card: how to use the model, its data, settings and metrics

N items of a row group, I id_length.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from string import Template

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.files import MODEL_FILES
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import EvaluationMetadata, ModelMetadata, SemanticIdsMetadata
from tiger_ray.artifacts.storage import Storage
from tiger_ray.artifacts.store import parse_uri
from tiger_ray.errors import SettingsError, StorageError
from tiger_ray.ids.semantic_ids import SemanticIds
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import PAD, Vocabulary
from tiger_ray.published.evaluation import evaluation_of
from tiger_ray.published.model import load_model
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.report.tables import metrics_table
from tiger_ray.settings.settings import Settings

ROWS_PER_GROUP = 131_072
"""Items that are held as token ids at once."""


def run(settings: Settings, storage: Storage, model: Manifest, semantic_ids: Manifest) -> Path:
    """Write the model and its Semantic IDs into the folder `export.to`, all or nothing.

    Args:
        settings: `export.to`, and the date of the night.
        storage: root of the artifacts.
        model: artifact to export; its files are checked as for scoring and copied byte by byte.
        semantic_ids: artifact of the same ID space; decides which items are eligible.

    Returns:
        The folder.

    Raises:
        SettingsError: `export.to` is not a local folder, or is not empty.
        ArtifactError: a file is missing or damaged, or the model was trained on another ID space.
        StorageError: the folder cannot be written.
    """
    folder = empty_folder(settings.export.to)
    network = load_model(storage, model, semantic_ids)
    ids = load_semantic_ids(storage, semantic_ids)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            unfinished = Path(beside) / "export"
            unfinished.mkdir()
            for name in MODEL_FILES:
                (unfinished / name).write_bytes(storage.read_file(model, name))
            (unfinished / "generation_config.json").write_text(generation_config(network.vocabulary))
            write_semantic_ids(unfinished / "semantic_ids.parquet", ids, network.vocabulary)
            card = model_card(network, model, semantic_ids, evaluation_of(storage, settings, model))
            card.save(unfinished / "README.md")
            unfinished.rename(folder)
    except OSError as error:
        raise StorageError(f"cannot write the folder {folder} of export.to: {error}") from None
    return folder


def empty_folder(to: str | None) -> Path:
    """The local folder `export.to`, if it is empty or does not exist yet.

    Raises:
        SettingsError: `export.to` is missing, is not a local folder, or is not empty.
    """
    if to is None:
        raise SettingsError("export.to is required here: the folder to write, as --export.to FOLDER")
    scheme, path = parse_uri(to)
    folder = Path(path)
    if scheme != "local":
        raise SettingsError(f"export.to is {to}, but an export is a local folder; copy it from there")
    if folder.exists() and not (folder.is_dir() and not os.listdir(folder)):
        raise SettingsError(f"export.to is {folder}, which exists and is not empty; name a new folder")
    return folder


def generation_config(vocabulary: Vocabulary) -> str:
    """`generation_config.json`: every Semantic ID has the same length, so no token marks its end."""
    config = {
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": None,
        "min_new_tokens": vocabulary.id_length,
        "max_new_tokens": vocabulary.id_length,
    }
    return json.dumps(config, indent=2) + "\n"


def write_semantic_ids(path: Path, ids: SemanticIds, vocabulary: Vocabulary) -> None:
    """Write every item ever registered, in the order of item_index.

    Args:
        path: Parquet file to write; its columns are those of `schemas.exported_semantic_ids`.
        ids: item ids, codes and eligibility of all items.
        vocabulary: turns codes into tokens.
    """
    schema = schemas.exported_semantic_ids(ids.item_id.type)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, len(ids), ROWS_PER_GROUP):
            group = slice(first, first + ROWS_PER_GROUP)
            token_NI = vocabulary.tokens(ids.codes_NI[group]).int().numpy()
            tokens = pa.FixedSizeListArray.from_arrays(pa.array(token_NI.ravel()), ids.id_length)
            columns = [ids.item_id[group], tokens.cast(schema.field("token_ids").type), ids.eligible[group]]
            writer.write_table(pa.table(columns, schema=schema))


SNIPPET = Template("""import pandas as pd
import torch
from transformers import $names

model = T5ForConditionalGeneration.from_pretrained(".").eval()  # the folder of this card
items = pd.read_parquet("semantic_ids.parquet")
tokens = {item: row.tolist() for item, row in zip(items["item_id"], items["token_ids"])}
item_of = {tuple(tokens[item]): item for item in items["item_id"][items["eligible"]]}
next_tokens = {}
for row in item_of:
    for level, token in enumerate(row):
        next_tokens.setdefault((0, *row[:level]), set()).add(token)
allowed = lambda _, written: list(next_tokens[tuple(written.tolist())])
$level
history = list(items["item_id"][:3])  # oldest first
read = [token for item in history[-$max_history:] for token in tokens[item]]$user
written = model.generate(
    torch.tensor([read]),
    num_beams=10,
    num_return_sequences=10,
    $constraint,
)
recommended = [item_of[tuple(row[1:])] for row in written.tolist()]
""")


LEVEL = Template('''

class LevelSoftmax(LogitsProcessor):
    """Probabilities of this model are among the codewords of one level, ahead of the constraint."""

    def __call__(self, written, scores):
        first, end = $levels[written.shape[1] - 1]
        level = torch.full_like(scores, -torch.inf)
        level[:, first:end] = scores[:, first:end].log_softmax(-1)
        return level

''')


CARD = """---
{{ card_data }}
---

# TIGER, a generative recommender, of {{ date }}

A T5 encoder-decoder. It reads the Semantic IDs of a user's items, oldest first, and writes the Semantic ID of the next item
(*Recommender Systems with Generative Retrieval*, [arXiv 2305.05065](https://arxiv.org/abs/2305.05065)). Trained by tiger_ray
{{ version }}. The model knows only the items of `semantic_ids.parquet`, and has no tokenizer.

## Use

```python
{{ snippet }}```

- An item is {{ id_length }} tokens; the levels have {{ levels }} codewords. Token 0 is padding and starts the decoder.
- A codeword's probability is among all tokens{{ among }}.
- To read several users at once, put 0 behind the shorter histories and leave it out by an `attention_mask`.
- {{ user }}
- `eligible` says whether the item might be recommended on {{ date }}. All other items occur in histories only.

## Metrics

{{ metrics }}

## Data

SHA-256 of the content of each artifact, as in the `inputs` of the manifests of tiger_ray.

| | |
|---|---|
{{ data }}

## Settings

Training: {{ summary }}; seed {{ seed }}.

```json
{{ settings }}
```

## Software

{{ software }}

"""
"""Template of jinja2 for `huggingface_hub.ModelCard`."""


def model_card(
    network: TigerModel, model: Manifest, semantic_ids: Manifest, evaluation: Manifest | None
) -> ModelCard:
    """`README.md`: what the model is, how to use it, its data and settings, and its metrics.

    Args:
        network: the loaded model.
        model: manifest of the model.
        semantic_ids: manifest of the Semantic IDs in the same folder.
        evaluation: manifest of the evaluation of this very model; None: the card says that there is none.
    """
    vocabulary, own = network.vocabulary, network.settings
    trained, registry = ModelMetadata.of(model), SemanticIdsMetadata.of(semantic_ids)
    data = {
        "model": model.digest,
        **{f"{name} it was trained on": digest for name, digest in model.inputs.items()},
        "ID space (quantizer and sizes of the levels)": trained.space,
        "semantic_ids of this folder": semantic_ids.digest,
        "items": f"{registry.items:,}, {registry.eligible:,} of them eligible",
    }
    user = "Users have no token of their own: equal histories get equal items."
    if vocabulary.num_user_buckets:
        user = (
            f"A history begins with the token of the user's bucket, {vocabulary.user_offset} + hash modulo "
            f"{vocabulary.num_user_buckets}; ids are text or int64, as in the events."
        )
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            tags=["tiger", "generative-retrieval", "recommendation", "semantic-ids", "t5"],
            model_name=f"TIGER of {model.date}" if evaluation else None,
            eval_results=_results(model, evaluation) if evaluation else None,
        ),
        template_str=CARD,
        date=model.date,
        version=model.software.get("tiger-ray", ""),
        snippet=snippet(network),
        id_length=vocabulary.id_length,
        levels=", ".join(map(str, vocabulary.level_sizes)),
        among=" of its level" if own.softmax == "level" else "",
        user=user,
        metrics=_metrics(model, evaluation),
        data="\n".join(f"| {name} | {value} |" for name, value in data.items()),
        summary=trained.summary,
        seed=model.setting("seed"),
        settings=json.dumps({name: model.setting(name) for name in ("model", "training")}, indent=2),
        software=", ".join(f"{name} {version}" for name, version in model.software.items()),
    )


def snippet(network: TigerModel) -> str:
    """Python code that gets the items of `decoding.beam_search` from transformers alone."""
    vocabulary, own = network.vocabulary, network.settings
    levels = [
        (first, first + size) for first, size in zip(vocabulary.offsets, vocabulary.level_sizes, strict=True)
    ]
    over_level = own.softmax == "level"
    names = ["T5ForConditionalGeneration"]
    constraint = "prefix_allowed_tokens_fn=allowed"
    if over_level:
        names = ["LogitsProcessor", "PrefixConstrainedLogitsProcessor", *names]
        constraint = "logits_processor=[LevelSoftmax(), PrefixConstrainedLogitsProcessor(allowed, 10)]"
    user = ""
    if vocabulary.num_user_buckets:
        user = (
            '\nuser_id = pd.Series(["user 1"], dtype=object)  # int64 where the ids of the events are numbers'
            "\nuser = pd.util.hash_array(user_id.to_numpy())[0]"
            f"\nread = [{vocabulary.user_offset} + int(user % {vocabulary.num_user_buckets}), *read]"
        )
    return SNIPPET.substitute(
        names=", ".join(names),
        level=LEVEL.substitute(levels=levels) if over_level else "",
        max_history=own.max_history,
        user=user,
        constraint=constraint,
    )


def _results(model: Manifest, evaluation: Manifest) -> list[EvalResult]:
    """Recall and NDCG as metadata of the card, which the hub and its clients read."""
    found = EvaluationMetadata.of(evaluation)
    return [
        EvalResult(
            task_type="recommendation",
            task_name="Next item",
            dataset_type="tiger_ray",
            dataset_name=f"events up to {model.date}",
            dataset_split=found.protocol.split,
            dataset_revision=model.input("sequences"),
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in found.model.by_name.items()
        if name.startswith(("recall@", "ndcg@"))
    ]


def _metrics(model: Manifest, evaluation: Manifest | None) -> str:
    trained = ModelMetadata.of(model)
    if evaluation is None:
        return f"None is published for {model.date} and this model (training.holdout {trained.holdout})."
    protocol, precision = (
        EvaluationMetadata.of(evaluation).protocol,
        evaluation.setting("decoding", "precision"),
    )
    return (
        f"```\n{metrics_table(evaluation, model)}\n```\n\n"
        f"One training (seed {model.setting('seed')}; {trained.summary}). Items {protocol.items}, "
        f"temperature {protocol.temperature}, decoded in {precision} (seed "
        f"{evaluation.setting('seed')}). A hit is the item itself, with its whole Semantic ID."
    )
