"""Section `semantic_ids`: disambiguation, and the thresholds that Semantic IDs must meet."""

from __future__ import annotations

from tiger_ray.settings.base import Count, LevelSize, Section, Share, operational


class SemanticIdsSettings(Section):
    """Codewords to unique Semantic IDs in an append-only registry; bad Semantic IDs stop the night before training."""

    disambiguator_size: LevelSize = 256
    """Items at most that share all learned codewords; the last codeword of a Semantic ID tells them apart."""
    min_usage: Share = operational(0.5)
    """Stop the night if a level uses a smaller share of its codewords, since then the codebook has collapsed."""
    min_perplexity: Share = operational(0.1)
    """Stop the night if the perplexity of a level, as a share of its size, is lower, since then few codewords hold most
    items."""
    max_disambiguated_share: Share = operational(0.5)
    """Stop the night if more than this share of the items shares all codewords with an earlier item."""
    report_sample_size: Count = 65_536
    """Measure reconstruction error, category purity and coverage on this number of items, rounded up to whole
    catalog files."""
