"""Planted worlds: a catalog, and users whose next item follows a known law, so the best ranking is known.

The catalog is a bookshop. Every author writes two series of ten volumes in one genre; the authors of a genre
form a ring. After a volume, a user makes one of five moves, or reads any other item:

    next_volume      the next volume of the series; after the last one, the first of the author's other series
    other_series     the same volume of the author's other series
    next_author      the same volume of the same series slot (first or second) of the next author in the ring
    new_start        the first volume of the next author's other slot
    previous_volume  the volume before; before the first one, the last

The five moves lead from every item to five different items, never to the item itself. Titles name series and
volume, brands name the author, categories name the genre: the text shows the whole law, except which author
follows which. Item ids are shuffled and reveal nothing.

`new_start` makes a first volume about twice as frequent as the average item, and late volumes two thirds as
frequent; all series are equally popular. So a popularity ranking can learn a little. Source: ours.

Letters: N items, M moves, U users, T time steps, E events, B histories, C candidates of a list; K only for top-K.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from tiger_ray.data.inputs import input_filesystem
from tiger_ray.errors import ArtifactError, DataError, SettingsError, StorageError
from tiger_ray.synthetic.names import (
    _ADJECTIVES,
    _FIRST_NAMES,
    _GENRES,
    _LAST_NAMES,
    _LETTERS,
    _NOUNS_PER_GENRE,
    _PLACE_ENDINGS,
    _PLACES,
    _SUBTITLES,
    _author_names,
    _series_names,
)

Int32 = npt.NDArray[np.int32]


Int64 = npt.NDArray[np.int64]


Bool = npt.NDArray[np.bool_]


DEFAULT_SHARES: Mapping[str, float] = MappingProxyType(
    {
        "next_volume": 0.45,
        "other_series": 0.13,
        "next_author": 0.12,
        "new_start": 0.11,
        "previous_volume": 0.09,
    }
)
"""Probability of each move; the rest up to 1 is noise, a uniform draw from all other items."""


VOLUMES = 10


SERIES_PER_AUTHOR = 2


ITEMS_PER_AUTHOR = VOLUMES * SERIES_PER_AUTHOR


CATALOG_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("category", pa.list_(pa.string())),
        ("available", pa.bool_()),
    ]
)


EVENTS_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.timestamp("us"))]
)


_PLANT_FORMAT = 1


_FIRST_EVENT = np.datetime64("2026-01-01", "us").astype(np.int64)


_DAY_US = 86_400_000_000


_RANKED_AT_ONCE = 65_536  # Histories; a ranking then needs some 20 MB.


# Tags that keep the random streams apart when the world and its events have the same seed.
_WORLD_STREAM, _NAME_STREAM, _EVENT_STREAM = 1, 2, 3


@dataclass(frozen=True, eq=False)
class World:
    """A planted world; `build` with equal arguments makes equal worlds.

    >>> world = World.build(40, seed=0)
    >>> world.successor_NM.shape == (40, len(world.shares))
    True
    """

    num_items: int
    seed: int
    shares: Mapping[str, float]
    """Probability of each move that happens, most probable first."""
    unavailable_share: float
    position_N: Int32
    """Position of each item on the grid author x series x volume, (N,)."""
    successor_NM: Int32
    """Item index that each move leads to, (N, M); columns in the order of `shares`."""
    available_N: Bool

    @classmethod
    def build(
        cls,
        num_items: int,
        seed: int,
        *,
        shares: Mapping[str, float] = DEFAULT_SHARES,
        unavailable_share: float = 0.02,
    ) -> World:
        """Plant a world.

        Args:
            num_items: N, a multiple of 20, at least 40.
            seed: seed of names, ids, and of the choice of unavailable items.
            shares: probability of each move; they add up to 1 at most, and a move left out never happens.
            unavailable_share: share of items that may not be recommended; users still read them.

        Raises:
            SettingsError: an argument is out of range.
        """
        most = min(_series_names(), _author_names() * SERIES_PER_AUTHOR) * VOLUMES
        if num_items % ITEMS_PER_AUTHOR or not 2 * ITEMS_PER_AUTHOR <= num_items <= most:
            raise SettingsError(
                f"num_items is {num_items}, but must be a multiple of {ITEMS_PER_AUTHOR} "
                f"from {2 * ITEMS_PER_AUTHOR} to {most}: every author writes {ITEMS_PER_AUTHOR}"
            )
        unknown = sorted(set(shares) - set(DEFAULT_SHARES))
        if unknown:
            raise SettingsError(f"unknown moves {unknown}; known moves are {list(DEFAULT_SHARES)}")
        if min(shares.values(), default=0.0) < 0.0 or sum(shares.values()) > 1.0 + 1e-9:
            raise SettingsError(f"shares must be probabilities that add up to 1 at most, not {dict(shares)}")
        if not 0.0 <= unavailable_share <= 0.5:
            raise SettingsError(f"unavailable_share is {unavailable_share}, but must lie in [0, 0.5]")

        happening = {move: share for move, share in shares.items() if share > 0.0}
        ordered = dict(sorted(happening.items(), key=lambda entry: -entry[1]))
        rng = np.random.default_rng([seed, _WORLD_STREAM])
        position_N = rng.permutation(num_items).astype(np.int32)
        item_at_N = np.argsort(position_N).astype(np.int32)
        targets = _targets(position_N, num_items)
        successor_NM = np.empty((num_items, len(ordered)), np.int32)
        for column, move in enumerate(ordered):
            successor_NM[:, column] = item_at_N[targets[move]]
        available_N = np.ones(num_items, np.bool_)
        available_N[rng.permutation(num_items)[: round(num_items * unavailable_share)]] = False
        return cls(
            num_items=num_items,
            seed=seed,
            shares=MappingProxyType(ordered),
            unavailable_share=unavailable_share,
            position_N=position_N,
            successor_NM=successor_NM,
            available_N=available_N,
        )

    @property
    def noise(self) -> float:
        """Probability that the next item is a uniform draw from all items but the last one."""
        missing = 1.0 - sum(self.shares.values())
        return missing if missing > 1e-9 else 0.0

    def item_ids(self) -> pa.Array:
        """Item id of every item index, N strings like `B00042`."""
        return self._item_ids(np.arange(self.num_items, dtype=np.int32))

    def item_indices(self, item_ids: pa.Array | pa.ChunkedArray) -> Int32:
        """Item index of each item id, int32.

        Raises:
            DataError: an id is not of this world.
        """
        position = pc.index_in(item_ids.cast(pa.string()), value_set=self.item_ids())
        if position.null_count:
            stranger = pc.filter(item_ids, pc.is_null(position))[0].as_py()
            raise DataError(
                f"{position.null_count} item ids are not of this world of {self.num_items} items, "
                f"{stranger!r} among them; was it built from the plant.json beside these events?"
            )
        indices: Int32 = position.to_numpy().astype(np.int32)
        return indices

    def catalog(self) -> pa.Table:
        """One row per item, in the order of item index; schema `CATALOG_SCHEMA`."""
        series, volume = np.divmod(self.position_N, VOLUMES)
        author = series // SERIES_PER_AUTHOR
        genre = author % _num_genres(self.num_items)
        subtitle = _text(_SUBTITLES, volume)
        number = pa.array(volume + 1).cast(pa.string())
        volume_text = pc.binary_join_element_wise(", Book ", number, ": ", subtitle, "")
        paths = pa.array([["Books", name] for name in _GENRES], pa.list_(pa.string()))
        columns = [
            self.item_ids(),
            pc.binary_join_element_wise(self._series_titles(series), volume_text, ""),
            self._author_names(author),
            paths.take(pa.array(genre)),
            pa.array(self.available_N),
        ]
        return pa.table(columns, schema=CATALOG_SCHEMA)

    def events(self, num_users: int, seed: int, min_events: int = 6, max_events: int = 20) -> pa.Table:
        """Draw users and the items they read, in the order of time; schema `EVENTS_SCHEMA`.

        Args:
            num_users: U; their ids are `U000000` and so on.
            seed: seed of the users; another seed draws other users of the same world.
            min_events: fewest events of a user, at least 2; lengths are uniform up to `max_events`.
            max_events: most events of a user.

        Raises:
            SettingsError: an argument is out of range.
        """
        log = self._draw(num_users, seed, min_events, max_events)
        return self._events_table(log, slice(None))

    def oracle_top(self, last_B: npt.NDArray[np.integer[Any]], k: int) -> Int32:
        """The k most probable available next items; no ranking has a higher expected recall.

        Args:
            last_B: (B,) item index of the last item of each history; earlier items do not matter.
            k: items per history.

        Returns:
            (B, k) int32 item index, most probable first; equally probable items in the order of item index.

        Raises:
            SettingsError: fewer than k items are available.
        """
        available = np.flatnonzero(self.available_N).astype(np.int32)
        if not 1 <= k < len(available):
            raise SettingsError(
                f"k is {k}, but must lie between 1 and {len(available) - 1}, the available items"
            )
        last_B = np.asarray(last_B)
        move_BM = self.successor_NM[last_B]
        num_moves = move_BM.shape[1]
        # All items that no move leads to are equally probable, so the first of them are as good as any others.
        # Take k, and one more for the last item and for each move, which may drop out below.
        others = available[: k + num_moves + 1]
        taken = others == last_B[:, None]
        for column in range(num_moves):
            taken |= others == move_BM[:, column, None]
        item_BC = np.concatenate([move_BM, np.broadcast_to(others, taken.shape)], axis=1)
        dropped_BC = np.concatenate([~self.available_N[move_BM], taken], axis=1)
        kept_BK = np.argsort(dropped_BC, axis=1, kind="stable")[:, :k]
        top_BK: Int32 = np.take_along_axis(item_BC, kept_BK, axis=1)
        return top_BK

    def expected_recall(self, last_B: npt.NDArray[np.integer[Any]], k: int) -> float:
        """Expected recall@k of `oracle_top` for the last items, (B,): no recommender can expect more."""
        hit_M = np.zeros(len(self.shares))
        for block in _blocks(len(last_B)):
            top_BK = self.oracle_top(last_B[block], k)
            move_BM = self.successor_NM[last_B[block]]
            hit_M += (move_BM[:, :, None] == top_BK[:, None, :]).any(axis=2).sum(axis=0)
        by_move = float(hit_M @ np.array(list(self.shares.values()))) / len(last_B)
        return by_move + self.noise * k / (self.num_items - 1)

    def oracle_recall(self, events: pa.Table, k: int) -> float:
        """Recall@k of `oracle_top` on the last event of each user, given the one before.

        Args:
            events: table with `user_id`, `item_id`, `timestamp`, rows in any order; a user with one event
                does not count.
            k: items per user.

        Raises:
            DataError: an item is not of this world, or no user has two events.
        """
        return self._oracle_recall(self._log(events), k)

    def popularity_recall(self, events: pa.Table, k: int) -> float:
        """Recall@k, on the last event of each user, of the k available items most frequent before those.

        Args:
            events: as in `oracle_recall`.
            k: items per user.

        Raises:
            DataError: an item is not of this world, or no user has two events.
        """
        return self._popularity_recall(self._log(events), k)

    @classmethod
    def read(cls, uri: str) -> World:
        """The world whose data `write` put into this folder or under this URI.

        Raises:
            ArtifactError: plant.json is missing, or this version of the code plants another world from it.
        """
        filesystem, root = input_filesystem(uri)
        try:
            with filesystem.open_input_file(f"{root}/plant.json") as file:
                plant = json.loads(file.read())
        except FileNotFoundError:
            raise ArtifactError(
                f"no plant.json in {uri}; `tiger-ray synthesize` writes it beside the data"
            ) from None
        if plant["format"] != _PLANT_FORMAT:
            raise ArtifactError(
                f"{uri}/plant.json has format {plant['format']}, this code reads {_PLANT_FORMAT}"
            )
        world = cls.build(
            plant["num_items"],
            plant["seed"],
            shares=plant["shares"],
            unavailable_share=plant["unavailable_share"],
        )
        if world.digest() != plant["digest"]:
            raise ArtifactError(
                f"the world of {uri}/plant.json cannot be rebuilt: this version of tiger_ray or numpy plants "
                "another one from its seed; write the data again with `tiger-ray synthesize`"
            )
        return world

    def digest(self) -> str:
        """SHA-256 of the law: where each move leads, how probable it is, what is available."""
        law = hashlib.sha256(json.dumps(dict(self.shares)).encode())
        law.update(self.successor_NM.astype("<i4").tobytes())
        law.update(self.available_N.tobytes())
        return law.hexdigest()

    def _draw(self, num_users: int, seed: int, min_events: int, max_events: int) -> _Log:
        if num_users < 1 or not 2 <= min_events <= max_events:
            raise SettingsError(
                "num_users must be at least 1 and 2 <= min_events <= max_events, "
                f"not num_users={num_users}, min_events={min_events}, max_events={max_events}"
            )
        rng = np.random.default_rng([seed, _EVENT_STREAM])
        length_U = rng.integers(min_events, max_events + 1, num_users)
        item_TU = np.empty((max_events, num_users), np.int32)
        time_TU = np.empty((max_events, num_users), np.int64)
        item_TU[0] = rng.integers(0, self.num_items, num_users)
        time_TU[0] = _FIRST_EVENT + rng.integers(0, 90 * _DAY_US, num_users)
        upper_M = np.cumsum(list(self.shares.values()))
        if self.noise == 0.0:
            upper_M[-1] = 1.0  # A sum like 0.9999999 would let noise through.
        for step in range(1, max_events):
            last_U = item_TU[step - 1]
            move_U = np.searchsorted(upper_M, rng.random(num_users), side="right")
            other_U = rng.integers(0, self.num_items - 1, num_users)
            other_U += other_U >= last_U  # Any item but the last.
            noisy_U = move_U == len(upper_M)
            moved_U = self.successor_NM[last_U, np.where(noisy_U, 0, move_U)] if len(upper_M) else other_U
            item_TU[step] = np.where(noisy_U, other_U, moved_U)
            gap_U = 1_000_000 + rng.exponential(2 * _DAY_US, num_users).astype(np.int64)
            time_TU[step] = time_TU[step - 1] + gap_U
        step_E, user_E = np.nonzero(np.arange(max_events)[:, None] < length_U)
        item_E, time_E = item_TU[step_E, user_E], time_TU[step_E, user_E]
        order = np.argsort(time_E, kind="stable")
        return _Log(user_E[order].astype(np.int32), item_E[order], time_E[order])

    def _log(self, events: pa.Table) -> _Log:
        user = pc.dictionary_encode(events["user_id"]).combine_chunks()
        return _Log(
            user=user.indices.to_numpy(zero_copy_only=False).astype(np.int32),
            item=self.item_indices(events["item_id"]),
            time=events["timestamp"].cast(pa.int64()).to_numpy(),
        )

    def _oracle_recall(self, log: _Log, k: int) -> float:
        before_B, last_B = log.last_two()
        hits = 0
        for block in _blocks(len(before_B)):
            top_BK = self.oracle_top(log.item[before_B[block]], k)
            hits += int((top_BK == log.item[last_B[block], None]).any(axis=1).sum())
        return hits / len(last_B)

    def _popularity_recall(self, log: _Log, k: int) -> float:
        _, last_B = log.last_two()
        count_N = np.bincount(log.item, minlength=self.num_items)
        count_N -= np.bincount(log.item[last_B], minlength=self.num_items)
        count_N[~self.available_N] = -1
        popular_K = np.argsort(-count_N, kind="stable")[:k]
        return float(np.isin(log.item[last_B], popular_K).mean())

    def _events_table(self, log: _Log, rows: slice) -> pa.Table:
        width = max(6, len(str(int(log.user.max()))))
        columns = [
            _padded("U", log.user[rows], width),
            self._item_ids(log.item[rows]),
            pa.array(log.time[rows]).cast(pa.timestamp("us")),
        ]
        return pa.table(columns, schema=EVENTS_SCHEMA)

    def _item_ids(self, item_index: Int32) -> pa.Array:
        return _padded("B", item_index, max(5, len(str(self.num_items - 1))))

    def _series_titles(self, series: Int32) -> pa.Array:
        """`The Amber Lighthouse`, and ` of Corvane` after it once a genre has used up its short names."""
        num_genres = _num_genres(self.num_items)
        author, slot = np.divmod(series, SERIES_PER_AUTHOR)
        genre, ring = author % num_genres, author // num_genres
        turn, pair = np.divmod(ring * SERIES_PER_AUTHOR + slot, len(_ADJECTIVES) * _NOUNS_PER_GENRE)
        rng = np.random.default_rng([self.seed, _NAME_STREAM, 0])
        shuffled = np.argsort(rng.random((num_genres, len(_ADJECTIVES) * _NOUNS_PER_GENRE)), axis=1)
        adjective, noun = np.divmod(shuffled[genre, pair], _NOUNS_PER_GENRE)
        nouns = [noun for nouns in _GENRES.values() for noun in nouns]
        place, ending = np.divmod(np.maximum(turn - 1, 0), len(_PLACE_ENDINGS))
        of_place = pc.binary_join_element_wise(
            " of ", _text(_PLACES, place), _text(_PLACE_ENDINGS, ending), ""
        )
        return pc.binary_join_element_wise(
            "The ",
            _text(_ADJECTIVES, adjective),
            " ",
            _text(nouns, genre * _NOUNS_PER_GENRE + noun),
            pc.if_else(pa.array(turn > 0), of_place, ""),
            "",
        )

    def _author_names(self, author: Int32) -> pa.Array:
        """`Ada Marlow`, and with two initials once the short names are used up."""
        turn, pair = np.divmod(author, len(_FIRST_NAMES) * len(_LAST_NAMES))
        rng = np.random.default_rng([self.seed, _NAME_STREAM, 1])
        first, last = np.divmod(rng.permutation(len(_FIRST_NAMES) * len(_LAST_NAMES))[pair], len(_LAST_NAMES))
        one, two = np.divmod(np.maximum(turn - 1, 0), len(_LETTERS))
        initials = pc.binary_join_element_wise(" ", _text(_LETTERS, one), ". ", _text(_LETTERS, two), ".", "")
        return pc.binary_join_element_wise(
            _text(_FIRST_NAMES, first),
            pc.if_else(pa.array(turn > 0), initials, ""),
            " ",
            _text(_LAST_NAMES, last),
            "",
        )


@dataclass(frozen=True)
class Synthesis:
    """Sizes of a written world, and the recall@10 on each user's last event of the oracle and of popularity."""

    uri: str
    num_items: int
    num_users: int
    num_events: int
    oracle_recall: float
    popularity_recall: float

    def summary(self) -> str:
        """Three lines for a terminal."""
        return (
            f"{self.uri}: {self.num_items:,} items, {self.num_users:,} users, {self.num_events:,} events\n"
            f"oracle recall@10     {self.oracle_recall:.4f}   (on the last event of each user; the ceiling)\n"
            f"popularity recall@10 {self.popularity_recall:.4f}"
        )


