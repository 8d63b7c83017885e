"""Corpus -> training examples: each example once per epoch, in a random order that takes no memory.

An example is an event of a user as the target, and the events before it as the history. Examples are never
stored. They form one endless row, epoch after epoch. The example at a place of the row follows from the seed
and the sizes of the user shards, so any worker can start at any step.

If the events fit into memory, they are read once, and an epoch is one permutation of all examples. Otherwise
every epoch shuffles the user shards and packs them into windows. The row passes through the windows one after
the other, and a thread reads the next window in advance.

B examples of one batch or of one group of batches, E events (of a batch or of a window), U users of a window,
S user shards, N places or rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiger_ray.core.arrays import ranges
from tiger_ray.core.hashing import splitmix64
from tiger_ray.errors import DataError

BATCHES_PER_GROUP = 64
"""Batches that are sorted by length together, so that a batch holds histories of similar lengths."""


NUM_ROUNDS = 8
"""Rounds of the permutation; with fewer than 6, some pairs of places are visibly correlated."""


IN_WINDOW, SHARDS, BATCHES = range(3)
"""Uses of a permutation, as part of its key: examples of a window, user shards, batches of a group."""


class Batch(NamedTuple):
    """Some examples.

    >>> batch = Batch(np.array([5, 7, 9]), np.array([1, 2]), np.array([0, 0], np.uint64), np.array([6, 8]))
    >>> batch.take(np.array([1])).item_E.tolist()
    [7, 9]
    """

    item_E: npt.NDArray[np.int32]
    """item_index of the histories, one after the other, oldest event first."""
    lengths_B: npt.NDArray[np.int64]
    """Events per history; their sum is E."""
    user_hash_B: npt.NDArray[np.uint64]
    """Hash of the user id, for user buckets."""
    target_B: npt.NDArray[np.int32]
    """item_index of the next event."""

    def take(self, row_N: npt.NDArray[np.int64]) -> Batch:
        """These rows, in this order."""
        lengths_N = self.lengths_B[row_N]
        first_N = np.cumsum(self.lengths_B)[row_N] - lengths_N
        item_E = self.item_E[ranges(first_N, lengths_N)]
        return Batch(item_E, lengths_N, self.user_hash_B[row_N], self.target_B[row_N])

    def split(self, ends: Sequence[int]) -> list[Batch]:
        """Cut the rows at these ends; the parts are views."""
        end_B = np.concatenate([[0], np.cumsum(self.lengths_B)])
        return [
            Batch(
                self.item_E[end_B[start] : end_B[end]],
                self.lengths_B[start:end],
                self.user_hash_B[start:end],
                self.target_B[start:end],
            )
            for start, end in zip([0, *ends], ends, strict=False)
        ]


@dataclass(frozen=True)
class Corpus:
    """Histories in memory: users with an example, and the events that training may see.

    >>> corpus = Corpus(np.array([5, 6, 7, 1, 2]), np.array([2, 3]), np.array([0, 0], np.uint64))
    >>> batch = corpus.cut(np.array([1]), max_history=20)
    >>> len(corpus), batch.item_E.tolist(), batch.target_B.tolist()
    (3, [5, 6], [7])
    """

    item_index_E: npt.NDArray[np.int32]
    """Events of all users, each user's oldest first."""
    end_U: npt.NDArray[np.int64]
    """Number of examples up to and with each user; a user has one example less than events."""
    user_hash_U: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        """Number of examples."""
        return int(self.end_U[-1]) if len(self.end_U) else 0

    def cut(self, example_B: npt.NDArray[np.int64], max_history: int) -> Batch:
        """These examples, numbers (B,), with at most the `max_history` most recent events of each history."""
        user_B = np.searchsorted(self.end_U, example_B, side="right")
        first_B = np.where(user_B > 0, self.end_U[user_B - 1], 0)
        # Every earlier user has one event more than examples, and this user's first event is not a target.
        target_B = example_B + user_B + 1
        lengths_B = np.minimum(example_B - first_B + 1, max_history)
        item_E = self.item_index_E[ranges(target_B - lengths_B, lengths_B)]
        return Batch(item_E, lengths_B, self.user_hash_U[user_B], self.item_index_E[target_B])


class _Window(NamedTuple):
    """User shards that are in memory together, and the first place in the permutation of their examples."""

    shards: npt.NDArray[np.int64]
    size: int
    key: tuple[int, ...]
    place: int


