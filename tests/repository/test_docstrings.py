"""Docstrings name every argument of a function that takes several, and say what a shape suffix stands for."""

import ast
import re
from functools import cache

import pytest

from tests.repository.test_layout import MODULES, PACKAGE

SEVERAL = 3
"""Arguments from which on a docstring names each."""


FILES = sorted(MODULES.values())


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
    found = [argument.arg for argument in [*names, *function.args.kwonlyargs] if not has_help(argument)]
    return [name for name in found if name != "ctx"]  # torch passes it, not a caller


def has_help(argument):
    """True for an argument of a verb that the command line explains, as in `Annotated[str, typer.Option(help=...)]`."""
    note = argument.annotation
    parts = note.slice.elts if isinstance(note, ast.Subscript) and isinstance(note.slice, ast.Tuple) else []
    return any(
        isinstance(part, ast.Call) and "help" in {word.arg for word in part.keywords} for part in parts
    )


def further(function):
    """Names of `*arguments` and `**arguments`, which a docstring may explain."""
    return {argument.arg for argument in (function.args.vararg, function.args.kwarg) if argument is not None}


def docstring(function, owner):
    """Docstring with the arguments: of the function, else of the constructor's class or the base class's method."""
    own = ast.get_docstring(function) or ""
    if function.name == "__init__":
        return own if "Args:" in own else ast.get_docstring(owner) or ""
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
        if (
            unknown := documented(docstring(function, owner))
            - set(arguments(function, owner))
            - further(function)
        )
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


def test_an_argument_with_help_on_the_command_line_is_explained():
    text = (
        'def f(a: Annotated[str, Option(help="A.")], b: Annotated[str, Option()], c, d):\n    """Adds."""\n'
    )
    [(function, owner)] = functions(ast.parse(text).body)
    assert problems(function, owner) == ["b", "c", "d"]
