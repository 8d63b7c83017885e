"""Held-out events and a ranker -> the artifact `evaluation`: whom the ranker would have served, and what it shows.

Each user shard is ranked whole, one file in, one file out. The lists stay in the artifact, so that two rankers can
be compared user by user at any time. Then a few tasks count the lists, and their counts add up.

B users of a shard, P places of a list, N items, C cells of a count by rank, G groups.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from tiger_ray import evaluation, schemas
from tiger_ray.beam_search import best_first, ranges
from tiger_ray.config import Section, Settings
from tiger_ray.errors import ArtifactError, DataError, TigerError
from tiger_ray.evaluation import Estimate, Exposure
from tiger_ray.hashing import mixed
from tiger_ray.histories import columns_for, cuts_of, require_holdout, user_shards
from tiger_ray.rankers import Popularity, Ranker
from tiger_ray.recommendations import Scorer
from tiger_ray.registry import load_semantic_ids, require_same_registry
from tiger_ray.sequences import seen_events
from tiger_ray.shards import map_shards, plain_errors
from tiger_ray.stage import Computed, StageResult, run_stage
from tiger_ray.storage import FileEntry, Manifest, Run, Storage
from tiger_ray.training import require_same_id_space

METRICS_FILE = "metrics.json"
"""All that is known of the lists of an evaluation."""

LENGTH_EDGES = (3, 5, 10, 20)
"""History lengths at which the next group of users begins."""

GATES = ("min_ratio_to_popularity", "max_drop")
"""Settings of section evaluation that change no list and no metric."""

NUM_TASKS = 8
"""Tasks at most that count lists; each adds up counts of all items."""


@dataclass(frozen=True)
class Contender:
    """A ranker that is to be evaluated, and how to make it in another process."""

    make: Callable[..., Ranker]
    """Called once per actor."""
    arguments: Mapping[str, Any]
    """Its keyword arguments; object references are resolved."""
    ranking: Mapping[str, Any]
    """How it ranks, in words and numbers: part of the protocol."""
    holdout: str
    """Which events its training did not see: section `training`."""
    inputs: Mapping[str, Manifest]
    """Artifacts it is made of, beside the histories."""
    sections: Mapping[str, Section]
    """Settings that decide its lists."""
    name: str = ""
    """Empty for the model of the night; a baseline's evaluation is an artifact of its own."""
    num_workers: int = 1
    num_cpus: float = 1
    use_gpu: bool = False
    reads_events: bool = False
    """`make` is also given `events_N`: the events of each item that training may see, (N,) int64."""

    @property
    def artifact(self) -> str:
        """Where its evaluation is published."""
        return f"evaluation-{self.name}" if self.name else "evaluation"


def evaluate(
    settings: Settings,
    storage: Storage,
    model: Manifest,
    semantic_ids: Manifest,
    sequences: Manifest,
    catalog: Manifest,
) -> StageResult:
    """Publish the artifact `evaluation` of the night's model.

    Raises:
        ArtifactError: the model was trained on other Semantic IDs.
        DataError: training saw all events, or no user is long enough.
    """
    require_same_id_space(model, semantic_ids)
    decoding = settings.decoding
    arguments = {
        "storage": storage,
        "settings": settings,
        "model": model,
        "semantic_ids": semantic_ids,
        "sequences": sequences,
    }
    contender = Contender(
        make=Scorer,
        arguments=arguments,
        ranking={
            "ranking": "full, item level, constrained beam search",
            "beam_width": decoding.beam_width,
            "items": "drawn" if decoding.sample else "most probable",
            "temperature": decoding.temperature,
            "model_history": model.settings["model"]["max_history"],
        },
        holdout=model.metadata["holdout"],
        inputs={"model": model},
        sections={"decoding": decoding},
        num_workers=decoding.num_workers,
        num_cpus=decoding.cpus_per_worker,
        use_gpu=decoding.use_gpu,
    )
    return evaluate_ranker(settings, storage, contender, semantic_ids, sequences, catalog)


