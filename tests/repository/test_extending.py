"""docs/extending.md, followed literally: every block is saved under its name, and every command is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.worlds import MONDAY, publish
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.ids.semantic_ids import segment_of

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^    python (.+)$", PAGE, re.MULTILINE)
LONGEST = 35
"""Lines of code of an example that a reader should write."""


@pytest.fixture
def saved(tmp_path):
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def run(words, folder):
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(REPO)])}
    return subprocess.run(
        [sys.executable, *words.split()], cwd=folder, capture_output=True, text=True, env=os.environ | paths
    )


def test_every_block_is_a_file_and_every_test_has_its_command():
    assert PAGE.count("```python") == len(FILES)
    tests = {name for name in FILES if name.startswith("test_")}
    assert {command.split()[-1] for command in COMMANDS if "pytest" in command} == tests
    assert len(COMMANDS) == len(tests) + 1


@pytest.mark.parametrize("name", ["my_ranker.py", "my_quantizer.py", "my_encoder.py"])
def test_an_example_is_short(name):
    lines = [
        line for line in FILES[name].splitlines() if line.strip() and not re.match(r"(from|import) ", line)
    ]
    assert len(lines) <= LONGEST


def test_the_tests_of_the_page_pass(saved):
    tests = sorted(name for name in FILES if name.startswith("test_"))
    done = run(f"-m pytest -q -p no:cacheprovider {' '.join(tests)}", saved)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_trial_counts_what_came_next(saved):
    """Three of four users go from 2 to 3, which Transitions has first, and Popularity fourth."""
    storage = Storage(str(saved / "root"))
    histories = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 4], [2, 3], [2, 3]]
    users = pa.table(
        [
            [f"u{user}" for user in range(len(histories))],
            pa.array(range(len(histories)), pa.uint64()),
            pa.array(histories, pa.list_(pa.int32())),
        ],
        schema=schemas.sequences(pa.string()),
    )
    publish(storage, "sequences", {"shard-00000.parquet": users}, {})
    eligible = [True, True, True, True, False]
    segment = segment_of(0, pa.array(list("abcde")), np.arange(5, dtype=np.int16)[:, None], np.zeros(5, int))
    publish(
        storage,
        "semantic_ids",
        {"segment-00000-shard-00000.parquet": segment, "eligible.parquet": pa.table({"eligible": eligible})},
        {"level_sizes": [5, 1]},
    )
    done = run(f"try_my_ranker.py root {MONDAY}", saved)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^(\w+) +(\w+)@10 +(\S+) \(", done.stdout, re.MULTILINE)
    metric = {(ranker, name): float(value) for ranker, name, value in shown}
    assert done.stdout.endswith("\n4 users\n")
    assert metric["Transitions", "recall"] == metric["Transitions", "mrr"] == 0.75
    assert (metric["Popularity", "recall"], metric["Popularity", "mrr"]) == (0.75, 0.1875)