def write(
    uri: str,
    world: World,
    *,
    num_users: int,
    seed: int,
    min_events: int = 6,
    max_events: int = 20,
    num_files: int = 1,
) -> Synthesis:
    """Write `catalog/part-*.parquet`, `events/part-*.parquet` and `plant.json`; replace an earlier world.

    Args:
        uri: folder, or `s3://bucket/prefix`; endpoint, region and CA bundle come from the AWS variables.
        world: the world to write; `World.read(uri)` reads it again.
        num_users: U; with the next three arguments as in `World.events`.
        seed: seed of the users.
        min_events: fewest events of a user.
        max_events: most events of a user.
        num_files: files of the catalog, and of the events. Event files follow each other in time, so most users have
            events in several files.

    Raises:
        SettingsError: an argument is out of range.
        StorageError: the folder holds a catalog or events that `write` did not write.
    """
    if num_files < 1:
        raise SettingsError(f"num_files is {num_files}, but must be at least 1")
    log = world._draw(num_users, seed, min_events, max_events)
    plant = {
        "format": _PLANT_FORMAT,
        "num_items": world.num_items,
        "seed": world.seed,
        "shares": dict(world.shares),
        "unavailable_share": world.unavailable_share,
        "digest": world.digest(),
        "events": {
            "num_users": num_users,
            "seed": seed,
            "min_events": min_events,
            "max_events": max_events,
        },
    }
    filesystem, root = input_filesystem(uri)
    _make_room(filesystem, root, uri)
    # Write the plant first: if this run dies later, the next run may still replace the folder.
    with filesystem.open_output_stream(f"{root}/plant.json") as file:
        file.write(json.dumps(plant, indent=2).encode() + b"\n")
    catalog = world.catalog()
    for name, rows in _parts(catalog.num_rows, num_files):
        pq.write_table(catalog[rows], f"{root}/catalog/{name}", filesystem=filesystem)
    for name, rows in _parts(len(log.item), num_files):
        pq.write_table(world._events_table(log, rows), f"{root}/events/{name}", filesystem=filesystem)
    return Synthesis(
        uri=uri,
        num_items=world.num_items,
        num_users=num_users,
        num_events=len(log.item),
        oracle_recall=world._oracle_recall(log, 10),
        popularity_recall=world._popularity_recall(log, 10),
    )


