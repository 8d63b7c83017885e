"""What a sequences artifact holds, and where a holdout cuts it; for readers that know no Ray.

B users of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger_ray.errors import ArtifactError
from tiger_ray.schemas import MOMENTS
from tiger_ray.storage import FileEntry, Manifest

HELD_OUT = 2
"""Events of a user that leave-one-out hides from training: validation target, then test target."""

POPULARITY_COLUMNS = {"leave_one_out": "training_events", "none": "events", "time": "training_events_time"}
"""Holdout -> the column of popularity.parquet that counts the events which training may see."""


@dataclass(frozen=True)
class Cuts:
    """Where a holdout cuts each history."""

    seen_B: npt.NDArray[np.int64]
    """How many of its oldest events training may see."""
    validation_at_B: npt.NDArray[np.int64]
    """Place of the validation target, which is how many events come before it (at least 1); -1: there is none."""
    test_at_B: npt.NDArray[np.int64]
    """Place of the test target, in the same way."""

    @property
    def num_examples(self) -> int:
        """Training examples: every event that training may see, but each user's first."""
        return int(np.maximum(self.seen_B - 1, 0).sum())


def user_shards(manifest: Manifest) -> list[FileEntry]:
    """The files of a sequences artifact that hold users."""
    return [entry for entry in manifest.files if entry.name.startswith("shard-")]


def holdouts(has_moments: bool) -> list[str]:
    """The holdouts that can cut an artifact, given whether it knows the moments of the time split."""
    return [name for name in POPULARITY_COLUMNS if has_moments or name != "time"]


def require_holdout(sequences: Manifest, holdout: str) -> None:
    """Refuse sequences that were not told the moments of the time split.

    Raises:
        ArtifactError: names the settings.
    """
    if f"examples_{holdout}" not in sequences.metadata:
        raise ArtifactError(
            f"sequences {sequences.run_id} were built without sequences.validation_from and sequences.test_from, "
            f"which training.holdout {holdout!r} needs; set both and build them again (jobs/build_sequences.py)"
        )


def columns_for(holdout: str) -> list[str]:
    """Columns of a user shard that `cuts_of` reads."""
    return ["history", *(MOMENTS if holdout == "time" else ())]


def cuts_of(users: pa.Table, holdout: str) -> Cuts:
    """Where a holdout cuts the histories of some users.

    `leave_one_out` hides each user's last two events, validation target and test target; users too short to
    give a training event and both targets are not evaluated, and training sees all of theirs. `time` hides
    every event from `sequences.validation_from` on: the targets are the first event of the validation period
    and the first of the test period, which the model is asked for given all that came before, so that test
    histories hold events of the validation period. `none` hides nothing, and nobody is evaluated.

    Args:
        users: the columns of `columns_for`, one row per user.
        holdout: section `training`.

    Source: paper section 4 (leave-one-out); the rule for short users and the time split are ours.
    """
    length_B = pc.list_value_length(users.column("history")).to_numpy().astype(np.int64)
    nowhere_B = np.full(len(length_B), -1)
    if holdout == "none":
        return Cuts(length_B, nowhere_B, nowhere_B)
    if holdout == "time":
        before_validation_B, before_test_B = (
            users.column(name).to_numpy().astype(np.int64) for name in MOMENTS
        )
        return Cuts(
            before_validation_B,
            _first_of_period(before_validation_B, before_test_B),
            _first_of_period(before_test_B, length_B),
        )
    evaluated_B = length_B > HELD_OUT
    return Cuts(
        np.where(evaluated_B, length_B - HELD_OUT, length_B),
        np.where(evaluated_B, length_B - HELD_OUT, -1),
        np.where(evaluated_B, length_B - 1, -1),
    )


def _first_of_period(start_B: npt.NDArray[np.int64], end_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of the first event of a period; -1 if it has none, or nothing comes before it."""
    return np.where((start_B > 0) & (start_B < end_B), start_B, -1)
