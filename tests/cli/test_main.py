"""The command line: fast help, the nearest word for a mistyped one, and exit codes that say how to go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiger_ray import errors
from tiger_ray.artifacts.metadata import MODELS
from tiger_ray.cli.flags import split_words
from tiger_ray.cli.job import INTERRUPTED, UNFORESEEN, run_verb
from tiger_ray.cli.main import main
from tiger_ray.errors import TigerError
from tiger_ray.stages.night import STAGE_NAMES

REPO = Path(__file__).parents[2]
HEAVY = ("ray", "torch", "pandas", "pyarrow", "sklearn", "boto3", "numpy", "yaml", "tiger_ray.settings")
VERBS = ("run", "plan", "check", "show", "compare", "export", "serve", "synthesize", "storage")
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TigerError)]


@pytest.mark.parametrize(
    "words", [[], ["plan"], ["check"], ["show", "user"], ["compare"], ["storage", "verify"], ["synthesize"]]
)
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\n"
        "from tiger_ray.cli.main import main\n"
        f"code = main([*{words!r}, '--help'])\n"
        f"print('exit', code, 'loaded', [m for m in {HEAVY} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("exit 0 loaded []\n")


def test_help_names_every_verb_and_every_exit_code(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert f" {verb} " in shown
    for code in {0, INTERRUPTED} | {kind.exit_code for kind in KINDS}:
        assert f" {code} " in shown


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["pln"], "Did you mean 'plan'?"),
        (["stroage", "ls"], "Did you mean 'storage'?"),
        (["storage", "verfy"], "Did you mean 'verify'?"),
        (["check", "--dta"], "Did you mean --data?"),
        (["check", "--confg", "x.yaml"], "Did you mean --config?"),
        (["plan", "--modle.num_layers", "3"], "did you mean model.num_layers?"),
        (["run", "modle", "--date", "2026-11-23"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistyped_word_names_the_nearest_and_exits_2(words, nearest, capsys):
    assert main(words) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert nearest is None or nearest in shown


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("modle", "there is no stage 'modle'; did you mean model?"),
        ("x", "there is no stage 'x'. Stages: catalog"),
    ],
)
def test_a_mistyped_stage_is_refused_before_anything_else_is_read(stage, said, capsys):
    assert main(["run", stage, "--config", "missing.yaml"]) == 2
    assert said in capsys.readouterr().err


def test_the_stages_that_verbs_know_are_those_of_the_night():
    assert tuple(MODELS) == STAGE_NAMES


def test_settings_are_told_apart_from_a_verb_s_own_words():
    words = [
        "--config",
        "a.yaml",
        "u1",
        "--data",
        "--seed=3",
        "--model.num_layers",
        "2",
        "--artifact",
        "model",
    ]
    words += ["--training.warm_start", "--date", "2026-11-23", "--", "--odd id"]
    own, settings = split_words(words, {"--data", "--artifact"}, {"--data"})
    assert own == ["u1", "--data", "--artifact", "model", "--", "--odd id"]
    assert settings == [
        *("--config", "a.yaml", "--seed=3", "--model.num_layers", "2"),
        *("--training.warm_start", "--date", "2026-11-23"),
    ]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_of_ours_ends_with_its_code_and_how_to_go_on(kind, capsys):
    def fail():
        raise kind("what happened")

    assert run_verb(fail) == kind.exit_code
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{kind.__name__}: what happened", f"How to go on: {kind.go_on}"]


def test_errors_with_the_same_code_but_another_remedy_say_their_own():
    assert len({kind.go_on for kind in KINDS}) == len({*KINDS} - {errors.CollisionError})


def test_ctrl_c_and_sigterm_end_with_130_and_say_that_the_command_continues(capsys):
    def interrupted():
        raise KeyboardInterrupt

    def terminated():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    before = signal.getsignal(signal.SIGTERM)
    for act in (interrupted, terminated):
        assert run_verb(act) == INTERRUPTED
        assert "the same command continues where this one ended" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_unforeseen_error_shows_the_traceback_and_exits_1(capsys):
    assert run_verb(lambda: 1 // 0) == UNFORESEEN
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "How to go on: This error was not foreseen" in said
