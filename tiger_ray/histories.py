"""What a sequences artifact holds, and how much of it training may see; for readers that know no Ray."""

from __future__ import annotations

import numpy as np

from tiger_ray.storage import FileEntry, Manifest

HELD_OUT = 2
"""Events of a user that leave-one-out hides from training: validation target, then test target."""


def user_shards(manifest: Manifest) -> list[FileEntry]:
    """The files of a sequences artifact that hold users."""
    return [entry for entry in manifest.files if entry.name.startswith("shard-")]


def training_lengths(lengths: np.ndarray, held_out: int) -> np.ndarray:
    """How many of a user's oldest events training may see, given history lengths; same shape.

    Users too short to give a training event, a validation target and a test target are not evaluated, so
    training sees all of theirs. Source: paper section 4 (leave-one-out); the rule for short users is ours.
    """
    return np.where(lengths > held_out, lengths - held_out, lengths) if held_out else lengths


def num_examples(lengths: np.ndarray, held_out: int) -> int:
    """Training examples in histories of these lengths: every event that training may see, but the first."""
    return int(np.maximum(training_lengths(lengths, held_out) - 1, 0).sum())
