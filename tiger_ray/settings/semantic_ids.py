"""Section `semantic_ids`: disambiguation, and how good Semantic IDs must be."""

from __future__ import annotations

from tiger_ray.settings.base import Count, LevelSize, Section, Share, operational


class SemanticIdsSettings(Section):
    """Codewords to unique Semantic IDs, in an append-only registry, judged before anything is trained on them."""

    disambiguator_size: LevelSize = 256
    """Items that may share all codewords; the last codeword of a Semantic ID counts them."""
    min_usage: Share = operational(0.5)
    """Stop the night if a level uses a smaller share of its codewords: the codebook has collapsed."""
    min_perplexity: Share = operational(0.1)
    """Stop the night if the perplexity of a level, as a share of its size, is lower: few codewords hold most items."""
    max_disambiguated_share: Share = operational(0.5)
    """Stop the night if more than this share of the items shares all codewords with an earlier item."""
    report_sample_size: Count = 65_536
    """Items that reconstruction error, category purity and coverage are measured on: so many, and up to the end
    of their catalog file."""
