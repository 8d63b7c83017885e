"""tiger_ray: catalog and events in, recommendations of every user out, by generative retrieval on Ray.

    catalog      items -> one clean text each
    events       events -> checked and pinned
    embeddings   text -> vectors, in Ray Data actors
    quantizers   vectors -> codewords (registry fits one and keeps it)
    semantic_ids codewords -> Semantic IDs, unique and append-only
    sequences    events -> one history per user
    training     histories -> model, by one worker or several of Ray Train
    beam_search  model + trie -> ranked valid items
    recommendations  users -> top-K rows in Parquet; the same decoding, evaluated

`jobs/nightly.py` runs these in order. Every stage has a function `run(settings, storage, ...)`.
"""

from tiger_ray.config import Settings, load_settings
from tiger_ray.errors import TigerError

__all__ = ["Settings", "TigerError", "load_settings"]
__version__ = "0.1.0"
