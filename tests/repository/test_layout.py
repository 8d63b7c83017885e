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

FLOORS = (
    "errors",
    "core",
    "settings",
    "artifacts",
    "data",
    "ids",
    "model",
    "decoding",
    "rankers",
    "evaluation",
    "training",
    "published",
    "cluster",
    "stages",
    "report",
    "serving",
    "cli",
)
"""Rooms of the package; a room imports only rooms before it."""

APART = {"synthetic": {"errors", "artifacts", "settings", "core", "data"}}
"""Rooms that no floor but the command line imports, and the rooms that they may import."""

RAY_ROOMS = {"cluster", "stages", "serving"}
"""The only rooms that import Ray."""

ALGORITHM_ROOMS = {"core", "ids", "model", "decoding", "rankers", "evaluation", "training"}
"""Rooms that know neither Ray nor a store; of the artifacts they may know the schemas."""


def room_of(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def module_of(file):
    parts = file.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources():
    return sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


MODULES = {module_of(file): file for file in sources()}


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


@cache
def own_imports(file):
    """Modules of tiger_ray that a file imports."""
    return {name for name in imported(file) if name in MODULES} - {module_of(file)}


def rooms_below(room):
    return (
        APART[room]
        if room in APART
        else set(FLOORS[: FLOORS.index(room)]) | ({*APART} if room == "cli" else set())
    )


def test_every_room_has_its_floor():
    assert {room_of(file) for file in sources()} == {*FLOORS, *APART}


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file):
    rooms = {name.split(".")[1] for name in own_imports(file)} - {room_of(file)}
    assert rooms <= rooms_below(room_of(file))


def test_no_module_imports_itself_through_others():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for other in sorted(own_imports(MODULES[name])):
            visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_ray_is_imported_where_the_cluster_is_and_boto3_in_one_file(file):
    packages = {name.split(".")[0] for name in imported(file)}
    assert "ray" not in packages or room_of(file) in RAY_ROOMS
    assert not packages & {"boto3", "botocore"} or module_of(file) == "tiger_ray.artifacts.s3"


@pytest.mark.parametrize("room", sorted(ALGORITHM_ROOMS))
def test_algorithms_import_no_storage_not_even_through_another_room(room):
    todo, seen = [file for file in sources() if room_of(file) == room], set()
    while todo:
        file = todo.pop()
        seen.add(module_of(file))
        todo += [MODULES[name] for name in own_imports(file) - seen]
    storage = {name for name in seen if name.startswith("tiger_ray.artifacts.")}
    assert storage <= ALLOWED_ARTIFACTS


ALLOWED_ARTIFACTS = {"tiger_ray.artifacts.schemas", "tiger_ray.artifacts.manifest"}
"""Of the artifacts an algorithm may know the columns of a table, and the manifest as a value."""


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
    code = (
        f"import sys, tiger_ray.settings, tiger_ray.cli.job; print([m for m in {HEAVY} if m in sys.modules])"
    )
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
