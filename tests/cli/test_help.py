"""`--help` says what every setting means."""

import subprocess
import sys
from pathlib import Path

from tiger_ray.settings.base import Section
from tiger_ray.settings.loading import setting_names
from tiger_ray.settings.settings import Settings

REPO = Path(__file__).parents[2]


def fields(model=Settings):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation)
        else:
            yield name, field


def test_help_lists_every_setting_with_its_meaning():
    done = subprocess.run(
        [sys.executable, "jobs/nightly.py", "--help"], cwd=REPO, capture_output=True, text=True, check=True
    )
    shown = " ".join(done.stdout.split())
    missing = [name for name in setting_names() if f"--{name} " not in shown]
    assert not missing
    undocumented = [name for name, field in fields() if not field.description]
    assert not undocumented
    unexplained = [name for name, field in fields() if " ".join(field.description.split())[:40] not in shown]
    assert not unexplained