def evaluate_ranker(
    settings: Settings,
    storage: Storage,
    contender: Contender,
    semantic_ids: Manifest,
    sequences: Manifest,
    catalog: Manifest,
) -> StageResult:
    """Publish the evaluation of any ranker: the same users, targets, masks and counts for all.

    Raises:
        DataError: training saw all events, or there is nobody to evaluate.
        ArtifactError: it was trained on other histories, or these have no moments for a time split, or are of
            another registry.
    """
    require_same_registry(sequences, semantic_ids)
    if contender.holdout == "none":
        raise DataError(
            "the model was trained on all events (training.holdout is 'none'), so there is nothing left to evaluate it on"
        )
    require_holdout(sequences, contender.holdout)
    model = contender.inputs.get("model")
    if model is not None and model.inputs["sequences"] != sequences.digest:
        raise ArtifactError(
            f"{model.artifact} {model.run_id} was trained on other histories than sequences {sequences.run_id}: it may "
            "have seen the events it would be asked for. Train a model on these (jobs/train_model.py)"
        )
    inputs = {
        **contender.inputs,
        "semantic_ids": semantic_ids,
        "sequences": sequences,
        "catalog": catalog,
    }
    return run_stage(
        storage,
        settings,
        contender.artifact,
        kind="evaluation",
        inputs=inputs,
        sections={**contender.sections, "evaluation": settings.evaluation},
        draws=True,
        source={"ranking": dict(contender.ranking), "holdout": contender.holdout},
        compute=lambda run: _compute(run, settings, contender, inputs),
    )


def load_metrics(storage: Storage, evaluated: Manifest) -> dict[str, Any]:
    """Everything that an evaluation found, as `_compute` wrote it."""
    metrics: dict[str, Any] = json.loads(storage.read_file(evaluated, METRICS_FILE))
    return metrics


def list_shards(evaluated: Manifest) -> list[FileEntry]:
    """The files of an evaluation that hold lists."""
    return [entry for entry in evaluated.files if entry.name.startswith("shard-")]


def paired_counts(
    storage: Storage, evaluated: Manifest, other: Manifest, num_places: int
) -> npt.NDArray[np.int64]:
    """Users by their ranks in two evaluations, (C, C) int64, as `evaluation.joint_rank_counts`.

    Raises:
        DataError: they are not of the same protocol, users and targets.
    """
    joint_CC = np.zeros((num_places + 1, num_places + 1), np.int64)
    for one, two in _shard_pairs(storage, evaluated, other):
        joint_CC += evaluation.joint_rank_counts(_ranks(one), _ranks(two), num_places)
    return joint_CC


def recall_of(storage: Storage, evaluated: Manifest, other: Manifest, k: int) -> float:
    """Mean over users of the share of the other evaluation's first k items that are among the first k of this one.

    Raises:
        DataError: they are not of the same protocol, users and targets.
    """
    share, users = 0.0, 0
    for one, two in _shard_pairs(storage, evaluated, other):
        item_BP, sought_BP = (schemas.matrix_of(lists.column("items"))[:, :k] for lists in (one, two))
        share += float(evaluation.share_found(item_BP, sought_BP).sum())
        users += len(item_BP)
    return share / max(users, 1)


