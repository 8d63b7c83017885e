"""The package keeps its shape: imports point one way, algorithms know no Ray, and nothing unsafe is loaded."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "tiger_ray"

ORDER = (
    "errors",
    "faults",
    "config",
    "precision",
    "hashing",
    "schemas",
    "stores",
    "storage",
    "cluster",
    "stage",
    "shards",
    "workers",
    "inputs",
    "catalog",
    "events",
    "embeddings",
    "quantizers",
    "fitting",
    "semantic_ids",
    "registry",
    "trie",
    "histories",
    "sequences",
    "tokens",
    "model",
    "inference",
    "beam_search",
    "rankers",
    "evaluation",
    "examples",
    "checkpoints",
    "training_log",
    "validation",
    "optimization",
    "training",
    "recommendations",
    "harness",
    "comparison",
    "report",
    "export",
    "serving",
    "job",
)
"""A module imports only modules before it."""

APART = {
    "synthetic": {"errors"},
    "baselines": set(ORDER) - {"job", "serving"},
}
"""Modules that nothing in ORDER imports, and what they may import themselves."""

WITHOUT_RAY = (
    "errors",
    "faults",
    "config",
    "precision",
    "hashing",
    "schemas",
    "stores",
    "storage",
    "quantizers",
    "semantic_ids",
    "trie",
    "histories",
    "tokens",
    "model",
    "inference",
    "beam_search",
    "rankers",
    "evaluation",
    "examples",
    "checkpoints",
    "training_log",
    "validation",
    "optimization",
    "synthetic",
)
"""Modules that never import Ray, not even through another module of ours."""


def name_of(file):
    """The module that a file belongs to; files of a subpackage belong to the subpackage."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def sources():
    return sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@cache
def imported(file):
    """Dotted names of everything a file imports, at any depth of its code."""
    found = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports out in full"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def own_imports(file):
    """Modules of tiger_ray that a file imports."""
    known = {name_of(source) for source in sources()}
    found = {name.split(".")[1] for name in imported(file) if name.startswith("tiger_ray.")}
    return found & known


@cache
def dependencies():
    """Module -> modules of ours that it imports, itself left out."""
    found = {}
    for file in sources():
        found.setdefault(name_of(file), set()).update(own_imports(file) - {name_of(file)})
    return found


def test_every_module_has_its_place_in_the_order():
    modules = set(dependencies())
    assert modules <= {*ORDER, *APART}, "new modules go into ORDER, where they belong"
    assert {name for name in ORDER if name != "serving"} <= modules


@pytest.mark.parametrize("module", sorted(dependencies()))
def test_a_module_imports_only_modules_before_it(module):
    allowed = APART[module] if module in APART else set(ORDER[: ORDER.index(module)])
    assert dependencies()[module] <= allowed


@pytest.mark.parametrize("module", WITHOUT_RAY)
def test_algorithms_never_import_ray(module):
    seen, todo = set(), {module}
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= dependencies()[name] - seen
    direct = {
        f"{file.name}: {name}"
        for file in sources()
        if name_of(file) in seen
        for name in imported(file)
        if name.split(".")[0] == "ray"
    }
    assert not direct


RIVALS = [file for file in sorted((PACKAGE / "baselines").glob("*.py")) if file.stem != "contenders"]


@pytest.mark.parametrize("file", RIVALS, ids=lambda file: file.stem)
def test_baselines_never_import_ray_only_their_stage_does(file):
    assert "ray" not in {name.split(".")[0] for name in imported(file)}
    assert own_imports(file) <= {*WITHOUT_RAY, "baselines"}
    assert "tiger_ray.baselines.contenders" not in imported(file)


FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_loaded_that_could_run_code(file):
    assert not {name.split(".")[0] for name in imported(file)} & FORBIDDEN_IMPORTS
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            call = f"{node.value.id}.{node.attr}"
            assert call not in (
                "torch.load",
                "torch.save",
                "yaml.load",
                "yaml.unsafe_load",
                "ray.cloudpickle",
            ), f"{file}:{node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg not in ("allow_pickle", "trust_remote_code"), f"{file}:{node.value.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{file}:{node.lineno}"


def repo_files():
    """Text files that belong to the repo, whether committed yet or not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [REPO / name for name in listed.stdout.splitlines()]
    return [file for file in files if file.is_file()]


def test_no_file_holds_a_path_of_one_machine():
    # Folders of people and of temporary files; "s3://" and placeholders such as /data are nobody's.
    machine = re.compile(r"(?<![\w.}/-])/(?:home|root|Users|work|workspace|mnt|tmp|private)/[\w.-]+")
    found = []
    for file in repo_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(REPO)}: {hit[0]}" for hit in machine.finditer(text)]
    assert not found


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=REPO, capture_output=True, text=True, check=True)


HEAVY = ("ray", "torch", "pandas", "pyarrow", "sklearn", "boto3")


def test_importing_the_settings_imports_nothing_heavy():
    code = f"import sys, tiger_ray.config, tiger_ray.job; print([m for m in {HEAVY} if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


def test_help_and_a_mistyped_setting_answer_without_loading_ray_or_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['jobs/nightly.py', {word!r}]\n"
        "try:\n"
        "    runpy.run_path('jobs/nightly.py', run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    print('exit', done.code)\n"
        "print('loaded', [m for m in " + str(HEAVY) + " if m in sys.modules])\n"
    )
    helped = run("-c", code.format(word="--help")).stdout
    assert helped.endswith("exit 0\nloaded []\n")
    refused = run("-c", code.format(word="--modle.num_layers=3"))
    assert refused.stdout == "exit 2\nloaded []\n"
    assert "did you mean model.num_layers" in refused.stderr
