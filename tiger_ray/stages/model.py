"""Histories -> a model: the paper's sequence-to-sequence training, by one worker or by several of Ray Train.

An example is a user's history cut before one event: the model reads the earlier items and writes the Semantic ID of
the item of that event. Seed and step number decide the examples of a step (`training.examples`), so a resumed run
continues exactly, and any number of workers sees the same global batches. The loop is `training.loop.fit`.

At each checkpoint the model ranks the validation event of some users (`training.validation`); the best checkpoint
becomes the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tiger_ray.artifacts.files import MODEL_FILES
from tiger_ray.artifacts.lineage import (
    id_space,
    registry_of,
    require_holdout,
    require_same_model,
    require_same_registry,
)
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import SemanticIdsMetadata, SequencesMetadata
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.workers import Worker, run_workers
from tiger_ray.core.memory import keep_freed_memory
from tiger_ray.core.precision import dtype_of
from tiger_ray.errors import ArtifactError, DataError, StorageError
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.published.model import WARM_START_DAYS, last_model, load_model
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.published.sequences import load_validation, open_examples
from tiger_ray.rankers.base import Rules
from tiger_ray.rankers.tiger import VALIDATION_BEAM_WIDTH, TigerRanker
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.settings import Settings
from tiger_ray.stages.stage import Computed, Context, Stage
from tiger_ray.training.checkpoints import JUDGED_BY, STATE_FILE, Progress, load_state, save_state
from tiger_ray.training.collate import tiger_collate
from tiger_ray.training.log import MLflow, TensorBoard, TrainingLog, peak_operations_per_s, wants_mlflow
from tiger_ray.training.loop import BATCH_TOKENS, fit, make_optimizer
from tiger_ray.training.spec import TrainSpec

log = logging.getLogger(__name__)


def _check(context: Context) -> None:
    settings, sequences, semantic_ids = context.settings, *_inputs(context)
    require_same_registry(sequences, semantic_ids)
    require_holdout(sequences, settings.training.holdout)
    last = _warm_start(context)
    if last is not None:
        require_same_model(last, settings, semantic_ids)


def _inputs(context: Context) -> tuple[Manifest, Manifest]:
    return context.inputs["sequences"], context.inputs["semantic_ids"]


def _warm_start(context: Context) -> Manifest | None:
    """The model to start from; None if the settings ask for none or the last nights published none."""
    if not context.settings.training.warm_start:
        return None
    return last_model(context.storage, context.settings.date)


def _keyed_inputs(context: Context) -> dict[str, Manifest]:
    sequences, semantic_ids = _inputs(context)
    inputs = {"sequences": sequences, "semantic_ids": registry_of(semantic_ids)}
    last = _warm_start(context)
    return inputs if last is None else {**inputs, "warm_start": last}


def _compute(run: Run, context: Context) -> Computed:
    settings, storage = context.settings, context.storage
    sequences, semantic_ids = _inputs(context)
    warm_start = _warm_start(context)
    if settings.training.warm_start and warm_start is None:
        log.warning(
            "training.warm_start: no model of the last %d days, so training starts from scratch",
            WARM_START_DAYS,
        )
    arguments = {
        "settings": settings,
        "storage": storage,
        "semantic_ids": semantic_ids,
        "warm_start": warm_start,
    }
    entries, facts = train(run, settings, sequences, make_tiger_spec, arguments)
    if warm_start is not None:
        facts["summary"] += f", begun with the model of {warm_start.date}"
    return entries, {
        **facts,
        "space": id_space(semantic_ids),
        "level_sizes": list(SemanticIdsMetadata.of(semantic_ids).level_sizes),
    }


def make_tiger_spec(
    settings: Settings, storage: Storage, semantic_ids: Manifest, warm_start: Manifest | None
) -> TrainSpec:
    """The paper's model, or the last night's model with tonight's settings.

    Args:
        settings: of tonight.
        storage: where the artifacts are.
        semantic_ids: manifest of the Semantic IDs.
        warm_start: manifest of the model to start from; None: new weights.
    """
    ids = load_semantic_ids(storage, semantic_ids)
    vocabulary = Vocabulary(ids.level_sizes, settings.model.num_user_buckets)
    vocabulary.require_codes(ids.codes_NI)
    torch.manual_seed(settings.seed)
    model = TigerModel(settings.model, vocabulary)
    if warm_start is not None:
        # Copy the weights into a model of tonight's settings: dropout and max_history may have changed.
        model.load_state_dict(load_model(storage, warm_start, semantic_ids).state_dict())
    make_ranker = partial(
        TigerRanker,
        codes_NI=ids.codes_NI,
        rules=Rules(ids.eligible_N),
        decoding=DecodingSettings(beam_width=VALIDATION_BEAM_WIDTH, precision=settings.training.precision),
    )
    return TrainSpec(
        model,
        tiger_collate(model, ids.codes_NI),
        make_ranker,
        settings.model.max_history,
        vocabulary.id_length,
        vocabulary.num_user_buckets > 0,
    )


def train(
    run: Run,
    settings: Settings,
    sequences: Manifest,
    make_spec: Callable[..., TrainSpec],
    arguments: Mapping[str, Any],
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Train by section `training`, with one worker or several of Ray Train, from the last checkpoint of this run if any.

    Args:
        run: receives the files of the model and the curve.
        settings: of the night.
        sequences: manifest of the histories.
        make_spec: makes model, batches and ranker on each worker.
        arguments: keyword arguments of `make_spec`.

    Returns:
        The files, and the facts for the manifest.

    Raises:
        DataError: no user has two events that training may see.
        TigerError: as `run_workers`.
    """
    training, names = settings.training, (*MODEL_FILES, "curve.json")
    done = run.finished()
    if not all(name in done for name in names):
        histories = SequencesMetadata.of(sequences)
        if not histories.examples(training.holdout):
            raise DataError(
                f"no training example: none of {histories.users:,} users has two events that "
                f"training may see (training.holdout is {training.holdout!r})"
            )
        config = {
            "settings": settings,
            "sequences": sequences,
            "make_spec": make_spec,
            "arguments": dict(arguments),
        }
        run_workers(_train_worker, config, run=run, date=settings.date, settings=training)
        done = run.finished()
    curve = json.loads(run.read_file(done["curve.json"]))
    chosen = curve["chosen"]
    summary = f"{chosen['step']:,} steps of {training.global_batch_size}, loss {chosen['loss']:.3f}"
    if JUDGED_BY in chosen:
        summary += f", validation {JUDGED_BY} {chosen[JUDGED_BY]:.4f}, the best of {len(curve['points'])}"
    return [done[name] for name in names], {
        "summary": f"{summary}, holdout {training.holdout}",
        "holdout": training.holdout,
        **chosen,
    }


