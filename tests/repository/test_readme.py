"""README.md and the pages of docs/ say what is there."""

import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from tiger_ray import errors
from tiger_ray.artifacts.storage import Storage
from tiger_ray.settings.loading import setting_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in [ROOT / "README.md", *ROOT.rglob("docs/**/*.md")]
}
ALL = "\n".join(PAGES.values())


def test_the_readme_is_a_door_and_not_a_book():
    assert len(README.splitlines()) <= 150


def test_every_make_target_in_the_docs_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"make (\w+)", README))
    assert set(re.findall(r"(?:`|^    )make (\w+)", ALL, re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_in_the_docs_exists(page):
    named = set(re.findall(r"\b(?:jobs|tiger_ray|tests|docs)/[\w/]+\.(?:py|yaml|md|csv)\b", PAGES[page]))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_names_files():
    assert len(set(re.findall(r"\b(?:jobs|tiger_ray)/[\w/]+\.(?:py|yaml)\b", README))) > 5
    assert (ROOT / "cluster.yaml").exists()
    assert (ROOT / "constraints.txt").exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


def anchors(text):
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_named_in_the_docs_exists(page):
    names = set(setting_names())
    sections = {name.split(".")[0] for name in names if "." in name}
    text = PAGES[page]
    if page == "docs/artifacts.md":  # the tables name fields of manifests, such as `model.users`
        text = re.sub(r"^\| `[^`]+`", "", text, flags=re.MULTILINE)
    words = re.findall(r"(?<![\w/.])([a-z_]+\.[a-z][a-z_]*)\b(?![/(.])", text)
    named = {word for word in words if word.split(".")[0] in sections}
    others = {"ray.io"} | {
        f"{path.stem}{path.suffix}"
        for folder in ("jobs", "tiger_ray", "docs")
        for path in (ROOT / folder).rglob("*.*")
    }
    files = {f"{name}.{ending}" for name in ("model", "quantizer") for ending in ("safetensors", "json")}
    assert named - others - files <= names


def test_the_docs_name_settings():
    names = set(setting_names())
    operations = set(re.findall(r"`(?:--)?([a-z_]+\.[a-z_]+)", PAGES["docs/operations.md"])) & names
    assert len(operations) > 10


def test_exit_codes_in_the_docs_are_those_of_the_errors():
    table = PAGES["docs/operations.md"].partition("## Exit codes")[2].partition("###")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    tree = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert codes == tree | {0, 1, 130}


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
