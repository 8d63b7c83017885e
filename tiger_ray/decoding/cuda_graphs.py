"""A recorded CUDA graph of one beam search: the search replays without Python between its kernels.

B users in batch, T history tokens, W beams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiger_ray.decoding.beam_search import Search
from tiger_ray.decoding.inference import LENGTH_MULTIPLE
from tiger_ray.decoding.trie import Barred
from tiger_ray.model.tokens import PAD


class RecordedSearch:
    """A search on a GPU, recorded once for each shape as a CUDA graph and replayed with new inputs.

    The levels launch hundreds of small kernels, which take longer to launch one by one than to run. Padding
    keeps the number of shapes small: users and barred candidates to a power of two, histories to a multiple
    of 16 tokens. All graphs share their memory, because one graph runs at a time and its results are copied.

    >>> def search(history_BT, barred, seed_B):  # stands for `beam_search` with a model and a trie
    ...     return history_BT + 1, history_BT / 2
    >>> if torch.cuda.is_available():
    ...     recorded = RecordedSearch(search)
    ...     found_BW, score_BW = recorded(torch.ones(3, 20, dtype=torch.int64).cuda(), None, None)
    ...     assert len(found_BW) == 3
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs = dict[Any, tuple[Any, list[Tensor], tuple[Tensor, Tensor]]]()

    def __call__(
        self, history_BT: Tensor, barred: tuple[Barred, ...] | None, seed_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Replay the search for a batch, after recording a new shape.

        Args:
            history_BT: token ids, (B, T) int64, on the GPU.
            barred: as in `beam_search`.
            seed_B: as in `beam_search`.

        Returns:
            The results of the search, for the B users.
        """
        num_users = len(history_BT)
        inputs, rebuild = pad_to_shape(history_BT, barred, seed_B)
        key = (barred is None, seed_B is None, *(tuple(tensor.shape) for tensor in inputs))
        if key not in self._graphs:
            self._graphs[key] = self._record(inputs, rebuild)
        graph, held, (found_BW, score_BW) = self._graphs[key]
        for place, tensor in zip(held, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return found_BW[:num_users].clone(), score_BW[:num_users].clone()

    def _record(self, inputs: list[Tensor], rebuild: Any) -> tuple[Any, list[Tensor], tuple[Tensor, Tensor]]:
        held = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # run once before recording: libraries initialize at their first use
            self._search(*rebuild(held))
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            found = self._search(*rebuild(held))
        return graph, held, found


def pad_to_shape(
    history_BT: Tensor, barred: tuple[Barred, ...] | None, seed_B: Tensor | None
) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Any, ...]]]:
    """Pad the inputs of a search to one of a few shapes.

    Args:
        history_BT: token ids, (B, T) int64.
        barred: as in `beam_search`.
        seed_B: as in `beam_search`.

    Returns:
        The padded tensors as a list, and a function from such a list to the arguments of the search.
    """

    def lengthen(tensor: Tensor, length: int, value: int) -> Tensor:
        filled = tensor.new_full((length, *tensor.shape[1:]), value)
        filled[: len(tensor)] = tensor
        return filled

    num_users = power_of_two(len(history_BT))
    missing = -history_BT.shape[1] % LENGTH_MULTIPLE
    history_BT = torch.nn.functional.pad(history_BT, (0, missing), value=PAD)
    inputs = [lengthen(history_BT, num_users, PAD)]
    if seed_B is not None:
        inputs.append(lengthen(seed_B, num_users, 0))
    length = power_of_two(max((len(level.user_E) for level in barred or ()), default=0))
    for level in barred or ():
        # no beam is at node -1
        inputs += [lengthen(column, length, -1 if column is level.node_E else 0) for column in level]

    def rebuild(tensors: list[Tensor]) -> tuple[Any, ...]:
        rest = tensors[1 if seed_B is None else 2 :]
        levels = tuple(Barred(*rest[first : first + 3]) for first in range(0, len(rest), 3))
        return tensors[0], None if barred is None else levels, None if seed_B is None else tensors[1]

    return inputs, rebuild


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count` and at least 1."""
    return 1 << max(count - 1, 0).bit_length()
