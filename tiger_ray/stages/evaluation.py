"""Held-out events and a ranker -> the artifact `evaluation`: how well the ranker finds the events, and what it shows.

Workers rank one user shard after the other, and write one file per shard. The lists stay in the artifact, so that two
rankers can be compared user by user at any time. Then a few tasks count the lists, and the counts are added.

B users of a shard, P places of a list, N items, C cells of a count by rank, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.lineage import (
    require_holdout,
    require_same_histories,
    require_same_id_space,
    require_same_registry,
)
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import (
    ModelMetadata,
    SemanticIdsMetadata,
    SequencesMetadata,
    TrainedMetadata,
)
from tiger_ray.artifacts.objects import Objects
from tiger_ray.artifacts.run import Run
from tiger_ray.cluster.shards import map_shards, plain_errors
from tiger_ray.core.arrays import ranges
from tiger_ray.core.hashing import splitmix64
from tiger_ray.data.histories import columns_for, cuts_of, seen_events, user_shards
from tiger_ray.errors import DataError, TigerError
from tiger_ray.evaluation import metrics
from tiger_ray.evaluation.tally import Tally, metrics_of, sum_of, tally_of
from tiger_ray.published.evaluation import METRICS_FILE
from tiger_ray.published.ranker import open_tiger
from tiger_ray.published.semantic_ids import load_semantic_ids
from tiger_ray.rankers.base import Found, Histories, Ranker, Rules
from tiger_ray.rankers.popularity import Popularity
from tiger_ray.settings.base import Section
from tiger_ray.settings.settings import Settings
from tiger_ray.stages.stage import Computed, Context, Stage

INPUTS = ("semantic_ids", "sequences", "catalog")
"""Artifacts that the evaluation of any ranker reads."""

NUM_TASKS = 8
"""Most tasks that count lists; each task holds counts of all items."""


@dataclass(frozen=True)
class RankerSpec:
    """A ranker to evaluate, and how another process makes the ranker."""

    make: Callable[..., Ranker]
    """Makes the ranker, once per actor, from `arguments` and `rules`."""
    arguments: Mapping[str, Any]
    """Keyword arguments of `make`; object references are resolved."""
    ranking: Mapping[str, Any]
    """How the ranker ranks, in words and numbers: part of the protocol."""
    holdout: str
    """Which events the training of the ranker did not see: section `training`."""
    inputs: Mapping[str, Manifest]
    """Artifacts that the ranker is made of, besides the histories."""
    sections: Mapping[str, Section]
    """Settings that decide the lists."""
    name: str = ""
    """Empty for the model of the night; a baseline's evaluation is an artifact of its own."""
    num_workers: int = 1
    num_cpus: float = 1
    use_gpu: bool = False
    reads_events: bool = False
    """True if `make` also needs `events_N`: the events of each item that training may see, (N,) int64."""

    @property
    def artifact(self) -> str:
        """Name of the artifact that holds the evaluation."""
        return f"evaluation-{self.name}" if self.name else "evaluation"


def tiger_spec(context: Context) -> RankerSpec:
    """The model of the night, which ranks by beam search with section `decoding`."""
    settings, model = context.settings, context.inputs["model"]
    decoding = settings.decoding
    return RankerSpec(
        make=open_tiger,
        arguments={
            "storage": context.storage,
            "settings": settings,
            **{name: context.inputs[name] for name in ("model", "semantic_ids")},
        },
        ranking={
            "ranking": "full, item level, constrained beam search",
            "beam_width": decoding.beam_width,
            "items": "drawn" if decoding.sample else "most probable",
            "temperature": decoding.temperature,
            "model_history": model.setting("model", "max_history"),
        },
        holdout=ModelMetadata.of(model).holdout,
        inputs={"model": model},
        sections={"decoding": decoding},
        num_workers=decoding.num_workers,
        num_cpus=decoding.cpus_per_worker,
        use_gpu=decoding.use_gpu,
    )


def _check(context: Context, spec: RankerSpec) -> None:
    sequences, semantic_ids = context.inputs["sequences"], context.inputs["semantic_ids"]
    require_same_registry(sequences, semantic_ids)
    if spec.holdout == "none":
        raise DataError(
            "the model was trained on all events (training.holdout is 'none'), so no event is left to evaluate the model on"
        )
    require_holdout(sequences, spec.holdout)
    model = spec.inputs.get("model")
    if model is not None:
        require_same_histories(model, sequences)


