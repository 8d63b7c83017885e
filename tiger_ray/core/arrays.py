"""Small array functions that every room may use.

B ranges.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def ranges(start_B: npt.NDArray[np.int64], length_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """All integers from `start` to `start + length - 1` of each list, one list after the other."""
    before_B = np.cumsum(length_B) - length_B
    return np.repeat(start_B - before_B, length_B) + np.arange(length_B.sum())
