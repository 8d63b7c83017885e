"""A study runs the nights, their rivals and one comparison, each with the settings that its YAML file names."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
STUDY = "jobs/studies/amazon.yaml"


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "jobs/studies/run.py", *words],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


BEAUTY = (
    "--config jobs/amazon.yaml --catalog.uri /data/beauty/items.parquet "
    "--events.uri /data/beauty/interactions.parquet --date 2026-11-23 --storage.root data/amazon/beauty"
)
SPORTS_MASKED = (
    "--config jobs/amazon.yaml --catalog.uri /data/sports/items.parquet "
    "--events.uri /data/sports/interactions.parquet --date 2026-11-24 --storage.root data/amazon/sports "
    "--evaluation.exclude_history true --config jobs/sports.yaml"
)


def test_the_study_of_amazon_lists_a_night_and_five_rivals_for_each_set_and_date_and_then_compares():
    listed = run(STUDY, "--data", "/data", "--list", "--", "--training.num_steps", "7000").stdout.splitlines()
    assert len(listed) == 3 * 2 * (1 + 5) + 1
    assert listed[:6] == [
        f"python jobs/nightly.py {BEAUTY} --training.num_steps 7000",
        f"python jobs/baseline.py {BEAUTY} --baseline.kind popularity",
        f"python jobs/baseline.py {BEAUTY} --baseline.kind neighbours",
        f"python jobs/baseline.py {BEAUTY} --config jobs/sasrec.yaml",
        f"python jobs/baseline.py {BEAUTY} --config jobs/sasrec.yaml --baseline.index hnsw",
        f"python jobs/baseline.py {BEAUTY} --config jobs/sasrec.yaml --sasrec.loss binary",
    ]
    assert listed[-7] == f"python jobs/nightly.py {SPORTS_MASKED} --training.num_steps 7000"
    assert listed[-2] == (
        f"python jobs/baseline.py {SPORTS_MASKED} --config jobs/sasrec.yaml --sasrec.loss binary"
    )
    assert listed[-1] == (
        "python jobs/compare.py --date 2026-11-23 --markdown docs/results/amazon.md --json docs/results/amazon.json "
        "beauty=data/amazon/beauty@2026-11-23 'beauty masked=data/amazon/beauty@2026-11-24' "
        "toys=data/amazon/toys@2026-11-23 'toys masked=data/amazon/toys@2026-11-24' "
        "sports=data/amazon/sports@2026-11-23 'sports masked=data/amazon/sports@2026-11-24'"
    )


def test_a_study_of_one_set_compares_that_set_alone():
    listed = run(STUDY, "--data", "/data", "--sets", "toys", "--list").stdout.splitlines()
    assert len(listed) == 2 * (1 + 5) + 1
    assert listed[-1].endswith(" toys=data/amazon/toys@2026-11-23 'toys masked=data/amazon/toys@2026-11-24'")


def test_a_set_that_the_study_does_not_have_is_refused():
    refused = run(STUDY, "--data", "/data", "--sets", "books")
    assert refused.returncode == 2
    assert "amazon.yaml has no data set books; it has beauty, toys, sports" in refused.stderr


def test_a_study_stops_at_the_first_command_that_fails_with_its_exit_code(tmp_path):
    study = (REPO / STUDY).read_text()
    (tmp_path / "study.yaml").write_text(study.replace("--config jobs/amazon.yaml", "--config none.yaml"))
    stopped = run(str(tmp_path / "study.yaml"), "--data", str(tmp_path))
    assert stopped.returncode == 2
    assert stopped.stdout.count("python jobs/") == 1
    assert "cannot read settings file none.yaml" in stopped.stderr
