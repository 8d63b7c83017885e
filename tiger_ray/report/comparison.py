"""Evaluations of several rankers -> one table: each ranker beside the reference and beside published results.

Only the paired differences to the reference are computed here; all other values come from the evaluations.

C cells of a count by rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.errors import ArtifactError
from tiger_ray.evaluation.metrics import differences
from tiger_ray.published.evaluation import load_metrics, paired_counts, recall_of

LOSSES = {"softmax": "softmax", "binary": "binary loss"}
"""Loss in the name of an artifact -> in the label of a row."""


MAPS = {"": "", "-map": ", output map"}
"""Output map in the name of an artifact -> in the label of a row."""


INDEXES = {"": "", "-hnsw": ", FAISS HNSW", "-ivf": ", FAISS IVF"}
"""Index in the name of an artifact -> in the label of a row."""


LABELS = {
    "evaluation": "TIGER",
    **{
        f"evaluation-sasrec-{loss}{mapped}{index}": f"SASRec, {LOSSES[loss]}{MAPS[mapped]}{INDEXES[index]}"
        for loss, mapped, index in product(LOSSES, MAPS, INDEXES)
    },
    "evaluation-neighbours": "neighbours of the last item, content",
    "evaluation-popularity": "popularity",
}
"""Artifact of an evaluation -> label of its row."""


EXACT = {
    name: name.removesuffix(index) for index in INDEXES if index for name in LABELS if name.endswith(index)
}
"""Evaluation with an approximate index -> evaluation of the same model with exact search."""


PRINTED = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
"""Metrics of published results."""


TOP = 10
"""Places of an exact list that are compared with the list of an approximate index."""


@dataclass(frozen=True)
class Row:
    """One ranker on one data set.

    >>> line = {"method": "TIGER", "recall@5": "0.04", "ndcg@5": "0.03", "recall@10": "", "ndcg@10": "",
    ...     "protocol": "as printed"}
    >>> published_row(line).metrics
    {'recall@5': {'value': 0.04}, 'ndcg@5': {'value': 0.03}}
    """

    method: str
    metrics: Mapping[str, Any]
    """Metric -> value, low and high; a published metric has only a value."""
    protocol: Mapping[str, Any] | str
    difference: Mapping[str, Any] | None = None
    """Metric -> difference to the reference, with its paired interval."""
    details: Mapping[str, Any] | None = None
    """All other values of the evaluation."""


def rows_of(storage: Storage, date: str, reference: str) -> list[Row]:
    """A row for each evaluation that is published for a date.

    Args:
        storage: root of the artifacts.
        date: night, YYYY-MM-DD.
        reference: artifact of the evaluation to compare with, one of `LABELS`.

    Raises:
        ArtifactError: no evaluation is published for the date.
        DataError: an evaluation and the reference differ in protocol, users or targets.
    """
    found: dict[str, Manifest] = {}
    for artifact in LABELS:
        published = storage.published(artifact, date)
        if published is not None:
            found[artifact] = published
    if not found:
        raise ArtifactError(
            f"no evaluation is published under {storage.uri('evaluation')} for {date}; run "
            "`tiger-ray run evaluation`, or jobs/baseline.py for a baseline, for that date first"
        )
    return [
        _row(storage, artifact, manifest, found.get(reference), found.get(EXACT.get(artifact, "")))
        for artifact, manifest in found.items()
    ]


def _row(
    storage: Storage,
    artifact: str,
    evaluated: Manifest,
    reference: Manifest | None,
    exact: Manifest | None,
) -> Row:
    found = load_metrics(storage, evaluated)
    difference = None
    if reference is not None and reference.run_id != evaluated.run_id:
        ks = evaluated.setting("evaluation", "ks")
        joint_CC = paired_counts(storage, evaluated, reference, _places(evaluated))
        estimates = differences(joint_CC, ks, seed=evaluated.setting("seed"))
        difference = {name: asdict(estimate) for name, estimate in estimates.items()}
    apart = ("model", "protocol", "periods", "training", "tied_share")
    details = {name: value for name, value in found.items() if name not in apart}
    if exact is not None and evaluated.input("model") == exact.input("model") and _places(evaluated) >= TOP:
        details["shown"] = {**found["shown"], "of_exact": recall_of(storage, evaluated, exact, TOP)}
    # The gate ignores periods and training budget, but readers of the table need them.
    protocol = {**found["protocol"], "periods": found["periods"], "training": found["training"]}
    return Row(LABELS[artifact], found["model"], protocol, difference, details)


def _places(evaluated: Manifest) -> int:
    return max(evaluated.setting("evaluation", "ks"))


def published_row(line: Mapping[str, str]) -> Row:
    """A row of published results, from a line of published.csv; some values may be missing."""
    metrics = {name: {"value": float(line[name])} for name in PRINTED if line[name]}
    return Row(line["method"], metrics, line["protocol"])


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON values."""
    return [asdict(row) for row in rows]