def _train_worker(config: dict[str, Any], worker: Worker) -> None:
    """Train on one worker."""
    run, settings, sequences = config["run"], config["settings"], config["sequences"]
    storage, training = run.storage, settings.training
    rank, world_size, device = worker.rank, worker.world_size, worker.device
    if device.type == "cpu":
        keep_freed_memory()
    spec: TrainSpec = config["make_spec"](**config["arguments"])
    model = spec.model.to(device)
    examples = open_examples(
        storage,
        sequences,
        holdout=training.holdout,
        max_history=spec.max_history,
        events_in_memory=training.events_in_memory,
        seed=settings.seed,
    )
    optimizer = make_optimizer(model, training)
    progress = Progress()
    # The name has the date: a night must not resume the training of another night with the same inputs.
    checkpoints = f"checkpoint-{settings.date}"
    # Rank 0 reads and broadcasts the checkpoint: all workers must resume from the same one, and an orphaned worker may
    # still be overwriting the file.
    state: list[Any] = [run.read_beside(checkpoints, STATE_FILE) if worker.is_first else None]
    if world_size > 1:
        dist.broadcast_object_list(state, device=device)
    if state[0] is not None:
        try:
            progress = load_state(state.pop(), model, optimizer)
        except ArtifactError as error:
            where = storage.uri(f"{run.artifact}/_runs/{run.run_id}/{checkpoints}")
            raise ArtifactError(f"{error}. To begin again, remove {where}/{STATE_FILE}") from None
    if worker.is_first:
        begins = f"resumes at step {progress.step:,}" if progress.step else "begins"
        log.info("training %s: %s examples, workers: %d", begins, f"{len(examples):,}", world_size)
    validate: Callable[[], Mapping[str, float]] = dict
    if training.validation_users and training.holdout != "none":
        validation = load_validation(
            storage,
            sequences,
            training.validation_users,
            spec.make_ranker,
            holdout=training.holdout,
            rank=rank,
            world_size=world_size,
        )
        validate = partial(validation.metrics, model, device)
    sinks: list[Any] = []
    if worker.is_first:
        sinks.append(TensorBoard(progress.step))
        if wants_mlflow():
            sections = {name: settings.resolved()[name] for name in ("model", "training")}
            sinks.append(MLflow(f"{settings.date} {run.run_id}", sections))
        if config["bar"] is not None:
            sinks.append(config["bar"])

    def save(progress: Progress) -> None:
        if not worker.is_first:
            return
        try:
            run.write_beside(checkpoints, {STATE_FILE: save_state(model, optimizer, progress)})
        except StorageError as error:
            before = progress.curve[:-1]
            again = (
                f"goes on from its checkpoint of step {before[-1]['step']:,}" if before else "begins again"
            )
            raise StorageError(
                f"training stopped, because its checkpoint of step {progress.step:,} could not be written. {error}. "
                f"The same command {again}"
            ) from None
        try:
            run.write_beside("tensorboard", sinks[0].files())
        except StorageError as error:  # a missing curve must not end the night
            log.warning("TensorBoard's file of step %d could not be written: %s", progress.step, error)

    fit(
        model
        if world_size == 1
        else DistributedDataParallel(model, [device] if device.index is not None else None),
        optimizer,
        examples.batches(
            training.global_batch_size,
            start=progress.step,
            rank=rank,
            world_size=world_size,
            batch_tokens=training.batch_tokens or BATCH_TOKENS[device.type],
            id_length=spec.id_length,
            user_token=spec.user_token,
        ),
        spec.collate,
        training,
        progress,
        TrainingLog(
            training.log_every_steps,
            training.num_steps,
            device,
            peak_operations_per_s(device, dtype_of(training.precision, device)),
            sinks,
        ),
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
        validate=validate,
        save=save,
    )
    for sink in sinks:
        sink.close()
    if worker.is_first:
        with torch.no_grad():
            for name, weight in progress.best.items():
                model.get_parameter(name).copy_(weight)
        for name, data in model.to_files().items():
            run.write_file(name, data)
        curve = {"points": progress.curve, "chosen": progress.chosen}
        run.write_file("curve.json", json.dumps(curve).encode())


STAGE = Stage(
    name="model",
    does="histories -> the trained model",
    inputs=("sequences", "semantic_ids"),
    sections=("model", "training"),
    check=_check,
    keyed_inputs=_keyed_inputs,
    draws=lambda settings: True,
    compute=_compute,
)
"""Publishes `model`.

Raises:
    DataError: no user has two events that training may see.
    ArtifactError: `training.warm_start` is on, and the last model is of another ID space or shape; or the
        histories have no moments for `training.holdout` time, or are of another registry.
"""