@dataclass(frozen=True)
class _Log:
    """Events as numbers: 16 bytes each, instead of 30 in the table."""

    user: Int32
    item: Int32
    time: Int64

    def last_two(self) -> tuple[Int64, Int64]:
        """Rows of the last two events of each user with two events or more: the earlier one, the last one."""
        order = np.lexsort((self.time, self.user))
        user = self.user[order]
        ends = np.flatnonzero(np.append(user[1:] != user[:-1], True))
        ends = ends[ends > 0]
        ends = ends[user[ends] == user[ends - 1]]
        if not len(ends):
            raise DataError("no user has two events, so there is no last event to predict from one before it")
        return order[ends - 1], order[ends]


def _targets(position: Int32, num_items: int) -> dict[str, Int32]:
    """Grid position that each move leads to, by move, for each grid position."""
    series, volume = np.divmod(position, VOLUMES)
    author, slot = np.divmod(series, SERIES_PER_AUTHOR)
    num_genres = _num_genres(num_items)
    following = author + num_genres
    following = np.where(following * ITEMS_PER_AUTHOR < num_items, following, author % num_genres)
    finished = volume == VOLUMES - 1

    def at(author: Int32, slot: Int32, volume: Int32 | int) -> Int32:
        return (author * SERIES_PER_AUTHOR + slot) * VOLUMES + volume

    return {
        "next_volume": at(author, np.where(finished, 1 - slot, slot), np.where(finished, 0, volume + 1)),
        "other_series": at(author, 1 - slot, volume),
        "next_author": at(following, slot, volume),
        "new_start": at(following, 1 - slot, 0),
        "previous_volume": at(author, slot, (volume - 1) % VOLUMES),
    }


