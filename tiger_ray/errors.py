"""Every error a user can meet, and the exit code a job ends with.

    TigerError                      6   (anything unforeseen ends with Python's own 1)
    ├── SettingsError               2   a setting is unknown, mistyped or contradicts another
    ├── DataError                   3   the catalog or the events are not what the settings promise
    │   └── CollisionError          3   more items share codewords than the disambiguator can count
    ├── ArtifactError               3   an artifact is missing, damaged, or made for another version
    ├── QualityError                4   the night is worse than the gate allows; nothing was published
    ├── PublishError                5   another job published this date first, or the date may not be replaced
    ├── StorageError                6   the store cannot be reached, read or written
    └── CommitUnknownError          7   the store never answered the commit; the next run will find out

A message says what happened, with the values, and which setting or file changes it.
"""


class TigerError(Exception):
    """Base of all errors that tiger_ray raises on purpose.

    >>> issubclass(CommitUnknownError, TigerError), CommitUnknownError.exit_code
    (True, 7)
    """

    exit_code = 6
    go_on = "Mend what is named above, then run the same command again; it continues after the last finished stage."
    """What a person does next; the command line shows this text below the message."""


class SettingsError(TigerError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another setting."""

    exit_code = 2
    go_on = "Correct the setting, then run the same command again; finished stages are not computed twice."


class DataError(TigerError, ValueError):
    """Input rows break the contract of `schemas.py`."""

    exit_code = 3
    go_on = "Correct the input or the setting that is named above, then run the same command again."


class CollisionError(DataError):
    """More items share one prefix of codewords than the disambiguator has values."""


class ArtifactError(TigerError):
    """A published artifact is missing, damaged, or does not fit another artifact of the same night."""

    exit_code = 3
    go_on = (
        "Publish the artifact that is named above, or correct the date or storage.root, then run the same "
        "command again."
    )


class QualityError(TigerError):
    """The Semantic IDs or the model of this night did not pass the quality gate."""

    exit_code = 4
    go_on = (
        "The last published recommendations stay. Train longer or look at the data; to publish all the same, change "
        "evaluation.min_ratio_to_popularity or evaluation.max_drop and run the same command again."
    )


class PublishError(TigerError):
    """The date is taken by another job, or by an earlier run that may not be replaced."""

    exit_code = 5
    go_on = "Nothing was changed. Use another --date, or --storage.replace true to replace what is published."


class StorageError(TigerError):
    """The storage root cannot be reached, read or written."""

    exit_code = 6
    go_on = (
        "Mend the store or the access to the store, then run the same command again; finished files are not "
        "computed twice."
    )


class CommitUnknownError(StorageError):
    """The store did not answer the commit, so the date may or may not be published."""

    exit_code = 7
    go_on = "Run the same command again: the command finds out whether the night is published, and computes nothing twice."
