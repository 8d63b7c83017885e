"""Settings among the words of a command line: `--config FILE`, `--date DATE` and every `--section.name value`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

PLAIN = ("--config", "--date", "--seed")
"""Flags of settings that belong to no section."""


class SettingsCommand(TyperCommand):
    """A verb that takes settings: the flags that are not options of the verb are in `ctx.args`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the settings out of the words before typer parses the others."""
        parameters = [
            parameter for parameter in self.get_params(ctx) if parameter.param_type_name == "option"
        ]
        own = {name for parameter in parameters for name in parameter.opts}
        flags = {
            name
            for parameter in parameters
            if getattr(parameter, "is_flag", False)
            for name in parameter.opts
        }
        flags |= {*self.get_help_option_names(ctx)}
        mine, settings = split_words(args, own | flags, flags)
        for word in settings:
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name and name not in PLAIN:
                near = difflib.get_close_matches(name, sorted({*own, *PLAIN}), n=1, cutoff=0.6)
                ctx.fail(f"No such option: {name}" + (f". Did you mean {near[0]}?" if near else ""))
        super().parse_args(ctx, mine)
        ctx.args = settings
        return settings


class AllSettingsCommand(SettingsCommand):
    """A verb whose help also lists every setting."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the verb, then all settings with default and meaning."""
        from tiger_ray.settings.loading import describe_settings

        super().format_help(ctx, formatter)
        print(
            "Settings, as flags or as keys of the YAML file of --config FILE (may be repeated, later files win):\n"
        )
        for line in describe_settings():
            print(line)


def split_words(words: Sequence[str], own: set[str], flags: set[str]) -> tuple[list[str], list[str]]:
    """The words of a verb itself, and the words that are settings, each in their order.

    Args:
        words: of the command line, after the verb.
        own: options of the verb, such as `--data`.
        flags: the options of `own` that take no value.

    >>> split_words(["semantic_ids", "--data", "--seed", "3"], {"--data"}, {"--data"})
    (['semantic_ids', '--data'], ['--seed', '3'])
    """
    mine: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            mine += [word, *rest]
            break
        name, equals, _ = word.partition("=")
        if not name.startswith("--"):
            mine.append(word)
            continue
        target = mine if name in own else settings
        target.append(word)
        if not equals and name not in flags and rest and not rest[0].startswith("--"):
            target.append(rest.pop(0))
    return mine, settings
