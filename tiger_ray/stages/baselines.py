"""The baselines as rankers to evaluate; SASRec is trained by the workers that train the model.

N items, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tiger_ray.artifacts.files import MODEL_FILES
from tiger_ray.artifacts.lineage import registry_of, require_holdout, require_same_registry
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import EmbeddingsMetadata
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.schemas import matrix_of
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import DataError
from tiger_ray.model.sasrec import SasrecModel
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.rankers.base import Rules
from tiger_ray.rankers.index import hnsw, ivf_flat
from tiger_ray.rankers.neighbours import Neighbours
from tiger_ray.rankers.popularity import Popularity
from tiger_ray.rankers.sasrec import Sasrec
from tiger_ray.settings.sasrec import SasrecSettings
from tiger_ray.settings.settings import Settings
from tiger_ray.stages import evaluation, model
from tiger_ray.stages.evaluation import RankerSpec
from tiger_ray.stages.model import train
from tiger_ray.stages.stage import Computed, Context, Stage, StageResult, run_stage
from tiger_ray.training.collate import sasrec_collate
from tiger_ray.training.spec import TrainSpec

INPUTS = ("semantic_ids", "sequences", "catalog", "embeddings")
"""Artifacts that a baseline and the evaluation of a baseline read."""


def run_baseline(settings: Settings, storage: Storage, **inputs: Manifest) -> StageResult:
    """Publish the evaluation of `baseline.kind`, and first the trained model if the baseline needs one.

    Args:
        settings: of the night.
        storage: where artifacts live.
        inputs: the manifests of `INPUTS`.

    Raises:
        DataError: training sees all events, so nothing is left to evaluate on.
        ArtifactError: the histories have no moments for a time split.
    """
    if settings.training.holdout == "none":
        raise DataError(
            "training.holdout is 'none', so nothing is left to evaluate a baseline on; set it to 'leave_one_out' or 'time'"
        )
    make = {"popularity": _popularity, "neighbours": _neighbours, "sasrec": _sasrec}[settings.baseline.kind]
    spec = make(settings, storage, inputs["semantic_ids"], inputs["sequences"], inputs["embeddings"])
    evaluated = {name: inputs[name] for name in evaluation.INPUTS}
    return run_stage(evaluation.evaluation_stage(spec), settings, storage, **evaluated)


def _spec(settings: Settings, name: str, ranking: str, **parts: Any) -> RankerSpec:
    decoding = settings.decoding
    return RankerSpec(
        ranking={"ranking": f"full, item level, {ranking}", **parts.pop("more", {})},
        holdout=settings.training.holdout,
        name=name,
        num_workers=decoding.num_workers,
        num_cpus=decoding.cpus_per_worker,
        **{"use_gpu": decoding.use_gpu, **parts},
    )


def _popularity(
    settings: Settings, storage: Storage, semantic_ids: Manifest, sequences: Manifest, embeddings: Manifest
) -> RankerSpec:
    return _spec(
        settings,
        "popularity",
        "most events that training saw",
        make=make_popularity,
        arguments={},
        inputs={},
        sections={},
        use_gpu=False,
        reads_events=True,
    )


def make_popularity(rules: Rules, events_N: npt.NDArray[np.int64]) -> Popularity:
    """Popularity by the events that training may see, (N,) int64."""
    return Popularity(events_N, rules)


def _neighbours(
    settings: Settings, storage: Storage, semantic_ids: Manifest, sequences: Manifest, embeddings: Manifest
) -> RankerSpec:
    return _spec(
        settings,
        "neighbours",
        "cosine to the last item's content embedding",
        make=make_neighbours,
        arguments={
            "storage": storage,
            "semantic_ids": semantic_ids,
            "embeddings": embeddings,
            "device": "cuda" if settings.decoding.use_gpu else "cpu",
        },
        inputs={"embeddings": embeddings},
        sections={},
        more={"encoder": encoder_name(embeddings)},
    )


def encoder_name(embeddings: Manifest) -> str:
    """Name of the encoder that made the embeddings."""
    settings = embeddings.setting("embeddings")
    return str(settings["model"] if settings["encoder"] == "sentence-transformers" else settings["encoder"])


def make_neighbours(
    storage: Storage, semantic_ids: Manifest, embeddings: Manifest, device: str, rules: Rules
) -> Neighbours:
    """Neighbours among all items; the embeddings are in memory twice, 8 N D bytes, and 12 N D while they are read.

    Args:
        storage: where the artifacts are.
        semantic_ids: manifest of the Semantic IDs, whose registry numbers the items.
        embeddings: manifest of the embeddings.
        device: where to compare, `cpu` or `cuda`.
        rules: what may come out.
    """
    ids = load_semantic_ids(storage, semantic_ids)
    dim = EmbeddingsMetadata.of(embeddings).dim
    embedding_ND: npt.NDArray[np.float32] = np.zeros((len(ids), dim), np.float32)
    columns = [
        storage.read_table(embeddings, entry, columns=["item_id"]).column("item_id")
        for entry in embeddings.files
    ]
    # Look up the ids of all files at once: each lookup hashes the whole registry.
    index_N = ids.lookup(pa.chunked_array([chunk for column in columns for chunk in column.chunks]))
    first = 0
    for entry in embeddings.files:
        embedding = storage.read_table(embeddings, entry, columns=["embedding"]).column("embedding")
        index = index_N[first : first + len(embedding)]
        embedding_ND[index[index >= 0]] = matrix_of(embedding)[index >= 0]
        first += len(embedding)
    return Neighbours(embedding_ND, rules, device)


def _sasrec(
    settings: Settings, storage: Storage, semantic_ids: Manifest, sequences: Manifest, embeddings: Manifest
) -> RankerSpec:
    stage = sasrec_stage(settings.sasrec)
    trained = run_stage(stage, settings, storage, sequences=sequences, semantic_ids=semantic_ids).manifest
    index = settings.baseline.index
    return _spec(
        settings,
        variant(settings.sasrec) + ("" if index == "exact" else f"-{index}"),
        {"exact": "inner products with all items"}.get(index, f"inner products, FAISS {index}"),
        make=make_sasrec,
        arguments={"storage": storage, "settings": settings, "model": trained},
        inputs={"model": trained},
        sections={"baseline": settings.baseline},
        more={"model_history": settings.sasrec.max_history},
    )


def variant(sasrec: SasrecSettings) -> str:
    """Name of this SASRec among the artifacts of a night, which keeps one of each variant."""
    return f"sasrec-{sasrec.loss}" + ("-map" if sasrec.output_map else "")


def _check_sasrec(context: Context) -> None:
    sequences = context.inputs["sequences"]
    require_same_registry(sequences, context.inputs["semantic_ids"])
    require_holdout(sequences, context.settings.training.holdout)


def _compute_sasrec(run: Run, context: Context) -> Computed:
    arguments = {
        "settings": context.settings,
        "storage": context.storage,
        "semantic_ids": context.inputs["semantic_ids"],
    }
    return train(run, context.settings, context.inputs["sequences"], make_sasrec_spec, arguments)


def sasrec_stage(sasrec: SasrecSettings) -> Stage:
    """The stage that trains this SASRec by section `training`, and publishes `model-VARIANT`."""
    return Stage(
        name=f"model-{variant(sasrec)}",
        does="histories -> a trained SASRec",
        inputs=("sequences", "semantic_ids"),
        sections=("sasrec", "training"),
        check=_check_sasrec,
        keyed_inputs=lambda context: {
            "sequences": context.inputs["sequences"],
            "semantic_ids": registry_of(context.inputs["semantic_ids"]),
        },
        draws=lambda settings: True,
        compute=_compute_sasrec,
        format_version=model.STAGE.format_version,
    )


def make_sasrec_spec(settings: Settings, storage: Storage, semantic_ids: Manifest) -> TrainSpec:
    """A new SASRec for all items ever registered.

    Args:
        settings: section `sasrec`, and the seed.
        storage: where the artifacts are.
        semantic_ids: manifest of the Semantic IDs, whose registry numbers the items.
    """
    ids = load_semantic_ids(storage, semantic_ids)
    torch.manual_seed(settings.seed)
    model = SasrecModel(settings.sasrec, len(ids))
    return TrainSpec(
        model,
        sasrec_collate(model),
        partial(Sasrec, rules=Rules(ids.eligible_N)),
        settings.sasrec.max_history,
    )


def make_sasrec(storage: Storage, settings: Settings, model: Manifest, rules: Rules) -> Sasrec:
    """The published SASRec with its index.

    Args:
        storage: where the artifacts are.
        settings: sections `decoding` and `baseline`.
        model: manifest of the SASRec model.
        rules: what may come out.
    """
    decoding = settings.decoding
    if not decoding.use_gpu:
        torch.set_num_threads(max(1, int(decoding.cpus_per_worker)))
    trained = SasrecModel.from_files({name: storage.read_file(model, name) for name in MODEL_FILES})
    indexes: Mapping[str, Any] = {"ivf": ivf_flat, "hnsw": hnsw}
    make_index = indexes.get(settings.baseline.index)
    item_ND = trained.item.weight.detach().numpy()
    return Sasrec(
        trained.to("cuda" if decoding.use_gpu else "cpu"),
        torch.device("cuda" if decoding.use_gpu else "cpu"),
        rules=rules,
        index=make_index(item_ND, rules.eligible_N) if make_index else None,
    )
