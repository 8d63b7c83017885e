"""The job that makes a world to try everything on, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_job_prints_sizes_and_both_recalls_and_ends_with_the_exit_code(tmp_path):
    job = [sys.executable, str(ROOT / "jobs" / "synthesize.py"), "--out", str(tmp_path / "data")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    good = subprocess.run([*job, "--items", "200", "--users", "50"], capture_output=True, env=environment)
    assert good.returncode == 0
    assert b"200 items, 50 users" in good.stdout
    assert b"oracle recall@10" in good.stdout
    bad = subprocess.run([*job, "--items", "801"], capture_output=True, env=environment)
    assert bad.returncode == 2
    assert b"SettingsError: num_items is 801" in bad.stderr
