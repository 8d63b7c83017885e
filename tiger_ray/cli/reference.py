"""The page `docs/cli.md`, made from the command line itself; `jobs/docs.py` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from tiger_ray import errors
from tiger_ray.cli.flags import SettingsCommand
from tiger_ray.cli.job import INTERRUPTED, UNFORESEEN
from tiger_ray.cli.main import SETTINGS_HELP, app
from tiger_ray.errors import TigerError

PAGE_HEAD = """# The command line

<!-- written by `python jobs/docs.py`; change the code, not this page -->

`pip install .` brings `tiger-ray`. Each `jobs/*.py` is one of its verbs, for `ray job submit`.
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([PAGE_HEAD, *_overview(), *_verbs(), *_exit_codes()]).rstrip() + "\n"


def _commands() -> Iterator[tuple[str, Any]]:
    """Every verb with its full name, in the order of `--help`."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from ((f"{name} {below}", each) for below, each in command.commands.items())
        else:
            yield name, command


def _overview() -> Iterator[str]:
    yield from ("| verb | what the verb does |", "|---|---|")
    for name, command in _commands():
        anchor = f"tiger-ray {name}".replace(" ", "-")
        yield f"| [`{name}`](#{anchor}) | {_first_sentence(command.help)} |"
    yield from ("", SETTINGS_HELP.replace("tiger-ray run --help", "`tiger-ray run --help`"), "")


def _verbs() -> Iterator[str]:
    for name, command in _commands():
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [
            each for each in command.params if each.param_type_name == "option" and "--help" not in each.opts
        ]
        words = ["tiger-ray", name, *map(_usage, arguments)]
        words += ["[OPTIONS]"] if options else []
        words += ["[SETTINGS]"] if isinstance(command, SettingsCommand) else []
        yield from (f"## tiger-ray {name}", "", f"    {' '.join(words)}", "", command.help, "")
        rows = [(f"`{_plain(each)}`", each) for each in arguments]
        rows += [(f"`{each.opts[0]}`", each) for each in options]
        if rows:
            yield from ("| | | default |", "|---|---|---|")
            yield from (f"| {label} | {_cell(each.help)} | {_default(each)} |" for label, each in rows)
            yield ""


def _usage(argument: Any) -> str:
    word = f"{_plain(argument)}{'...' if argument.nargs == -1 else ''}"
    return word if argument.required else f"[{word}]"


def _plain(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if getattr(parameter, "is_flag", False):
        return "off"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    return "" if parameter.default is None else f"`{parameter.default}`"


def _first_sentence(text: str) -> str:
    return text.split("\n\n", 1)[0].split(". ", 1)[0].rstrip(".")


def _exit_codes() -> Iterator[str]:
    yield from ("## Exit codes", "", "| code | error | how to go on |", "|---|---|---|")
    yield "| 0 | none | |"
    yield f"| {UNFORESEEN} | any error that was not foreseen | Report it; the same command continues. |"
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TigerError)
    ]
    for kind in sorted(kinds, key=lambda kind: (kind.exit_code, kind.__name__)):
        yield f"| {kind.exit_code} | `{kind.__name__}`: {_first_sentence(kind.__doc__ or '')} | {kind.go_on} |"
    yield f"| {INTERRUPTED} | Ctrl-C or SIGTERM | The same command continues where this one ended. |"