def _keyed_inputs(context: Context, spec: RankerSpec) -> dict[str, Manifest]:
    return {**spec.inputs, **{name: context.inputs[name] for name in INPUTS}}


def _source(context: Context, spec: RankerSpec) -> dict[str, Any]:
    return {"ranking": dict(spec.ranking), "holdout": spec.holdout}


def evaluation_stage(spec: RankerSpec) -> Stage:
    """The stage that evaluates any ranker: the same users, targets, masks and counts for all.

    Raises:
        DataError: training saw all events, or there is no user to evaluate.
        ArtifactError: the ranker was trained on other histories, or the histories have no moments for a time
            split, or are of another registry.
    """
    return replace(
        STAGE,
        name=spec.artifact,
        does=f"recall and NDCG of {spec.name}, beside popularity",
        inputs=INPUTS,
        sections=(*spec.sections, "evaluation"),
        check=partial(_check, spec=spec),
        keyed_inputs=partial(_keyed_inputs, spec=spec),
        source=partial(_source, spec=spec),
        compute=lambda run, context: _compute(run, context, spec),
    )


def _compute(run: Run, context: Context, spec: RankerSpec) -> Computed:
    settings, storage, inputs = context.settings, run.storage, _keyed_inputs(context, spec)
    sequences, semantic_ids = inputs["sequences"], inputs["semantic_ids"]
    max_users, histories = settings.evaluation.max_users, SequencesMetadata.of(sequences)
    share = 1.0
    if max_users is not None:
        candidates = histories.held_out_users(spec.holdout, settings.evaluation.split)
        share = min(1.0, max_users / max(candidates, 1))
    training_events = _training_events(
        storage, sequences, spec.holdout, SemanticIdsMetadata.of(semantic_ids).items
    )
    entries = map_shards(
        run,
        _RankShard,
        {
            "settings": settings,
            "inputs": dict(inputs),
            "spec": spec,
            "share": share,
            "training_events_N": training_events,
            "ranker_arguments": dict(spec.arguments),
        },
        shards=user_shards(sequences),
        num_workers=spec.num_workers,
        num_cpus=spec.num_cpus,
        use_gpu=spec.use_gpu,
    )
    users = sum(entry.rows for entry in entries)
    if users == 0:
        raise DataError(_explain_no_users(settings, spec.holdout, sequences))
    found = _count(run, entries, settings, inputs, training_events)
    events = sequences.setting("events")
    protocol = {
        "split": f"{spec.holdout.replace('_', '-')}, {settings.evaluation.split}",
        **spec.ranking,
        "history_masked": settings.evaluation.exclude_history,
        "max_history": settings.evaluation.max_history,
        "ties": events["tie"] or events["ties"],
        "unseen_targets": settings.evaluation.unseen_targets,
        "users": "all" if max_users is None else f"a hash sample of about {max_users:,}",
    }
    # Keep night-specific facts out of `protocol`: the quality gate compares only nights with equal protocols.
    held_out, tied = (
        of(spec.holdout, settings.evaluation.split) for of in (histories.held_out_users, histories.tied_users)
    )
    facts = {
        "protocol": protocol,
        "periods": None,
        "training": _training_words(inputs.get("model")),
        "tied_share": tied / held_out,
    }
    if spec.holdout == "time":
        facts["periods"] = f"validation from {histories.validation_from}, test from {histories.test_from}"
    metrics = run.write_file(METRICS_FILE, json.dumps({**facts, **found}, indent=2).encode())
    values = {
        who: {"users": users, **{name: each["value"] for name, each in found[who].items()}}
        for who in ("model", "popularity")
    }
    top = max(settings.evaluation.ks)
    names = (f"recall@{top}", f"ndcg@{top}")
    summary = ", ".join(f"{name} {values['model'][name]:.4f}" for name in names)
    popular = ", ".join(f"{values['popularity'][name]:.4f}" for name in names)
    return [*entries, metrics], {
        "summary": f"{users:,} users, {summary} (popularity {popular})",
        **values,
        **facts,
    }


