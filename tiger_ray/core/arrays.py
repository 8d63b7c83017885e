"""Small array functions that every room may use.

B lists, K places of a list.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def best_first(
    found_BK: npt.NDArray[np.int64], score_BK: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Items and scores, (B, K) each, sorted by score, highest first; sampled lists arrive in another order."""
    place_BK = np.argsort(-score_BK, axis=1, kind="stable")
    return np.take_along_axis(found_BK, place_BK, 1), np.take_along_axis(score_BK, place_BK, 1)


def ranges(start_B: npt.NDArray[np.int64], length_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """All integers from `start` to `start + length - 1` of each list, one list after the other."""
    before_B = np.cumsum(length_B) - length_B
    return np.repeat(start_B - before_B, length_B) + np.arange(length_B.sum())
