"""The pages of `docs/` that follow from the code: settings, artifacts, command line, pictures of the architecture.

    python jobs/docs.py

A generated page is replaced as a whole. On other pages the text between `<!-- NAME -->` and `<!-- /NAME -->` is
replaced. `tests/repository/test_docs.py` fails while a page is stale.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.metadata import MODELS, Metadata, Metrics, TrainedMetadata
from tiger_ray.cli import reference
from tiger_ray.ids.semantic_ids import segment_of
from tiger_ray.settings import Settings
from tiger_ray.settings.base import Section
from tiger_ray.stages.night import NIGHT

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
PACKAGE = REPO / "tiger_ray"
ROOMS = {path.with_suffix("").name for path in PACKAGE.iterdir() if path.name != "__init__.py"}
GENERATED = "<!-- written by `python jobs/docs.py`; change the code, not this page -->"


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Every generated page, with the text that the code gives."""
    architecture = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for name, text in (("night", night()), ("stages", stages()), ("rooms", rooms()), ("imports", imports())):
        architecture = between(architecture, name, text)
    return {
        DOCS / "settings.md": settings_page(),
        DOCS / "artifacts.md": artifacts_page(),
        DOCS / "architecture.md": architecture,
        DOCS / "cli.md": reference.page(),
    }


def between(page: str, name: str, text: str) -> str:
    """The page with `text` between the two marks of `name`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    assert found, f"no {begin}"
    assert closed, f"no {end}"
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


# Settings


def settings_page() -> str:
    """All settings by section, those without a section first."""
    fields = Settings.model_fields
    plain = {name: field for name, field in fields.items() if not is_section(field.annotation)}
    lines = [
        "# Settings",
        "",
        GENERATED,
        "",
        "A setting comes from a YAML file (`--config FILE.yaml`, repeatable; the later file wins) or from the command",
        "line (`--section.name value`), which wins over files. `${NAME}` in a YAML file is the text of an environment",
        "variable. An unknown name is refused, with the nearest known one.",
        "",
        "*Changes results* says whether the setting is in the fingerprint of the stages that read it: a night with",
        "another value computes these stages again. The other settings are operational: they decide how fast a stage",
        "runs, or when a night is stopped.",
        "",
        *rows("", plain),
    ]
    for name, field in fields.items():
        if not is_section(field.annotation):
            continue
        section = field.annotation
        readers = [stage.name for stage in NIGHT if name in stage.sections]
        lines += ["", f"## {name}", "", first_paragraph(section.__doc__)]
        if readers:
            lines += ["", f"In the fingerprint of {words([f'`{reader}`' for reader in readers])}."]
        lines += ["", *rows(f"{name}.", section.model_fields)]
    return "\n".join(lines) + "\n"


def rows(prefix: str, fields: dict[str, Any]) -> Iterator[str]:
    """One line of a table for each setting."""
    yield "| setting | type | default | changes results | meaning |"
    yield "|---|---|---|---|---|"
    for name, field in fields.items():
        kind = type_of(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        extra = field.json_schema_extra
        operational = isinstance(extra, dict) and extra.get("operational")
        cells = [
            f"`{prefix}{name}`",
            kind,
            default_of(field),
            "no" if operational else "yes",
            field.description,
        ]
        yield "| " + " | ".join(cell(text) for text in cells) + " |"


def is_section(annotation: Any) -> bool:
    return is_a(Section, annotation)


def is_a(base: type, annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, base)


def default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "empty"
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def type_of(annotation: Any) -> str:
    """The type in words, with its limits."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [text for part in parts[1:] for text in limits_of(part)]
        return type_of(parts[0]) + (f" {', '.join(limits)}" if limits else "")
    if origin in (Union, UnionType):
        return type_of(next(part for part in parts if part is not type(None))) + ", or empty"
    if origin is Literal:
        return words([f"`{part}`" for part in parts], "or")
    if origin is tuple:
        return f"list of {type_of(parts[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "`true` or `false`"}
    return names.get(annotation, "day or time")


