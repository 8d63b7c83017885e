"""Evaluations of several rankers and data sets -> one table: each beside the reference, user by user, and beside print.

Nothing is computed that an evaluation does not hold already, but for the paired differences.
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


MAPS = {"": "", "-map": ", output map"}


INDEXES = {"": "", "-hnsw": ", FAISS HNSW", "-ivf": ", FAISS IVF"}


LABELS = {
    "evaluation": "TIGER",
    **{
        f"evaluation-sasrec-{loss}{mapped}{index}": f"SASRec, {LOSSES[loss]}{MAPS[mapped]}{INDEXES[index]}"
        for loss, mapped, index in product(LOSSES, MAPS, INDEXES)
    },
    "evaluation-neighbours": "neighbours of the last item, content",
    "evaluation-popularity": "popularity",
}
"""Artifacts that are looked for, and what their rows are called."""


EXACT = {
    name: name.removesuffix(index) for index in INDEXES if index for name in LABELS if name.endswith(index)
}
"""What an approximate index looks for: the lists of the same model, ranked exactly."""


PRINTED = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
"""Metrics of published tables."""


TOP = 10
"""Places of an exact list that an approximate one is held against."""


@dataclass(frozen=True)
class Row:
    """One ranker on one data set."""

    method: str
    metrics: Mapping[str, Any]
    """As in the evaluation: value, low and high by name; published ones have a value alone."""
    protocol: Mapping[str, Any] | str
    difference: Mapping[str, Any] | None = None
    """What it has more than the reference, with its paired interval."""
    details: Mapping[str, Any] | None = None
    """All else that the evaluation found."""


def rows_of(storage: Storage, date: str, reference: str) -> list[Row]:
    """A row for each evaluation that is published for the date; `reference` is one of `LABELS`.

    Raises:
        ArtifactError: there is none.
        DataError: two of them are not of the same protocol, users and targets.
    """
    found: dict[str, Manifest] = {}
    for artifact in LABELS:
        published = storage.published(artifact, date)
        if published is not None:
            found[artifact] = published
    if not found:
        raise ArtifactError(
            f"no evaluation is published under {storage.uri('evaluation')} for {date}; run jobs/nightly.py or "
            "jobs/baseline.py for that date first"
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
        ks = evaluated.settings["evaluation"]["ks"]
        joint_CC = paired_counts(storage, evaluated, reference, _places(evaluated))
        estimates = differences(joint_CC, ks, seed=evaluated.settings["seed"])
        difference = {name: asdict(estimate) for name, estimate in estimates.items()}
    apart = ("model", "protocol", "periods", "training")
    details = {name: value for name, value in found.items() if name not in apart}
    if exact is not None and evaluated.inputs["model"] == exact.inputs["model"] and _places(evaluated) >= TOP:
        details["shown"] = {**found["shown"], "of_exact": recall_of(storage, evaluated, exact, TOP)}
    # the budget is no part of the protocol that a night is held to, but of what a reader has to know
    protocol = {**found["protocol"], "periods": found["periods"], "training": found["training"]}
    return Row(LABELS[artifact], found["model"], protocol, difference, details)


def _places(evaluated: Manifest) -> int:
    return max(evaluated.settings["evaluation"]["ks"])


def published_row(line: Mapping[str, str]) -> Row:
    """A row of somebody else's table, as a line of published.csv has it; not every value is published."""
    metrics = {name: {"value": float(line[name])} for name in PRINTED if line[name]}
    return Row(line["method"], metrics, line["protocol"])


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with everything they hold."""
    return [asdict(row) for row in rows]


def markdown(rows: Sequence[Row], published: Sequence[Row], reference: str) -> str:
    """Accuracy and protocol of our rows, those of published rows, and what ours show."""
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
    """What all protocols agree in."""
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
