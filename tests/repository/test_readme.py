"""The README says what is there."""

import re
from pathlib import Path

import pandas as pd
import pyarrow as pa

from tiger_ray import errors
from tiger_ray.artifacts.storage import Storage
from tiger_ray.settings.loading import setting_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"make (\w+)", README)) <= targets


def test_every_file_named_in_the_readme_exists():
    named = set(re.findall(r"\b(?:jobs|tiger_ray)/[\w/]+\.(?:py|yaml)\b", README)) | {
        "cluster.yaml",
        "constraints.txt",
    }
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_setting_named_in_the_readme_exists():
    names = set(setting_names())
    sections = {name.split(".")[0] for name in names if "." in name}
    named = {m for m in re.findall(r"\b([a-z_]+\.[a-z_]+)\b", README) if m.split(".")[0] in sections}
    others = {"ray.io"} | {
        f"{path.stem}.{suffix}"
        for folder in ("jobs", "tiger_ray")
        for path in (ROOT / folder).rglob("*")
        for suffix in ("py", "yaml")
    }
    assert len(named) > 10
    assert named - others <= names


def test_exit_codes_in_the_readme_are_those_of_the_errors():
    line = next(line for line in README.splitlines() if line.startswith("Exit codes:"))
    codes = {int(code) for code in re.findall(r"(\d+) [a-z]", line)}
    tree = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert codes == tree | {0, 130}


def test_the_reading_snippet_reads_what_is_published(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path / "demo" / "root"))
    run = storage.begin("recommendations", "f" * 64)
    files = [run.write_table(f"shard-{i:05d}.parquet", pa.table({"user_id": [f"u{i}"]})) for i in range(2)]
    storage.publish(run, date="2026-11-23", files=files, settings={}, inputs={}, metadata={})
    snippet = re.search(r"^    import json.*?(?=\n\n)", README, re.MULTILINE | re.DOTALL)
    assert snippet is not None
    monkeypatch.chdir(tmp_path)
    scope: dict[str, pd.DataFrame] = {}
    exec(re.sub(r"^    ", "", snippet[0], flags=re.MULTILINE), scope)  # our own README
    assert sorted(scope["frame"]["user_id"]) == ["u0", "u1"]
