"""Generated pages are those that the code gives, and the generator knows what a reader needs."""

import importlib.util
import re
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tests.manifests import metadata_of
from tests.repository.test_layout import APART, FLOORS
from tiger_ray.artifacts.metadata import MODELS
from tiger_ray.settings.base import Section, operational
from tiger_ray.settings.loading import setting_names
from tiger_ray.stages.night import NIGHT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def docs():
    """The module `jobs/docs.py`."""
    spec = importlib.util.spec_from_file_location("jobs_docs", ROOT / "jobs" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(docs):
    stale = [
        page.name for page, text in docs.pages().items() if not page.exists() or page.read_text() != text
    ]
    assert not stale, "run `python jobs/docs.py`, and commit the pages"


def test_the_page_of_settings_has_every_setting_once(docs):
    listed = re.findall(r"^\| `([\w.]+)` \|", docs.settings_page(), re.MULTILINE)
    assert sorted(listed) == sorted(setting_names())


def test_operational_settings_are_marked_and_types_have_their_limits(docs):
    class Planted(Section):
        """Planted."""

        share: Annotated[float, Field(ge=0.0, le=0.5)] | None = operational(None)
        """A share | a part."""
        kinds: tuple[Literal["a", "b"], ...] = ("a",)
        """Kinds."""

    assert list(docs.rows("planted.", Planted.model_fields))[2:] == [
        "| `planted.share` | number ≥ 0, ≤ 0.5, or empty | empty | no | A share \\| a part. |",
        "| `planted.kinds` | list of `a` or `b` | `[a]` | yes | Kinds. |",
    ]


def test_every_artifact_of_the_night_has_files_and_every_column_a_meaning(docs):
    assert list(docs.FILES) == [stage.name for stage in NIGHT]
    columns = {field.name for files in docs.FILES.values() for _, _, fields in files for field in fields}
    assert columns == set(docs.COLUMNS)


def test_the_metadata_of_a_real_artifact_has_a_row_for_every_field(docs):
    page = docs.artifacts_page()
    for artifact in MODELS:
        section = page.partition(f"\n## {artifact}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `([^`]+)`.*\| (.*) \|$", section.partition("`metadata`: ")[2], re.MULTILINE)
        assert {name for name in metadata_of(artifact) if "@" not in name} <= {name for name, _ in rows}
        assert all(meaning not in ("", "None") for _, meaning in rows)


def test_models_within_a_model_are_listed_by_their_dotted_names(docs):
    class Inner(BaseModel):
        """Inner."""

        model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

        share: Annotated[float, Field(le=1.0)] | None = None
        """A share."""

    class Outer(BaseModel):
        """Outer."""

        model_config = ConfigDict(use_attribute_docstrings=True)

        inner: Inner
        """Inner values."""
        sizes: tuple[int, ...]
        """Sizes."""

    assert list(docs.metadata_rows("", Outer)) == [
        "| `inner` | object | Inner values. |",
        "| `inner.share` | number ≤ 1, or null, may be left out | A share. |",
        "| `inner.*` | any | Fields that a ranker adds. |",
        "| `sizes` | list of integer | Sizes. |",
    ]


def test_arrow_types_are_told_in_words(docs):
    assert docs.arrow_type(pa.list_(pa.list_(pa.int16()))) == "list of list of int16"
    assert docs.arrow_type(pa.list_(pa.float32(), 7)) == "fixed-size list of float32"
    assert docs.arrow_type(docs.ID) == "id"


def test_rooms_are_drawn_once_and_above_what_they_import(docs):
    height = docs.heights(docs.own_imports())
    assert set(height) == {*FLOORS, *APART}
    arrows = re.findall(r"(\w+) --> (\w+)", docs.rooms())
    assert arrows
    assert all(height[below] < height[above] for below, above in arrows)


def test_the_picture_leaves_out_only_arrows_that_others_imply(docs):
    imported = docs.own_imports()
    drawn = {room: set() for room in imported}
    for below, above in re.findall(r"(\w+) --> (\w+)", docs.rooms()):
        drawn[above].add(below)

    def reached(room, arrows):
        found = set()
        for below in arrows[room]:
            found |= {below} | reached(below, arrows)
        return found

    for room in imported:
        assert drawn[room] <= imported[room]
        assert reached(room, drawn) == reached(room, imported)


def test_a_circle_of_imports_has_no_floor(docs):
    with pytest.raises(AssertionError, match="circle"):
        docs.heights({"a": {"b"}, "b": {"a"}, "c": set()})


def test_text_outside_of_the_marks_is_kept(docs):
    page = "before\n<!-- x -->\nold\n<!-- /x -->\nafter\n"
    assert docs.between(page, "x", "new") == "before\n<!-- x -->\n\nnew\n\n<!-- /x -->\nafter\n"


def test_the_page_of_a_study_has_a_table_of_each_set_and_night_between_its_marks():
    study = yaml.safe_load((ROOT / "jobs" / "studies" / "amazon.yaml").read_text())
    words = study["tables"].split()
    page = (ROOT / words[words.index("--markdown") + 1]).read_text()
    between = page.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    tables = re.findall(r"^\*\*(.+)\*\*$", between, re.MULTILINE)
    assert tables == [
        f"{name} {night['name']}".strip() for name in study["sets"] for night in study["nights"]
    ]