def _explain_no_users(settings: Settings, holdout: str, sequences: Manifest) -> str:
    """Why no user can be evaluated, and what to change."""
    histories = SequencesMetadata.of(sequences)
    users, candidates = histories.users, histories.held_out_users(holdout, settings.evaluation.split)
    if not candidates:
        return (
            f"none of {users:,} users has the events that training.holdout {holdout!r} needs to hold one out; nothing "
            "can be evaluated. Set training.holdout to 'none' to train and recommend without evaluation"
        )
    chosen = []
    if settings.evaluation.max_users is not None:
        chosen.append(f"evaluation.max_users {settings.evaluation.max_users}")
    if settings.evaluation.unseen_targets == "drop":
        chosen.append("evaluation.unseen_targets 'drop'")
    return (
        f"none of {candidates:,} users with a {settings.evaluation.split} event is left to evaluate after "
        f"{' and '.join(chosen)}; change that"
    )


def _training_words(model: Manifest | None) -> str | None:
    """The training of a ranker in words; None for a ranker without training."""
    if model is None:
        return None
    training = model.setting("training")
    return (
        f"step {TrainedMetadata.of(model).step:,} of {training['num_steps']:,}, batches of {training['global_batch_size']}, "
        f"seed {model.setting('seed')}"
    )


