"""A study: nights and baselines over several data sets, then one comparison of all of them.

    python jobs/studies/run.py jobs/studies/amazon.yaml --data "$TIGER_DATA"
    python jobs/studies/run.py jobs/studies/amazon.yaml --data "$TIGER_DATA" --sets beauty -- --training.num_steps 7000

Settings after `--` are given to the nights, beside those of the study. `--list` prints the commands and runs none.
The study stops at the first command that fails, with its exit code; the same command goes on there, because every
job skips what is published already.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file beside this one")
    parser.add_argument("--data", required=True, help="folder with one folder per data set")
    parser.add_argument("--sets", nargs="+", help="data sets to run (default: all of the study)")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, night_settings = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    study = yaml.safe_load(words.study.read_text(encoding="utf-8"))
    unknown = sorted({*(words.sets or ())} - {*study["sets"]})
    if unknown:
        parser.error(f"{words.study} has no data set {', '.join(unknown)}; it has {', '.join(study['sets'])}")
    if not words.list and not os.path.isdir(words.data):
        parser.error(f"--data is {words.data!r}, which is not a folder")
    data = os.path.abspath(words.data)
    for command in commands(study, data, words.sets or list(study["sets"]), night_settings):
        print("python", shlex.join(command), flush=True)
        if not words.list:
            done = subprocess.run(
                [sys.executable, *command], cwd=REPO, env={**os.environ, "TIGER_DATA": data}, check=False
            )
            if done.returncode:
                return done.returncode
    return 0


def commands(
    study: dict[str, Any], data: str, sets: Sequence[str], night_settings: Sequence[str]
) -> Iterator[list[str]]:
    """Words of each command after `python`, in the order in which they must run.

    Args:
        study: content of the YAML file.
        data: folder with one folder per data set.
        sets: data sets to run.
        night_settings: further settings of jobs/nightly.py, as words.
    """
    roots = []
    for name in sets:

        def filled(text: str, name: str = name) -> list[str]:
            return [word.format(data=data, set=name) for word in shlex.split(text)]

        root = study["root"].format(set=name)
        for night in study["nights"]:
            settings = [
                *filled(study["settings"]),
                *("--date", night["date"], "--storage.root", root),
                *filled(night["settings"]),
                *filled(study["sets"][name]),
            ]
            yield ["jobs/nightly.py", *settings, *night_settings]
            for rival in study["rivals"]:
                yield ["jobs/baseline.py", *settings, *filled(rival)]
            roots.append(f"{name} {night['name']}".strip() + f"={root}@{night['date']}")
    first = study["nights"][0]["date"]
    yield ["jobs/compare.py", "--date", first, *shlex.split(study["tables"]), *roots]


if __name__ == "__main__":
    sys.exit(main())