def _shard_pairs(
    storage: Storage, evaluated: Manifest, other: Manifest
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Lists of two evaluations, a shard at a time, of the same users in the same order."""
    differ = [
        f"evaluation.{name} {value} and {other.settings['evaluation'][name]}"
        for name, value in evaluated.settings["evaluation"].items()
        if name not in GATES and other.settings["evaluation"][name] != value
    ]
    if differ:
        raise DataError(
            f"{evaluated.artifact} {evaluated.run_id} and {other.artifact} {other.run_id} cannot be compared: "
            f"{', '.join(differ)}; evaluate both with the same section evaluation"
        )
    theirs = {entry.name: entry for entry in list_shards(other)}
    for entry in list_shards(evaluated):
        one = storage.read_table(evaluated, entry)
        two = storage.read_table(other, theirs[entry.name]) if entry.name in theirs else None
        if two is None or any(
            not one.column(name).equals(two.column(name)) for name in ("user_hash", "target")
        ):
            raise DataError(
                f"{evaluated.artifact} {evaluated.run_id} and {other.artifact} {other.run_id} are not of the same users "
                f"and targets ({entry.name} differs); evaluate both with the same histories and section evaluation"
            )
        yield one, two


def _ranks(lists: pa.Table) -> npt.NDArray[np.int64]:
    return evaluation.ranks(schemas.matrix_of(lists.column("items")), lists.column("target").to_numpy())


def _compute(run: Run, settings: Settings, contender: Contender, inputs: Mapping[str, Manifest]) -> Computed:
    storage, sequences, semantic_ids = run.storage, inputs["sequences"], inputs["semantic_ids"]
    max_users = settings.evaluation.max_users
    share = 1.0
    if max_users is not None:
        candidates = sequences.metadata[f"{settings.evaluation.split}_users_{contender.holdout}"]
        share = min(1.0, max_users / max(candidates, 1))
    training_events = _training_events(
        storage, sequences, contender.holdout, int(semantic_ids.metadata["items"])
    )
    entries = map_shards(
        run,
        _RankShard,
        {
            "settings": settings,
            "inputs": dict(inputs),
            "contender": contender,
            "share": share,
            "training_events_N": training_events,
            "ranker_arguments": dict(contender.arguments),
        },
        shards=user_shards(sequences),
        num_workers=contender.num_workers,
        num_cpus=contender.num_cpus,
        use_gpu=contender.use_gpu,
    )
    users = sum(entry.rows for entry in entries)
    if users == 0:
        raise DataError(_nobody(settings, contender.holdout, sequences))
    found = _count(run, entries, settings, inputs, training_events)
    events = sequences.settings["events"]
    protocol = {
        "split": f"{contender.holdout.replace('_', '-')}, {settings.evaluation.split}",
        **contender.ranking,
        "history_masked": settings.evaluation.exclude_history,
        "max_history": settings.evaluation.max_history,
        "ties": events["tie"] or events["ties"],
        "unseen_targets": settings.evaluation.unseen_targets,
        "users": "all" if max_users is None else f"a hash sample of about {max_users:,}",
    }
    # what changes from night to night is not in the protocol, by which nights are held against each other
    facts = {"protocol": protocol, "periods": None, "training": _training(inputs.get("model"))}
    if contender.holdout == "time":
        first, second = (sequences.metadata[name] for name in ("validation_from", "test_from"))
        facts["periods"] = f"validation from {first}, test from {second}"
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


def _nobody(settings: Settings, holdout: str, sequences: Manifest) -> str:
    """Why there is nobody to evaluate, and what to change."""
    users = int(sequences.metadata["users"])
    candidates = sequences.metadata[f"{settings.evaluation.split}_users_{holdout}"]
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


def _training(model: Manifest | None) -> str | None:
    """What a trained ranker was trained with, in words."""
    if model is None:
        return None
    training = model.settings["training"]
    return (
        f"step {model.metadata['step']:,} of {training['num_steps']:,}, batches of {training['global_batch_size']}, "
        f"seed {model.settings['seed']}"
    )


class _RankShard:
    """Ranks items for the users of one file who have a held-out event."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        inputs: Mapping[str, Manifest],
        contender: Contender,
        share: float,
        training_events_N: npt.NDArray[np.int64],
        ranker_arguments: Mapping[str, Any],
    ) -> None:
        self._run, self._settings, self._sequences = run, settings.evaluation, inputs["sequences"]
        self._holdout, self._share, self._training_events_N = contender.holdout, share, training_events_N
        events = {"events_N": training_events_N} if contender.reads_events else {}
        self._ranker, self._artifact = contender.make(**ranker_arguments, **events), contender.artifact
        eligible_N = load_semantic_ids(run.storage, inputs["semantic_ids"]).eligible_N
        self._popularity = Popularity(training_events_N, eligible_N)

    def __call__(self, shard: FileEntry) -> FileEntry:
        settings = self._settings
        users = self._run.storage.read_table(self._sequences, shard.name).combine_chunks()
        history = users.column("history").combine_chunks()
        first_B = history.offsets.to_numpy()[:-1].astype(np.int64)
        item_index = history.values.to_numpy()
        cuts = cuts_of(users, self._holdout)
        length_B = cuts.test_at_B if settings.split == "test" else cuts.validation_at_B
        user_hash_B = users.column("user_hash").to_numpy()
        # mixed, because shards and user buckets follow from the hash itself
        sampled_B = (mixed(user_hash_B) >> np.uint64(32)) < np.uint64(int(self._share * 2**32))
        kept_B = (length_B > 0) & sampled_B
        if settings.unseen_targets == "drop":
            kept_B[kept_B] = self._training_events_N[item_index[(first_B + length_B)[kept_B]]] > 0
        first_B, length_B = first_B[kept_B], length_B[kept_B]
        user_hash_B = user_hash_B[kept_B]
        target_B = item_index[first_B + length_B].astype(np.int64)
        item_E = item_index[ranges(first_B, length_B)]
        repeated_B = evaluation.targets_in_history(item_E, length_B, target_B)
        if settings.max_history is not None:
            read_B = np.minimum(length_B, settings.max_history)
            item_E = item_index[ranges(first_B + length_B - read_B, read_B)]
            length_B = read_B
        top = max(settings.ks)
        found_BP = popular_BP = np.zeros((0, top), np.int64)
        if len(target_B):
            found_BP, popular_BP = (
                best_first(
                    *ranker.recommend(
                        item_E, length_B, user_hash_B, top, exclude_history=settings.exclude_history
                    )
                )[0]
                for ranker in (self._ranker, self._popularity)
            )
        if settings.exclude_history:
            self._require_masked(found_BP, item_E, length_B)
        popular_rank_B = np.minimum(evaluation.ranks(popular_BP, target_B), top + 1)
        columns = [user_hash_B, target_B, length_B, repeated_B, popular_rank_B]
        arrays = [pa.array(column) for column in columns]
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(found_BP.ravel().astype(np.int32)), top))
        schema = schemas.ranked_lists(top)
        return self._run.write_table(shard.name, pa.table(arrays, names=schema.names).cast(schema))

    def _require_masked(
        self,
        found_BP: npt.NDArray[np.int64],
        item_E: npt.NDArray[np.int32],
        length_B: npt.NDArray[np.int64],
    ) -> None:
        """Refuse lists that show a history which they were told to mask: they would not be what the protocol says."""
        row_B = np.arange(len(length_B), dtype=np.int64) << 32
        shown_BP = np.isin(found_BP + row_B[:, None], item_E + np.repeat(row_B, length_B))
        if shown_BP.any():
            raise TigerError(
                f"{self._artifact}: {shown_BP.sum():,} items of their histories came out for {shown_BP.any(1).sum():,} of "
                f"{len(length_B):,} users, although evaluation.exclude_history is set; the ranker ignores it"
            )


