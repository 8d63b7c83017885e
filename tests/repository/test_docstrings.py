"""Docstrings name every argument of a function that takes several, and say what a shape suffix stands for."""

import ast
import re
from functools import cache

import pytest

from tests.repository.test_layout import MODULES, PACKAGE

ROOMS = (
    "errors.py",
    "core",
    "data",
    "ids",
    "model",
    "decoding",
    "evaluation",
    "training/checkpoints.py",
    "training/collate.py",
    "training/examples.py",
    "training/loop.py",
    "training/operations.py",
    "training/spec.py",
    "training/validation.py",
    "artifacts/faults.py",
    "artifacts/local.py",
    "artifacts/manifest.py",
    "artifacts/objects.py",
    "artifacts/opening.py",
    "artifacts/run.py",
    "artifacts/s3.py",
    "artifacts/storage.py",
    "artifacts/store.py",
    "report/comparison.py",
    "report/tables.py",
)
"""Rooms, and files of rooms, whose docstrings are checked."""


SEVERAL = 3
"""Arguments from which on a docstring names each."""


def is_checked(file):
    inside = file.relative_to(PACKAGE).as_posix()
    return any(inside == room or inside.startswith(f"{room}/") for room in ROOMS)


FILES = sorted(file for file in MODULES.values() if is_checked(file))


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def classes():
    """Class definitions of the package by name."""
    return {
        node.name: node
        for file in MODULES.values()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ClassDef)
    }


def functions(body, owner=None):
    """Public functions of a module and public methods of its public classes, each with its class or None."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, node)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (node.name == "__init__" or not node.name.startswith("_")):
            yield node, owner


def arguments(function, owner):
    """Names of the arguments that a caller passes."""
    names = function.args.posonlyargs + function.args.args
    decorators = {node.id for node in function.decorator_list if isinstance(node, ast.Name)}
    if owner is not None and "staticmethod" not in decorators:
        names = names[1:]
    found = [argument.arg for argument in [*names, *function.args.kwonlyargs]]
    return [name for name in found if name != "ctx"]  # torch passes it, not a caller


def docstring(function, owner):
    """Docstring with the arguments: of the function, of a constructor's class, or of the base class's method."""
    if function.name == "__init__":
        return ast.get_docstring(owner) or ""
    own = ast.get_docstring(function) or ""
    if "Args:" in own or owner is None:
        return own
    for base in owner.bases:
        above = classes().get(base.id) if isinstance(base, ast.Name) else None
        for inherited in above.body if above else ():
            if isinstance(inherited, ast.FunctionDef) and inherited.name == function.name:
                return docstring(inherited, above)
    return own


def documented(text):
    """Names that the section Args of a docstring explains; one entry may explain several."""
    section = re.search(r"^Args:\n((?: +.*\n?|\n)+)", text, re.MULTILINE)
    entries = re.findall(r"^ {4}([\w, *]+):", section[1], re.MULTILINE) if section else []
    return {name.strip(" *") for entry in entries for name in entry.split(",")}


def problems(function, owner):
    names = arguments(function, owner)
    missing = set(names) - documented(docstring(function, owner))
    return sorted(missing) if len(names) >= SEVERAL else []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_argument_of_a_function_with_several_is_explained(file):
    found = [
        f"{file.name}:{function.lineno} {function.name} does not explain {', '.join(missing)}"
        for function, owner in functions(tree(file).body)
        if (missing := problems(function, owner))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arguments_that_are_explained_exist(file):
    found = [
        f"{file.name}:{function.lineno} {function.name} explains {', '.join(sorted(unknown))}"
        for function, owner in functions(tree(file).body)
        if function.name != "__init__" and ast.get_docstring(function)
        if (unknown := documented(docstring(function, owner)) - set(arguments(function, owner)))
    ]
    assert not found, "\n".join(found)


SUFFIX = re.compile(r"\w_([A-Z]{1,6})$")


def shape_letters(file):
    """Letters of the shape suffixes of all names that a file binds."""
    names = {node.id for node in ast.walk(tree(file)) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree(file)) if isinstance(node, ast.arg)}
    return {
        letter for name in names if name[0].islower() and (hit := SUFFIX.search(name)) for letter in hit[1]
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_letters_of_shapes_are_explained(file):
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    explained = set(re.findall(r"(?<!\w)[A-Z](?!\w)", "\n".join(texts)))
    assert shape_letters(file) <= explained, f"{sorted(shape_letters(file) - explained)}"


def test_the_check_sees_an_argument_without_explanation():
    text = 'def f(a, b, *, c):\n    """Adds.\n\n    Args:\n        a, b: numbers.\n    """\n'
    [(function, owner)] = functions(ast.parse(text).body)
    assert problems(function, owner) == ["c"]