def _num_genres(num_items: int) -> int:
    """Genres of a world: each has four authors or more, if the world has four; the move to the next author needs two."""
    return max(1, min(len(_GENRES), num_items // ITEMS_PER_AUTHOR // 4))


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _RANKED_AT_ONCE):
        yield slice(start, start + _RANKED_AT_ONCE)


def _parts(num_rows: int, num_files: int) -> Iterator[tuple[str, slice]]:
    for part in range(num_files):
        rows = slice(num_rows * part // num_files, num_rows * (part + 1) // num_files)
        yield f"part-{part:05d}.parquet", rows


def _text(words: list[str], index: npt.NDArray[np.integer[Any]]) -> pa.Array:
    return pa.array(words).take(pa.array(index))


def _padded(prefix: str, number: Int32, width: int) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(number).cast(pa.string()), width, "0")
    return pc.binary_join_element_wise(prefix, digits, "")


def _make_room(filesystem: pafs.FileSystem, root: str, uri: str) -> None:
    """Delete an earlier world, so no part of it stays beside the new world; never delete anything else."""
    folders = [f"{root}/catalog", f"{root}/events"]
    plant, *found = filesystem.get_file_info([f"{root}/plant.json", *folders])
    occupied = [info.path for info in found if info.type != pafs.FileType.NotFound]
    if occupied and plant.type == pafs.FileType.NotFound:
        raise StorageError(
            f"{uri} holds a catalog or events but no plant.json, so they are not a synthetic world and are not "
            "replaced; choose another folder"
        )
    for path in occupied:
        filesystem.delete_dir(path)
    if isinstance(filesystem, pafs.LocalFileSystem):  # In an object store this would write empty objects.
        for path in folders:
            filesystem.create_dir(path, recursive=True)
