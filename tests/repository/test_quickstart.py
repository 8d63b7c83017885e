"""docs/quickstart.md, followed literally: the data that its script writes, under its settings."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.worlds import MONDAY
from tiger_ray.cli.check import run_checks
from tiger_ray.data.text import clean_rows
from tiger_ray.errors import DataError
from tiger_ray.ids import quantizers
from tiger_ray.ids.encoders import make_encoder
from tiger_ray.settings.loading import load_settings
from tiger_ray.settings.quantizer import QuantizerSettings

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
SCRIPT, READING = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(SETTINGS,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
WORDS = ["--config", "my.yaml", "--date", MONDAY]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with what the script writes, and the settings."""
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(SETTINGS)
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
    return tmp_path


@pytest.mark.usefixtures("shop")
def test_a_night_can_start_on_the_data_of_the_page():
    lines = run_checks(WORDS, data=True)
    assert {name: line.text for name, line in lines.items() if line.status != "ok"} == {}
    assert lines["catalog"].text.startswith("60 items in ")
    assert lines["event rows"].text.startswith("all 1,702 rows")


@pytest.mark.parametrize("name", ["items", "purchases"])
def test_the_rows_of_the_page_are_the_first_of_the_files(name, shop):
    frame = pd.read_parquet(shop / "my" / name).head().astype(str)
    head = f"| {' | '.join(frame.columns)} |\n|{'---|' * len(frame.columns)}\n"
    assert head + "".join(f"| {' | '.join(row)} |\n" for row in frame.to_numpy()) in PAGE


def test_the_default_levels_refuse_the_shop_with_the_message_of_the_page(shop):
    settings = load_settings(WORDS)
    rows = clean_rows(pq.read_table(shop / "my" / "items"), settings.catalog, pa.string(), None)
    embedding_ND = make_encoder(settings.embeddings).encode(rows.column("text").to_pylist())
    with pytest.raises(DataError) as refused:
        quantizers.fit(QuantizerSettings(), [embedding_ND], seed=0)
    assert f"`{refused.value}`" in " ".join(PAGE.split())