def markdown(rows: Sequence[Row], published: Sequence[Row], reference: str) -> str:
    """Tables in Markdown: accuracy and protocol of all rows, then the shown items of our rows.

    Args:
        rows: our evaluations, at least one.
        published: rows of published results.
        reference: artifact of the reference, one of `LABELS`.
    """
    ks = sorted({int(name.removeprefix("recall@")) for name in rows[0].metrics if name.startswith("recall@")})
    names = [f"{metric}@{k}" for k in ks for metric in ("recall", "ndcg")]
    titles = [name.replace("recall", "Recall").replace("ndcg", "NDCG") for name in names]
    titles += [f"{titles[-1]} less that of {LABELS[reference]}", "protocol"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    common = _common(rows)
    for row in [*rows, *published]:
        cells = [_cell(row.metrics.get(name)) for name in names]
        difference = _difference(row, names[-1])
        lines.append("| " + " | ".join([row.method, *cells, difference, _protocol(row, common)]) + " |")
    users = rows[0].details["users"] if rows[0].details else 0
    lines += [
        "",
        f"{users:,} users. Our rows: {_words(common)}. In brackets 95 % bootstrap intervals over users.",
    ]
    shown = [
        ("catalog coverage", "coverage", "{:.1%}"),
        ("Gini index", "gini", "{:.3f}"),
        ("mean popularity rank", "popularity_rank", "{:,.0f}"),
        ("cold items", "cold_share", "{:.2%}"),
        ("entropy of categories", "entropy", "{:.2f}"),
        ("invalid", "invalid_share", "{:.2%}"),
        (f"of the exact top {TOP}", "of_exact", "{:.2%}"),
    ]
    lines += [
        "",
        "| what is shown | " + " | ".join(title for title, _, _ in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for row in rows:
        values = (row.details or {}).get("shown", {})
        cells = [form.format(values[name]) if name in values else "" for _, name, form in shown]
        lines.append("| " + " | ".join([row.method, *cells]) + " |")
    return "\n".join(lines)


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return ""
    interval = f" ({metric['low']:.4f} to {metric['high']:.4f})" if "low" in metric else ""
    return f"{metric['value']:.4f}{interval}"


def _difference(row: Row, name: str) -> str:
    found = (row.difference or {}).get(name)
    return "" if found is None else f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _common(rows: Sequence[Row]) -> dict[str, Any]:
    """The part of the protocol that all rows share."""
    protocols = [row.protocol for row in rows if not isinstance(row.protocol, str)]
    return {
        name: value
        for name, value in protocols[0].items()
        if all(name in other and other[name] == value for other in protocols)
    }


def _protocol(row: Row, common: Mapping[str, Any]) -> str:
    if isinstance(row.protocol, str):
        return row.protocol
    return _words({name: value for name, value in row.protocol.items() if name not in common})


def _words(protocol: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in protocol.items() if value is not None
    )