def limits_of(metadata: Any) -> Iterator[str]:
    """Limits that pydantic keeps beside a type, as text."""
    for part in getattr(metadata, "metadata", [metadata]):
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            limit = getattr(part, name, None)
            if limit is not None:
                # 0 and 0.0 are equal, so Python may give either for the same annotation.
                yield f"{sign} {limit:.15g}"


# Artifacts

ID = pa.large_string()
"""Stands for the type of an id, which is the type of the input."""

COLUMNS = {
    "item_id": "id of the item, as in the catalog",
    "title": "name of the item, for people; null where the catalog has none",
    "text": "text that the encoder reads; may be empty",
    "category": "category of the item; null where the catalog has none",
    "available": "true if the item may be recommended tonight",
    "vector": "the catalog's own embedding, if `catalog.vector` names one",
    "embedding": "embedding of the text",
    "text_hash": "hash of the text, which finds changed texts",
    "item_index": "number of the item in the registry, from 0; never given to another item",
    "codes": "the Semantic ID: a codeword per level, the disambiguator last",
    "eligible": "row n: true if item_index n may be recommended tonight",
    "user_id": "id of the user, as in the events",
    "user_hash": "hash of the user id, which decides the shard",
    "history": "item_index of each event, oldest first; may be empty",
    "events_before_validation": "events of the history from before `sequences.validation_from`, if it is set",
    "events_before_test": "events of the history from before `sequences.test_from`, if it is set",
    "events": "all events of the item",
    "training_events": "events that leave-one-out lets training see",
    "training_events_time": "events that the time split lets training see, if its moments are set",
    "target": "item_index of the held-out event",
    "history_length": "events that the ranker was given",
    "target_in_history": "true if the target is an item of the history",
    "popularity_rank": "rank of the target by popularity, 1 is first; number of places + 1 if the target is not among the most popular",
    "items": "item_index of the ranked items, best first, -1 after the last",
    "item_ids": "recommended items, best first; each in tonight's catalog and available",
    "scores": "natural log probability of a generated item; log share of all events of a fallback item; never increasing",
    "semantic_ids": "Semantic ID of each recommended item",
    "sources": "`generated` by the model, or `fallback`: most popular items, for a user without any known item",
    "rank": "place in the list, 1 is best",
    "score": "as `scores`",
    "semantic_id": "as `semantic_ids`",
    "source": "as `sources`",
    "date": "the night",
    "model_version": "run of the model",
    "semantic_ids_version": "run of the registry",
}
"""Meaning of each column of a published table."""

SEGMENT = segment_of(0, pa.array(["id"], ID), np.zeros((1, 3), np.int16), np.zeros(1, np.int16)).schema

File = tuple[str, str, Iterable[pa.Field]]
"""Name, what a file holds, columns of a Parquet file."""

FILES: dict[str, list[File]] = {
    "catalog": [
        (
            "shard-NNNNN.parquet",
            "one row per item, sorted by item_id",
            schemas.catalog(ID, pa.list_(pa.float32(), 1)),
        )
    ],
    "events": [
        (
            "counts.json",
            "counts of the events; the events stay where they are, and their files are pinned",
            (),
        )
    ],
    "embeddings": [
        (
            "shard-NNNNN.parquet",
            "one row per item, in the order of the catalog file",
            schemas.embeddings(ID, 1),
        )
    ],
    "quantizer": [
        ("quantizer.safetensors", "codebooks, and what standardizes embeddings", ()),
        ("quantizer.json", "kind, constructor arguments, version", ()),
    ],
    "semantic_ids": [
        (
            "segment-NNNNN-shard-NNNNN.parquet",
            "items that one night appended to the registry; never written again",
            SEGMENT,
        ),
        ("eligible.parquet", "one row per item of the registry", [pa.field("eligible", pa.bool_())]),
        ("counts-NNNNN.json", "items of each codeword", ()),
        ("report-NNNNN.json", "how good the Semantic IDs are", ()),
    ],
    "sequences": [
        ("shard-NNNNN.parquet", "one row per user", schemas.sequences(ID, has_moments=True)),
        (
            "popularity.parquet",
            "the most popular items, most popular first",
            schemas.popularity(has_moments=True),
        ),
    ],
    "model": [
        ("model.safetensors", "weights, with the names of Hugging Face's T5", ()),
        ("config.json", "shape of the model and of the ID space", ()),
        ("curve.json", "loss and validation metrics of each checkpoint, and the chosen checkpoint", ()),
    ],
    "evaluation": [
        ("metrics.json", "metrics with intervals, exposure, breakdowns and protocol", ()),
        ("shard-NNNNN.parquet", "one row per evaluated user", schemas.ranked_lists(1)),
    ],
    "recommendations": [
        (
            "shard-NNNNN.parquet",
            "`recommendations.form: wide`: one row per user",
            schemas.recommendations(ID, ID),
        ),
        (
            "shard-NNNNN.parquet",
            "`recommendations.form: long`: one row per user and rank",
            schemas.recommendations_long(ID, ID),
        ),
    ],
}
"""Files of each artifact."""