@dataclass(frozen=True)
class _Tally:
    """What the lists of some users say; those of disjoint users add up."""

    count_C: npt.NDArray[np.int64]
    joint_CC: npt.NDArray[np.int64]
    """By the rank of the ranker and that of popularity."""
    by_length_GC: npt.NDArray[np.int64]
    by_popularity_GC: npt.NDArray[np.int64]
    repeated_targets: int
    exposure: Exposure

    def __add__(self, other: _Tally) -> _Tally:
        return _Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def _tally(
    lists: pa.Table,
    eligible_N: npt.NDArray[np.bool_],
    popularity_group_N: npt.NDArray[np.int8],
    category_N: npt.NDArray[np.int32],
) -> _Tally:
    item_BP = schemas.matrix_of(lists.column("items"))
    num_places = item_BP.shape[1]
    target_B = lists.column("target").to_numpy()
    rank_B = evaluation.ranks(item_BP, target_B)
    length_B = np.digitize(lists.column("history_length").to_numpy(), LENGTH_EDGES)
    return _Tally(
        evaluation.rank_counts(rank_B, num_places),
        evaluation.joint_rank_counts(rank_B, lists.column("popularity_rank").to_numpy(), num_places),
        evaluation.grouped_rank_counts(rank_B, num_places, length_B, len(LENGTH_EDGES) + 1),
        evaluation.grouped_rank_counts(rank_B, num_places, popularity_group_N[target_B], evaluation.COLD + 1),
        int(lists.column("target_in_history").to_numpy().sum()),
        Exposure.of(item_BP, eligible_N, category_N),
    )


