"""`tiger-ray show`: a user, an item or a night, from what is published; reads few files and starts no Ray.

N items, I id_length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.artifacts.files import shard_name
from tiger_ray.artifacts.inventory import holdings
from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.metadata import (
    MODELS,
    RecommendationsMetadata,
    SemanticIdsMetadata,
    SequencesMetadata,
)
from tiger_ray.artifacts.record import Record, read_record
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cli.job import NO_DATE, open_storage
from tiger_ray.cli.tables import readable_bytes, show_table
from tiger_ray.core.hashing import shard_of, stable_hash
from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.published.semantic_ids import load_item_ids, load_semantic_ids
from tiger_ray.report.tables import metrics_table, titles_of

NUM_EVENTS = 20
"""Most recent events of a user that are shown."""

NUM_NEIGHBOURS = 5
"""Items shown for each number of shared codes."""


@dataclass(frozen=True)
class _Night:
    """The store, and the date of the night to show."""

    storage: Storage
    date: str

    def manifest(self, artifact: str) -> Manifest:
        """The published manifest of an artifact; raises ArtifactError if there is none."""
        return self.storage.resolve(artifact, self.date)

    def published(self, artifact: str) -> Manifest | None:
        """The published manifest of an artifact, or None."""
        return self.storage.published(artifact, self.date)


def _open(words: Sequence[str], date: str | None = None) -> _Night:
    """The night of `--date`, else the latest recommendations, else the latest histories."""
    settings, storage = open_storage(words)
    wanted = date or (None if settings.date == NO_DATE else settings.date)
    if wanted is None:
        wanted = storage.latest_date("recommendations") or storage.resolve("sequences").date
    return _Night(storage, wanted)


# A user


def show_user(words: Sequence[str], user: str) -> None:
    """Print a user's history with titles, the recommended list, and what was left out and why.

    Args:
        words: settings.
        user: id of the user, as in the events.

    Raises:
        DataError: the night has no such user.
        ArtifactError: the night has not published its histories.
    """
    night = _open(words)
    sequences, semantic_ids = night.manifest("sequences"), night.manifest("semantic_ids")
    recommendations, catalog = night.published("recommendations"), night.published("catalog")
    row, shard = _user_row(night, sequences, user)
    item_ids = load_item_ids(night.storage, semantic_ids)
    history = [item_ids[index].as_py() for index in row["history"]]  # `take` would copy all ids
    eligible = night.storage.read_table(semantic_ids, "eligible.parquet").column("eligible")
    unavailable = {
        item for item, index in zip(history, row["history"], strict=True) if not eligible[index].as_py()
    }
    slots = [] if recommendations is None else _list_of(night.storage, recommendations, shard, row["user_id"])
    shown = history[-NUM_EVENTS:]
    wanted = {*shown, *(slot["item_id"] for slot in slots)}
    titles = titles_of(night.storage, catalog, wanted) if catalog is not None else {}

    print(f"user {user}, night {night.date}\n")
    first = len(history) - len(shown)
    show_table(
        f"history, oldest first ({len(history):,} events{f', the last {len(shown)} shown' if first else ''})",
        ("event", "item", "title", "note"),
        [
            (
                first + place + 1,
                item,
                titles.get(item, ""),
                "not recommendable" if item in unavailable else "",
            )
            for place, item in enumerate(shown)
        ],
        right=("event",),
    )
    print()
    show_table(
        "recommended",
        ("rank", "item", "title", "score", "source", "Semantic ID"),
        [
            (
                slot["rank"],
                slot["item_id"],
                titles.get(slot["item_id"], ""),
                f"{slot['score']:.4f}",
                slot["source"],
                _code(slot["semantic_id"]),
            )
            for slot in slots
        ],
        right=("rank", "score"),
    )
    print()
    for note in _notes(night, sequences, recommendations, history, unavailable, slots):
        print(f"- {note}")


def _user_row(night: _Night, sequences: Manifest, user: str) -> tuple[dict[str, Any], str]:
    """user_id and history (item_index, oldest first) of one user, and the name of the one shard that was read."""
    known = SequencesMetadata.of(sequences)
    key = _id_of(user, known.user_id_type, "user")
    shard = shard_of(stable_hash(pa.array([key])), sequences.setting("sequences", "num_shards"))
    name = shard_name(int(shard[0]))
    if name in {entry.name for entry in sequences.files}:
        users = night.storage.read_table(sequences, name, columns=["user_id", "history"])
        found = users.filter(_equals(users.column("user_id"), key)).to_pylist()
        if found:
            return found[0], name
    raise DataError(
        f"no user {user!r} is among the {known.users:,} users of {night.date}: no event of a known "
        "kind names the id. Check the spelling, or the column events.user_id"
    )


def _list_of(storage: Storage, recommendations: Manifest, shard: str, user: Any) -> list[dict[str, Any]]:
    """One dictionary for each recommended item, best first."""
    rows = storage.read_table(recommendations, shard)
    own = rows.filter(_equals(rows.column("user_id"), user))
    if RecommendationsMetadata.of(recommendations).form == "long":
        return own.sort_by("rank").to_pylist()
    names = {"item_id": "item_ids", "score": "scores", "semantic_id": "semantic_ids", "source": "sources"}
    return [
        {"rank": place + 1, **{name: row[column][place] for name, column in names.items()}}
        for row in own.to_pylist()
        for place in range(len(row["item_ids"]))
    ]


def _notes(
    night: _Night,
    sequences: Manifest,
    recommendations: Manifest | None,
    history: Sequence[Any],
    unavailable: set[Any],
    slots: Sequence[dict[str, Any]],
) -> list[str]:
    """Notes on what was left out of the history or of the list, and why."""
    notes = []
    if not history:
        notes.append("the history is empty: every event of this user names an item that the catalog lacks")
    max_events = sequences.setting("sequences", "max_events")
    if len(history) == max_events:
        notes.append(
            f"older events may have been left out: sequences.max_events keeps {max_events:,} per user"
        )
    if unavailable:
        notes.append(
            f"{len(unavailable):,} items of the history may not be recommended tonight: catalog.available is false, or "
            "tonight's catalog lacks the item"
        )
    if recommendations is None:
        return [*notes, f"no recommendations are published for {night.date}"]
    read = recommendations.setting("model", "max_history")
    if len(history) > read:
        notes.append(f"the model read the last {read} of {len(history):,} events (model.max_history)")
    if recommendations.setting("recommendations", "exclude_history"):
        notes.append("items of the history were left out (recommendations.exclude_history)")
    if slots and slots[0]["source"] == "fallback":
        notes.append("the model knows nothing of this user, so the list holds the most popular items")
    made = RecommendationsMetadata.of(recommendations)
    if len(slots) < made.top_k:
        notes.append(
            f"{len(slots)} of {made.top_k} items were found: {made.eligible_items:,} items may be "
            "recommended tonight, and the beam search kept no others (decoding.beam_width)"
        )
    if recommendations.input("sequences") != sequences.digest:
        notes.append(f"the list was made from other histories than those published for {night.date} now")
    return notes


# An item


def show_item(words: Sequence[str], item: str) -> None:
    """Print an item's Semantic ID, the items that share codes with it, and how often it is recommended.

    Args:
        words: settings.
        item: id of the item, as in the catalog.

    Raises:
        DataError: no such item was ever registered.
        ArtifactError: the night has not published its Semantic IDs.
    """
    night = _open(words)
    semantic_ids, catalog = night.manifest("semantic_ids"), night.published("catalog")
    recommendations = night.published("recommendations")
    ids = load_semantic_ids(night.storage, semantic_ids)
    key = _id_of(item, SemanticIdsMetadata.of(semantic_ids).item_id_type, "item")
    index = int(ids.lookup(pa.array([key], ids.item_id.type))[0])
    if index < 0:
        raise DataError(
            f"no item {item!r} is among the {len(ids):,} items that were ever registered. Check the spelling, or the "
            "column catalog.item_id"
        )
    code_I = ids.codes_NI[index]
    shares = np.cumprod(ids.codes_NI == code_I, axis=1).sum(axis=1)  # (N,) codes shared from the first on
    shares[index] = -1
    groups = {
        depth: np.flatnonzero(shares == depth)[:NUM_NEIGHBOURS] for depth in range(ids.id_length - 1, 0, -1)
    }
    neighbours = {depth: ids.item_ids(some).to_pylist() for depth, some in groups.items()}
    wanted = {key, *(each for some in neighbours.values() for each in some)}
    titles = titles_of(night.storage, catalog, wanted) if catalog is not None else {}
    available = ids.eligible[index].as_py()
    facts = [
        ("title", titles.get(key, "")),
        ("Semantic ID", _code(code_I.tolist())),
        ("registered", f"as number {index:,} of {len(ids):,}"),
        (
            "recommendable",
            "yes" if available else "no: catalog.available is false, or tonight's catalog lacks the item",
        ),
    ]
    if recommendations is not None:
        users, firsts = _times_recommended(night.storage, recommendations, key)
        facts.append(
            (
                "recommended",
                f"to {users:,} of {RecommendationsMetadata.of(recommendations).users:,} users, first to {firsts:,}",
            )
        )
    print(f"item {item}, night {night.date}\n")
    show_table("", ("", ""), facts)
    print()
    show_table(
        f"neighbours by shared codes, at most {NUM_NEIGHBOURS} each",
        ("shared", "items", "item", "Semantic ID", "title"),
        [
            (
                depth,
                f"{int((shares >= depth).sum()):,}",
                each,
                _code(ids.codes_NI[other].tolist()),
                titles.get(each, ""),
            )
            for depth, some in groups.items()
            for other, each in zip(some, neighbours[depth], strict=True)
        ],
        right=("shared", "items"),
    )


def _times_recommended(storage: Storage, recommendations: Manifest, item: Any) -> tuple[int, int]:
    """Users whose list holds the item, and users whose list begins with it; one file is in memory at a time."""
    users = firsts = 0
    for entry in recommendations.files:
        if RecommendationsMetadata.of(recommendations).form == "long":
            rows = storage.read_table(recommendations, entry, columns=["item_id", "rank"])
            rank = rows.filter(_equals(rows.column("item_id"), item)).column("rank").to_numpy()
        else:
            rows = storage.read_table(recommendations, entry, columns=["item_ids"])
            lists = [chunk for chunk in rows.column("item_ids").chunks if len(chunk)]
            rank = np.concatenate([np.zeros(0, np.int64), *(_ranks_in(chunk, item) for chunk in lists)])
        users += len(rank)
        firsts += int((rank == 1).sum())
    return users, firsts


def _ranks_in(lists: pa.ListArray, item: Any) -> np.ndarray:
    """The places of an item in some lists, from 1 on."""
    offsets = lists.offsets.to_numpy()
    places = np.flatnonzero(_equals(lists.values, item).to_numpy(zero_copy_only=False))
    places = places[(places >= offsets[0]) & (places < offsets[-1])]
    return places - offsets[np.searchsorted(offsets, places, side="right") - 1] + 1


# A night


def show_run(words: Sequence[str], date: str) -> None:
    """Print the artifacts of one night with rows and bytes, and the metrics of its evaluation.

    Args:
        words: settings.
        date: the night, YYYY-MM-DD.

    Raises:
        ArtifactError: nothing is published for the night.
    """
    night = _open(words, date)
    others = [each.artifact for each in holdings(night.storage) if each.artifact not in MODELS]
    found = {
        artifact: manifest
        for artifact in (*MODELS, *others)
        if (manifest := night.published(artifact)) is not None
    }
    if not found:
        raise ArtifactError(
            f"nothing is published for {date} below {night.storage.root}; `tiger-ray storage ls` shows what is"
        )
    records = {artifact: read_record(night.storage, artifact, date) for artifact in found}
    show_table(
        f"night {date}, {night.storage.root}",
        RUN_COLUMNS,
        [_run_row(manifest, records[artifact]) for artifact, manifest in found.items()],
        right=RUN_COLUMNS[3:8],
    )
    if "evaluation" in found and "model" in found:
        print(f"\n{metrics_table(found['evaluation'], found['model'])}")


RUN_COLUMNS = (
    "artifact",
    "status",
    "began (UTC)",
    "seconds",
    "rows",
    "bytes",
    "workers",
    "memory",
    "run",
    "why",
    "what",
)


def _run_row(manifest: Manifest, record: Record | None) -> tuple[object, ...]:
    """The row of one artifact; without a record, only values of the manifest."""
    written = readable_bytes(sum(entry.bytes for entry in manifest.files))
    rows, run, what = f"{manifest.rows:,}", manifest.run_id[:8], manifest.metadata.get("summary")
    if record is None or record.run_id != manifest.run_id:
        return (manifest.artifact, "no record", None, None, rows, written, None, None, run, None, what)
    memory = readable_bytes(record.peak_memory_bytes) if record.peak_memory_bytes else None
    began = record.began_at.astimezone(UTC).strftime("%H:%M:%S")
    why = "; ".join(record.why[:4]) + (f"; and {len(record.why) - 4} more" if len(record.why) > 4 else "")
    seconds, workers = f"{record.seconds:,.1f}", record.workers or None
    return (manifest.artifact, record.status, began, seconds, rows, written, workers, memory, run, why, what)


# Ids


def _id_of(text: str, id_type: str, what: str) -> Any:
    """An id in the type of the data: a number if ids are int64."""
    if id_type != "int64":
        return text
    try:
        return int(text)
    except ValueError:
        raise DataError(
            f"{what} {text!r} is not a number, but the {what} ids of this data are int64"
        ) from None


def _equals(column: pa.ChunkedArray | pa.Array, value: Any) -> Any:
    return pc.equal(column, pa.scalar(value, column.type))


def _code(codes: Sequence[int]) -> str:
    return "-".join(map(str, codes))