def artifacts_page() -> str:
    """Files and columns of every artifact, in the order of the night."""
    lines = [
        "# Artifacts",
        "",
        GENERATED,
        "",
        "Every stage publishes one artifact under its own name. Read an artifact through its manifest,",
        "`ROOT/<artifact>/date=<night>/_manifest.json`: its `files` name every file below `ROOT/<artifact>/` with rows,",
        "bytes and SHA-256. A file that no manifest names does not exist for a reader. `N` stands for a digit.",
        "",
        "The id columns have the type of the input: string, large string or int64.",
        "",
        "`metadata` of the manifest holds facts about the content; the last table of each artifact has its fields. A",
        "manifest that lacks a field, or has a wrong one, is refused with the name of the field. *May be left out* says",
        "that the field is newer than some published manifests.",
    ]
    for stage in NIGHT:
        lines += ["", f"## {stage.name}", "", f"{stage.does} (format version {stage.format_version})."]
        for name, what, columns in FILES[stage.name]:
            lines += ["", f"`{name}`: {what}."]
            fields = list(columns)
            if fields:
                lines += ["", "| column | type | meaning |", "|---|---|---|"]
            for field in fields:
                null = ", may be null" if field.nullable and field.name != "eligible" else ""
                lines.append(
                    f"| `{field.name}` | {arrow_type(field.type)}{null} | {cell(COLUMNS[field.name])} |"
                )
        lines += metadata_table(MODELS[stage.name])
    lines += [
        "",
        "## model-NAME, evaluation-NAME",
        "",
        "What `jobs/baseline.py` publishes: a trained baseline, and the evaluation of a baseline. The files of the",
        "evaluation, and its metadata, are those of `evaluation`.",
        *metadata_table(TrainedMetadata),
    ]
    return "\n".join(lines) + "\n"


def metadata_table(model: type[Metadata]) -> list[str]:
    """The metadata of an artifact as a table, below what it says of itself."""
    lines = ["", f"`metadata`: {first_paragraph(model.__doc__)}"]
    lines += ["", "| field | type | meaning |", "|---|---|---|", *metadata_rows("", model)]
    return lines