def _training_events(storage: Storage, sequences: Manifest, holdout: str, num_items: int) -> ray.ObjectRef:
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
    # Those who wait for it are actors, which would hold the last CPUs that it needs.
    ray.wait([events], fetch_local=False)
    return events


def _by_parts(shards: Sequence[FileEntry], count: Callable[..., Any], *arguments: Any) -> list[ray.ObjectRef]:
    """References to what a few tasks find in all shards, each in many."""
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
    ) -> _Tally:
        eligible_N = load_semantic_ids(storage, inputs["semantic_ids"]).eligible_N
        groups_N = evaluation.popularity_groups(events_N)
        tallies = (_tally(run.read_table(entry), eligible_N, groups_N, category_N) for entry in part)
        return sum_of(tallies)

    def total(
        category_N: npt.NDArray[np.int32], events_N: npt.NDArray[np.int64], *parts: _Tally
    ) -> dict[str, Any]:
        eligible_N = load_semantic_ids(storage, inputs["semantic_ids"]).eligible_N
        found = _found(sum_of(parts), settings)
        found["shown"] = sum_of(parts).exposure.metrics(eligible_N, events_N)
        if (category_N < 0).all():
            del found["shown"]["entropy"]  # of nothing known
        return found

    category = ray.remote(categories).remote()
    parts = _by_parts(entries, count, category, training_events)
    with plain_errors():
        found: dict[str, Any] = ray.get(ray.remote(total).remote(category, training_events, *parts))
    return found


def sum_of(parts: Iterable[Any]) -> Any:
    """Sum of what adds up, of one part at least; two of them are in memory at a time."""
    return functools.reduce(operator.add, parts)


def _found(tally: _Tally, settings: Settings) -> dict[str, Any]:
    ks, seed = settings.evaluation.ks, settings.seed

    def with_intervals(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in estimates.items()}

    def by_group(name: str, labels: Sequence[str], count_GC: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        return [
            {name: label, **evaluation.metrics(count_C, ks)}
            for label, count_C in zip(labels, count_GC, strict=True)
        ]

    edges = (1, *LENGTH_EDGES)
    lengths = [f"{low} to {high - 1}" for low, high in zip(edges, edges[1:], strict=False)]
    tenths = [f"tenth {number} of the warm items" for number in range(1, evaluation.COLD + 1)]
    warm_C = tally.by_popularity_GC[: evaluation.COLD].sum(axis=0)
    return {
        "users": int(tally.count_C.sum()),
        "model": with_intervals(evaluation.estimates(tally.count_C, ks, seed=seed)),
        "popularity": with_intervals(evaluation.estimates(tally.joint_CC.sum(axis=0), ks, seed=seed)),
        "model_minus_popularity": with_intervals(evaluation.differences(tally.joint_CC, ks, seed=seed)),
        "by_history_length": by_group("items", [*lengths, f"{edges[-1]} and more"], tally.by_length_GC),
        "by_target_popularity": by_group("target", [*tenths, "cold"], tally.by_popularity_GC),
        "by_target_warmth": by_group(
            "target", ["warm", "cold"], np.stack([warm_C, tally.by_popularity_GC[evaluation.COLD]])
        ),
        "targets_in_history": tally.repeated_targets,
    }