class _RankShard:
    """Ranks items for the users of one file who have a held-out event."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        inputs: Mapping[str, Manifest],
        spec: RankerSpec,
        share: float,
        training_events_N: npt.NDArray[np.int64],
        ranker_arguments: Mapping[str, Any],
    ) -> None:
        self._run, self._settings, self._sequences = run, settings.evaluation, inputs["sequences"]
        self._holdout, self._share, self._training_events_N = spec.holdout, share, training_events_N
        events = {"events_N": training_events_N} if spec.reads_events else {}
        eligible_N = load_semantic_ids(run.storage, inputs["semantic_ids"]).eligible_N
        rules = Rules(eligible_N, settings.evaluation.exclude_history)
        self._ranker, self._artifact = spec.make(**ranker_arguments, **events, rules=rules), spec.artifact
        self._popularity = Popularity(training_events_N, rules)

    def __call__(self, shard: FileEntry) -> FileEntry:
        settings = self._settings
        users = self._run.storage.read_table(self._sequences, shard.name).combine_chunks()
        history = users.column("history").combine_chunks()
        first_B = history.offsets.to_numpy()[:-1].astype(np.int64)
        item_index = history.values.to_numpy()
        cuts = cuts_of(users, self._holdout)
        length_B = cuts.test_at_B if settings.split == "test" else cuts.validation_at_B
        user_hash_B = users.column("user_hash").to_numpy()
        # Mix the hash once more: the hash itself already decides shards and user buckets.
        sampled_B = (splitmix64(user_hash_B) >> np.uint64(32)) < np.uint64(int(self._share * 2**32))
        kept_B = (length_B > 0) & sampled_B
        if settings.unseen_targets == "drop":
            kept_B[kept_B] = self._training_events_N[item_index[(first_B + length_B)[kept_B]]] > 0
        first_B, length_B = first_B[kept_B], length_B[kept_B]
        target_B = item_index[first_B + length_B].astype(np.int64)
        histories = Histories(item_index[ranges(first_B, length_B)], length_B, user_hash_B[kept_B])
        repeated_B = metrics.targets_in_history(histories.item_index_E, length_B, target_B)
        if settings.max_history is not None:
            histories = histories.newest(settings.max_history)
        top = max(settings.ks)
        found = self._ranker.recommend(histories, top).best_first()
        if settings.exclude_history:
            self._require_masked(found, histories)
        popular = self._popularity.recommend(histories, top)
        popular_rank_B = np.minimum(metrics.ranks(popular.item_BK, target_B), top + 1)
        columns = [histories.user_hash_B, target_B, histories.lengths_B, repeated_B, popular_rank_B]
        arrays = [pa.array(column) for column in columns]
        items = pa.array(found.item_BK.ravel().astype(np.int32))
        arrays.append(pa.FixedSizeListArray.from_arrays(items, top))
        schema = schemas.ranked_lists(top)
        return self._run.write_table(shard.name, pa.table(arrays, names=schema.names).cast(schema))

    def _require_masked(self, found: Found, histories: Histories) -> None:
        """Refuse lists with items of the history, if the protocol says that the history is masked."""
        length_B = histories.lengths_B
        row_B = np.arange(len(histories), dtype=np.int64) << 32
        shown_BP = np.isin(
            found.item_BK + row_B[:, None], histories.item_index_E + np.repeat(row_B, length_B)
        )
        if shown_BP.any():
            raise TigerError(
                f"{self._artifact}: {shown_BP.sum():,} items of their histories came out for {shown_BP.any(1).sum():,} of "
                f"{len(length_B):,} users, although evaluation.exclude_history is set; the ranker ignores it"
            )


def _training_events(storage: Objects, sequences: Manifest, holdout: str, num_items: int) -> ray.ObjectRef:
    """Reference to the events of each item that training may see, (N,) int64."""

    columns = columns_for(holdout)

    def count(part: Sequence[FileEntry]) -> npt.NDArray[np.int64]:
        tables = (storage.read_table(sequences, entry, columns=columns) for entry in part)
        counted: npt.NDArray[np.int64] = sum_of(
            seen_events(users, num_items, [holdout])[0] for users in tables
        )
        return counted

    def total(*parts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        events_N: npt.NDArray[np.int64] = np.sum(parts, axis=0)
        return events_N

    events = ray.remote(total).remote(*_by_parts(user_shards(sequences), count))
    # Wait here. The actors that need this result would otherwise hold the CPUs that compute the result: a deadlock.
    ray.wait([events], fetch_local=False)
    return events


def _by_parts(shards: Sequence[FileEntry], count: Callable[..., Any], *arguments: Any) -> list[ray.ObjectRef]:
    """Call `count` in a few tasks, each with a part of the shards; returns one reference per task."""
    num_tasks = min(NUM_TASKS, len(shards))
    task = ray.remote(count)
    return [task.remote(list(shards[number::num_tasks]), *arguments) for number in range(num_tasks)]


def _count(
    run: Run,
    entries: Sequence[FileEntry],
    settings: Settings,
    inputs: Mapping[str, Manifest],
    training_events: ray.ObjectRef,
) -> dict[str, Any]:
    """Metrics of the lists in these files, ready for JSON."""
    storage = run.storage

    def categories() -> npt.NDArray[np.int32]:
        """Category of each item by number, (N,); -1 for unknown."""
        ids = load_semantic_ids(storage, inputs["semantic_ids"])
        catalog = inputs["catalog"]
        items = pa.concat_tables(
            [storage.read_table(catalog, entry, columns=["item_id", "category"]) for entry in catalog.files]
        )
        code = items.column("category").combine_chunks().dictionary_encode().indices.fill_null(-1)
        category_N = np.full(len(ids), -1, np.int32)
        index = ids.lookup(items.column("item_id"))
        category_N[index[index >= 0]] = code.to_numpy()[index >= 0]
        return category_N

    def count(
        part: Sequence[FileEntry], category_N: npt.NDArray[np.int32], events_N: npt.NDArray[np.int64]
    ) -> Tally:
        eligible_N = load_semantic_ids(storage, inputs["semantic_ids"]).eligible_N
        groups_N = metrics.popularity_groups(events_N)
        tallies = (tally_of(run.read_table(entry), eligible_N, groups_N, category_N) for entry in part)
        return sum_of(tallies)

    def total(
        category_N: npt.NDArray[np.int32], events_N: npt.NDArray[np.int64], *parts: Tally
    ) -> dict[str, Any]:
        eligible_N = load_semantic_ids(storage, inputs["semantic_ids"]).eligible_N
        found = metrics_of(sum_of(parts), settings)
        found["shown"] = sum_of(parts).exposure.metrics(eligible_N, events_N)
        if (category_N < 0).all():
            del found["shown"]["entropy"]  # not defined without categories
        return found

    category = ray.remote(categories).remote()
    parts = _by_parts(entries, count, category, training_events)
    with plain_errors():
        found: dict[str, Any] = ray.get(ray.remote(total).remote(category, training_events, *parts))
    return found


def _check_model(context: Context) -> None:
    require_same_id_space(context.inputs["model"], context.inputs["semantic_ids"])
    _check(context, tiger_spec(context))


STAGE = Stage(
    name="evaluation",
    does="recall and NDCG of the model, beside popularity",
    inputs=("model", *INPUTS),
    sections=("decoding", "evaluation"),
    left_out=lambda settings: (
        "training.holdout is 'none': no event is held out" if settings.training.holdout == "none" else None
    ),
    check=_check_model,
    keyed_inputs=lambda context: _keyed_inputs(context, tiger_spec(context)),
    source=lambda context: _source(context, tiger_spec(context)),
    draws=lambda settings: True,
    compute=lambda run, context: _compute(run, context, tiger_spec(context)),
    format_version=5,
)
"""Publishes `evaluation` of the night's model.

Raises:
    ArtifactError: the model was trained on other Semantic IDs.
    DataError: training saw all events, or no user has an event to hold out.
"""
