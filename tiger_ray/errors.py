"""Every error a user can meet, and the exit code a job ends with.

    TigerError                      6   (anything unforeseen ends with Python's own 1)
    ├── SettingsError               2   a setting is unknown, mistyped or contradicts another
    ├── DataError                   3   the catalog or the events are not what the settings promise
    │   └── CollisionError          3   more items share codewords than the disambiguator can count
    ├── ArtifactError               3   an artifact is missing, damaged, or made for another version
    ├── QualityError                4   the night is worse than the gate allows; nothing was published
    ├── PublishError                5   somebody else published this date first, or it may not be replaced
    ├── StorageError                6   the store cannot be reached, read or written
    └── CommitUnknownError          7   the store never answered the commit; the next run will find out

A message says what happened, with the values, and which setting or file changes it.
"""


class TigerError(Exception):
    """Base of all errors that tiger_ray raises on purpose."""

    exit_code = 6


class SettingsError(TigerError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""

    exit_code = 2


class DataError(TigerError, ValueError):
    """Input rows break the contract of `schemas.py`."""

    exit_code = 3


class CollisionError(DataError):
    """More items share one prefix of codewords than the disambiguator can tell apart."""


class ArtifactError(TigerError):
    """A published artifact is missing, damaged, or does not fit the one beside it."""

    exit_code = 3


class QualityError(TigerError):
    """The Semantic IDs or the model of this night did not pass the quality gate."""

    exit_code = 4


class PublishError(TigerError):
    """The date is taken: by a rival job, or by an earlier run that may not be replaced."""

    exit_code = 5


class StorageError(TigerError):
    """The storage root cannot be reached, read or written."""

    exit_code = 6


class CommitUnknownError(StorageError):
    """The commit was sent and no answer came: it may or may not have happened."""

    exit_code = 7