class Examples:
    """All training examples, and the batches of these examples.

    Args:
        events_S: most events of each user shard, (S,) int64.
        examples_S: examples of each user shard, (S,) int64.
        read: called with numbers of shards; gives their corpus.
        max_history: most recent items of a history that the model reads.
        events_in_memory: more events than this are streamed in windows of half this size: one window is in
            use while a thread reads the next.
        seed: of every order.

    >>> examples = Examples.of(
    ...     np.array([5, 6, 7, 1, 2], np.int32), np.array([3, 2]), np.zeros(2, np.uint64), max_history=20, seed=0
    ... )
    >>> (batch,) = next(examples.batches(global_batch_size=3))
    >>> len(examples), len(batch.target_B), {*batch.target_B.tolist()} <= {6, 7, 2}
    (3, 3, True)
    """

    def __init__(
        self,
        events_S: npt.NDArray[np.int64],
        examples_S: npt.NDArray[np.int64],
        read: Callable[[npt.NDArray[np.int64]], Corpus],
        *,
        max_history: int,
        events_in_memory: int,
        seed: int,
    ) -> None:
        self._events_S, self._examples_S, self._read = events_S, examples_S, read
        self._max_history, self._seed = max_history, seed
        self._window_events = events_in_memory // 2
        self.streamed = int(events_S.sum()) > events_in_memory
        """True if the events do not fit into memory."""
        self._kept: Corpus | None = None

    @classmethod
    def of(
        cls,
        item_index_E: npt.NDArray[np.int32],
        lengths_U: npt.NDArray[np.int64],
        user_hash_U: npt.NDArray[np.uint64],
        *,
        max_history: int,
        seed: int,
    ) -> Examples:
        """Examples of histories in memory; training may see all their events.

        Args:
            item_index_E: events of all users, each user's oldest first, (E,) int32.
            lengths_U: events per user, (U,) int64.
            user_hash_U: hash of the user id, (U,) uint64.
            max_history: most recent items of a history that the model reads.
            seed: of every order.
        """
        useful_U = lengths_U > 1
        corpus = Corpus(
            item_index_E[np.repeat(useful_U, lengths_U)],
            np.cumsum(lengths_U[useful_U] - 1),
            user_hash_U[useful_U],
        )
        events = len(corpus.item_index_E)
        return cls(
            np.array([events], np.int64),
            np.array([len(corpus)], np.int64),
            lambda _: corpus,
            max_history=max_history,
            events_in_memory=events,
            seed=seed,
        )

    def __len__(self) -> int:
        """Examples per epoch."""
        return int(self._examples_S.sum())

    def batches(
        self,
        global_batch_size: int,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_tokens: int | None = None,
        id_length: int = 1,
        user_token: bool = False,
    ) -> Iterator[list[Batch]]:
        """One worker's examples of each step, from step `start` on, without end.

        The global batch of a step is sorted by length, and each worker takes every `world_size`-th example.
        The global batch does not depend on the number of workers. An epoch may end within a batch.

        Args:
            global_batch_size: examples per step over all workers.
            start: first step.
            rank: rank of this worker, from 0.
            world_size: number of workers.
            batch_tokens: most tokens of a batch, with padding and the decoder's tokens, except for a batch of
                one example; None: a worker's share of a step is one batch.
            id_length: tokens per item.
            user_token: true for one more token per example.

        Returns:
            One list per step: the batches of the worker's share, shortest histories first.

        Raises:
            DataError: no history has an example.
        """
        if not len(self):
            raise DataError("no training example: no history has two events that training may see")
        return self._batches(
            global_batch_size, start, rank, world_size, partial(_ends, batch_tokens, id_length, user_token)
        )

    def _batches(
        self,
        global_batch_size: int,
        start: int,
        rank: int,
        world_size: int,
        ends: Callable[[npt.NDArray[np.int64]], list[int]],
    ) -> Iterator[list[Batch]]:
        number, skipped = divmod(start, BATCHES_PER_GROUP)
        for group in self._groups(number, BATCHES_PER_GROUP * global_batch_size):
            by_length = np.argsort(group.lengths_B, kind="stable").reshape(BATCHES_PER_GROUP, -1)
            # Shuffle the batches: a model should not see its examples from short to long.
            key = (self._seed, BATCHES, number)
            order = permutation_at(np.arange(skipped, BATCHES_PER_GROUP), BATCHES_PER_GROUP, key)
            mine = by_length[order, rank::world_size]
            share_ends = np.arange(1, len(mine) + 1) * mine.shape[1]
            for step in group.take(mine.ravel()).split(share_ends.tolist()):
                yield step.split(ends(step.lengths_B))
            number, skipped = number + 1, 0

    def _groups(self, number: int, size: int) -> Iterator[Batch]:
        """Groups of `size` consecutive examples in the row of all epochs, from group `number` on."""
        parts: list[Batch] = []
        missing = size
        for window, corpus in self._in_memory(self._windows(number * size)):
            place = window.place
            while place < window.size:
                end = min(place + missing, window.size)
                example_B = permutation_at(np.arange(place, end), window.size, window.key)
                parts.append(corpus.cut(example_B, self._max_history))
                place, missing = end, missing - len(example_B)
                if not missing:
                    yield Batch(*map(np.concatenate, zip(*parts, strict=True)))
                    parts, missing = [], size
            del corpus  # free the window before the loop asks for the next, or three would be in memory

    def _windows(self, first: int) -> Iterator[_Window]:
        """The windows of the row of all epochs, from the window with place `first` on."""
        first_epoch, place = divmod(first, len(self))
        for epoch in count(first_epoch):
            for number, shards in enumerate(self._pack(epoch)):
                size = int(self._examples_S[shards].sum())
                if place < size:
                    yield _Window(shards, size, (self._seed, IN_WINDOW, epoch, number), place)
                place = max(0, place - size)

    def _pack(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The shards of each window of an epoch."""
        shards = np.arange(len(self._events_S))
        if not self.streamed:
            return [shards]
        shards = permutation_at(shards, len(shards), (self._seed, SHARDS, epoch))
        borders, room = [], self._window_events
        for number, events in enumerate(self._events_S[shards].tolist()):
            if events > room:
                borders.append(number)
                room = self._window_events
            room -= events
        return np.split(shards, borders)

    def _in_memory(self, windows: Iterator[_Window]) -> Iterator[tuple[_Window, Corpus]]:
        """Each window with its corpus."""
        if not self.streamed:
            if self._kept is None:
                self._kept = self._read(np.arange(len(self._events_S)))
            for window in windows:
                yield window, self._kept
        with ThreadPoolExecutor(1, thread_name_prefix="histories") as thread:
            window = next(windows)
            reading = thread.submit(self._read, window.shards)
            for following in windows:
                corpus = reading.result()
                reading = thread.submit(self._read, following.shards)
                yield window, corpus
                window = following


def permutation_at(place_N: npt.NDArray[np.int64], size: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Values at some places of a random permutation of 0 to `size` - 1, which takes no memory.

    Args:
        place_N: places, 0 to `size` - 1, (N,) int64.
        size: length of the permutation.
        key: choice of the permutation; numbers from 0.

    Returns:
        Values, 0 to `size` - 1, (N,) int64.

    Source: a Feistel network over pairs of numbers below the root of `size`, with cycle walking (Black and
    Rogaway 2002, method 3).
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    round_keys = np.random.SeedSequence(key).generate_state(NUM_ROUNDS, np.uint64).astype(np.uint64)
    value_N = _feistel(place_N.astype(np.uint64), side, round_keys)
    while (outside_N := value_N >= size).any():
        value_N[outside_N] = _feistel(value_N[outside_N], side, round_keys)
    return value_N.astype(np.int64)


def _feistel(
    value_N: npt.NDArray[np.uint64], side: np.uint64, round_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Permutation of 0 to `side` squared - 1."""
    left_N, right_N = value_N // side, value_N % side
    for round_key in round_keys:
        # Scale the upper half of the hash to `side`: faster than a division.
        shift_N = (splitmix64(right_N ^ round_key) >> np.uint64(32)) * side >> np.uint64(32)
        sum_N = left_N + shift_N
        left_N, right_N = right_N, sum_N - side * (sum_N >= side)
    return left_N * side + right_N


def _ends(
    batch_tokens: int | None, id_length: int, user_token: bool, lengths_B: npt.NDArray[np.int64]
) -> list[int]:
    """Ends of batches of at most `batch_tokens` padded tokens; `lengths_B` is sorted."""
    limit = math.inf if batch_tokens is None else batch_tokens
    tokens_B = (lengths_B + 1) * id_length + user_token
    ends = [0]
    while ends[-1] < len(tokens_B):
        rest = tokens_B[ends[-1] :]
        # The last example of a batch is the longest, so each example adds padded tokens.
        fitting = np.searchsorted(rest * np.arange(1, len(rest) + 1), limit, side="right")
        ends.append(ends[-1] + max(1, int(fitting)))
    return ends[1:]