def metadata_rows(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """One line for each field of a model, and for each field of the models within."""
    for name, field in model.model_fields.items():
        annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        left_out = "" if field.is_required() else ", may be left out"
        yield f"| `{prefix}{name}` | {json_type(annotation)}{left_out} | {cell(field.description)} |"
        for part in (field.annotation, *get_args(field.annotation)):
            if is_a(BaseModel, part):
                yield from metadata_rows(f"{prefix}{name}.", part)
    if is_a(Metrics, model) or getattr(model, "has_metrics", False):
        yield f"| `{prefix}ndcg@10`, ... | number | Each metric by its name, a mean over users. |"
    elif model.model_config.get("extra") == "allow":
        yield f"| `{prefix}*` | any | Fields that a ranker adds. |"


def json_type(annotation: Any) -> str:
    """The type of a field in the words of JSON, with its limits."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return json_type(next(part for part in parts if part is not type(None))) + ", or null"
    if origin is tuple:
        return f"list of {json_type(parts[0])}"
    if annotation is dict or origin is dict or is_a(BaseModel, annotation) or is_dataclass(annotation):
        return "object"
    return type_of(annotation)


def arrow_type(kind: pa.DataType) -> str:
    """The type in words, without widths that a setting decides."""
    if pa.types.is_fixed_size_list(kind):
        return f"fixed-size list of {arrow_type(kind.value_type)}"
    if pa.types.is_list(kind):
        return f"list of {arrow_type(kind.value_type)}"
    return "id" if kind == ID else str(kind).replace("float", "float32").replace("float3232", "float32")


# Architecture


def night() -> str:
    """The pipeline as a picture: which stage reads which artifact."""
    lines = ["```mermaid", "flowchart LR"]
    lines += ["    your_items[(your items)] --> catalog", "    your_events[(your events)] --> events"]
    for stage in NIGHT:
        lines.append(f'    {stage.name}["<b>{stage.name}</b><br>{stage.does.replace("->", "to")}"]')
        lines += [f"    {name} --> {stage.name}" for name in stage.inputs]
    return "\n".join([*lines, "```"])


def stages() -> str:
    """The stages as a table: inputs, settings, format."""
    lines = [
        "| stage | does | reads | settings in its fingerprint | format version |",
        "|---|---|---|---|---|",
    ]
    for stage in NIGHT:
        reads, sections = (
            ", ".join(f"`{name}`" for name in names) for names in (stage.inputs, stage.sections)
        )
        cells = [f"`{stage.name}`", stage.does, reads, sections, str(stage.format_version)]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def own_imports() -> dict[str, set[str]]:
    """Room -> rooms that its files import, at any depth of their code."""
    found: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        names = []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
        parts = [name.split(".") for name in names if name.startswith("tiger_ray.")]
        found.setdefault(room, set()).update({part[1] for part in parts} & ROOMS - {room})
    return found


def heights(imported: dict[str, set[str]]) -> dict[str, int]:
    """Room -> its floor: 0 imports no room, n imports one of floor n - 1 and none above it."""
    height: dict[str, int] = {}
    while len(height) < len(imported):
        ready = {room for room, below in imported.items() if room not in height and below <= height.keys()}
        assert ready, f"a circle of imports among {sorted(imported.keys() - height.keys())}"
        height |= {room: 1 + max((height[name] for name in imported[room]), default=-1) for room in ready}
    return height


def rooms() -> str:
    """The rooms as a picture; imports that follow from other arrows are left out."""
    imported = own_imports()
    height = heights(imported)
    reached: dict[str, set[str]] = {}
    for room in sorted(imported, key=lambda room: height[room]):
        reached[room] = imported[room].union(*(reached[name] for name in imported[room]))
    lines = ["```mermaid", "flowchart BT"]
    for room in sorted(imported, key=lambda room: (height[room], room)):
        through = set().union(*(reached[name] for name in imported[room]))
        lines += [f"    {name} --> {room}" for name in sorted(imported[room] - through)]
    return "\n".join([*lines, "```"])


def imports() -> str:
    """The rooms as a table, from the ground up: what each holds, and every room that it imports."""
    imported = own_imports()
    height = heights(imported)
    lines = ["| room | holds | imports |", "|---|---|---|"]
    for room in sorted(imported, key=lambda room: (height[room], room)):
        file = PACKAGE / room / "__init__.py"
        said = ast.get_docstring(ast.parse((file if file.exists() else PACKAGE / f"{room}.py").read_text()))
        below = sorted(imported[room], key=lambda name: (height[name], name))
        lines.append(f"| `{room}` | {cell(first_paragraph(said))} | {', '.join(below)} |")
    arrows = sum(map(len, imported.values()))
    return "\n".join([*lines, "", f"{len(imported)} rooms, {arrows} arrows, no circle."])


# Words


def first_paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def words(names: list[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def cell(text: str | None) -> str:
    """Text that does not end a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
