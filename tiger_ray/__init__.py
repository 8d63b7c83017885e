"""tiger_ray: catalog and events in, recommendations for every user out, by generative retrieval on Ray.

The rooms, from the ground up; a room imports only from rooms above it in this list:

    core        hashing, arrays, precision, memory
    settings    one file per section, checked before anything runs
    artifacts   what lies on disk, and how it becomes true: stores, manifests, runs, publishing, lineage
    data        what users bring: input files, item text, events, histories
    ids         text -> vectors -> codewords -> Semantic IDs
    model       the networks: TIGER's T5, and SASRec
    decoding    model + trie -> ranked valid items
    rankers     everything that ranks items for a history, behind one interface
    evaluation  metrics with intervals
    training    examples, loop, validation, checkpoints
    published   artifacts of a night, read without Ray
    cluster     Ray: shards over Ray Data, workers of Ray Train
    stages      one file per artifact, and the order of the night
    report      what people read
    serving     the optional endpoint
    cli         the command line
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiger_ray.errors import TigerError

if TYPE_CHECKING:
    from tiger_ray.settings import Settings, load_settings

__all__ = ["Settings", "TigerError", "load_settings"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The settings take longer to import than `tiger-ray --help` may take as a whole.
    if name in __all__:
        from tiger_ray import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
