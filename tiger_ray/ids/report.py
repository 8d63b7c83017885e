"""Quality of Semantic IDs: collisions, use of codewords, purity of prefixes, and their thresholds.

M items of a sample, L levels, I id_length = L + 1, C codes of a level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger_ray.errors import QualityError
from tiger_ray.ids.semantic_ids import prefixes
from tiger_ray.settings.semantic_ids import SemanticIdsSettings


def describe(report: dict[str, Any]) -> Iterator[str]:
    """The ID report in a few lines for the log."""
    for number, level in enumerate(report["levels"]):
        yield f"level {number}: {level['used']} of {level['size']} codewords, perplexity {level['perplexity']:.1f}"
    yield (
        f"{report['disambiguated_share']:.1%} of {report['items']:,} items need the disambiguator, largest "
        f"group {report['largest_group']}"
    )
    sample = report["sample"]

    def words(values: Iterable[float | None]) -> str:
        return ", ".join("-" if value is None else f"{value:.1%}" for value in values)

    error = sample["reconstruction_error"]
    yield f"reconstruction error {words(error.values())} of the variance (items learned from, unseen items)"
    yield f"category purity by level {words(sample['purity'])}; by chance {words(sample['purity_by_chance'])}"
    yield f"coverage of {sample['unseen']:,} unseen items by level {words(sample['coverage'])}"


def count_codes(codes_MI: npt.NDArray[np.int16], level_sizes: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Items per code of each level, I arrays of (C,) int64. The counts of several batches may be added."""
    return [np.bincount(codes_MI[:, level], minlength=size) for level, size in enumerate(level_sizes)]


def id_report(counts: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """Collisions and use of codewords of a registry, ready for JSON.

    Args:
        counts: result of `count_codes` for the whole registry.

    Returns:
        `items`, their number; `prefixes`, the number of distinct rows of codewords; `disambiguated_share`,
        the share of items that are not the first of their prefix, 1 - prefixes / items; `largest_group`, the
        most items of one prefix; `group_sizes`, the number of prefixes for each number of items; `levels`, for
        each level its `size`, the number of codewords `used`, their share `usage`, and the `perplexity`: exp
        of the entropy in nats of the codewords' frequencies, at most `size`.
    """
    *codewords, disambiguator_C = counts
    items = int(disambiguator_C.sum())
    # A prefix of k items holds the disambiguators 0 to k - 1: items with disambiguator k - 1 count the
    # prefixes with at least k items.
    at_least = np.append(disambiguator_C, 0)
    group_sizes = at_least[:-1] - at_least[1:]
    levels = []
    for count_C in codewords:
        share = count_C[count_C > 0] / max(items, 1)
        levels.append(
            {
                "size": len(count_C),
                "used": len(share),
                "usage": len(share) / len(count_C),
                "perplexity": float(np.exp(-(share * np.log(share)).sum())) if items else 0.0,
            }
        )
    return {
        "items": items,
        "prefixes": int(at_least[0]),
        "disambiguated_share": 1 - int(at_least[0]) / items if items else 0.0,
        "largest_group": int(np.count_nonzero(at_least)),
        "group_sizes": {str(size + 1): int(group_sizes[size]) for size in np.flatnonzero(group_sizes)},
        "levels": levels,
    }


def sample_report(
    codewords_ML: npt.NDArray[np.int16],
    level_sizes: Sequence[int],
    category_M: npt.NDArray[np.int64],
    error_M: npt.NDArray[np.float32],
    variance: float,
    seen_M: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """Reconstruction error, coverage and purity of a sample of the items, ready for JSON.

    Args:
        codewords_ML: (M, L) int16.
        level_sizes: (I,) codewords of each level, then the disambiguator's size.
        category_M: number of each item's category, (M,) int64; -1 for an item without a category.
        error_M: squared distance of each item's embedding from its reconstruction, (M,) float32.
        variance: mean squared distance of the embeddings from their mean.
        seen_M: true for an item that the quantizer learned from, (M,) bool.

    Returns:
        `items` and `unseen`, numbers of items; `reconstruction_error`, of seen and of unseen items, as a share
        of the variance; `coverage`, the share of unseen items whose first 1, 2, ... L codewords a seen item has
        too; `purity`, for each level the share of items with the commonest category of their prefix; and
        `purity_by_chance`, the purity with shuffled categories. Only purity above chance shows meaning.
    """
    unseen_M, known_M = ~seen_M, category_M >= 0
    shuffled_M = category_M.copy()
    shuffled_M[known_M] = np.random.default_rng(0).permutation(category_M[known_M])
    coverage, purity, by_chance = [], [], []
    for length in range(1, len(level_sizes)):
        # `prefixes` ignores the last size, so the slice is one longer.
        prefix_M = prefixes(codewords_ML, level_sizes[: length + 1])
        coverage.append(_share(np.isin(prefix_M[unseen_M], prefix_M[seen_M])))
        purity.append(_purity(prefix_M[known_M], category_M[known_M]))
        by_chance.append(_purity(prefix_M[known_M], shuffled_M[known_M]))
    scale = max(variance, 1e-30)
    return {
        "items": len(codewords_ML),
        "unseen": int(unseen_M.sum()),
        "reconstruction_error": {
            name: float(error_M[mask].mean(dtype=np.float64) / scale) if mask.any() else None
            for name, mask in (("seen", seen_M), ("unseen", unseen_M))
        },
        "coverage": coverage,
        "purity": purity,
        "purity_by_chance": by_chance,
    }


def require_quality(report: Mapping[str, Any], settings: SemanticIdsSettings) -> None:
    """Refuse Semantic IDs that are too coarse to train a model on.

    Args:
        report: result of `id_report`.
        settings: section `semantic_ids`, with the thresholds.

    Raises:
        QualityError: names each value beyond its threshold, and the settings to change.
    """
    found = []
    for number, level in enumerate(report["levels"]):
        # A catalog smaller than the level cannot use all of it.
        possible = min(level["size"], report["items"])
        if level["used"] < settings.min_usage * possible:
            found.append(
                f"level {number} uses {level['used']} of {level['size']} codewords (semantic_ids.min_usage "
                f"{settings.min_usage})"
            )
        if level["perplexity"] < settings.min_perplexity * possible:
            found.append(
                f"level {number} has a perplexity of {level['perplexity']:.1f} of {level['size']} "
                f"(semantic_ids.min_perplexity {settings.min_perplexity})"
            )
    share = report["disambiguated_share"]
    if report["levels"] and share > settings.max_disambiguated_share:
        found.append(
            f"{share:.1%} of {report['items']:,} items share all codewords with an earlier one "
            f"(semantic_ids.max_disambiguated_share {settings.max_disambiguated_share})"
        )
    if found:
        raise QualityError(
            f"the Semantic IDs are not fit to train on, nothing was published: {'; '.join(found)}. Change "
            "quantizer.kind or quantizer.level_sizes, look for items with equal texts, or change the threshold if "
            "you can explain the value"
        )


def _purity(prefix_M: npt.NDArray[np.int64], category_M: npt.NDArray[np.int64]) -> float | None:
    if not len(prefix_M):
        return None
    group_M = np.unique(prefix_M, return_inverse=True)[1]
    pairs, counts = np.unique(np.stack([group_M, category_M]), axis=1, return_counts=True)
    commonest = np.zeros(pairs[0].max() + 1, np.int64)
    np.maximum.at(commonest, pairs[0], counts)
    return int(commonest.sum()) / len(prefix_M)


def _share(mask: npt.NDArray[np.bool_]) -> float | None:
    return float(mask.mean()) if len(mask) else None
