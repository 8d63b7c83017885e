"""Settings from YAML files, the environment variables that the files name, and flags; the later source wins."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date as calendar_date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError as MalformedValue

from tiger_ray.errors import SettingsError
from tiger_ray.settings.settings import Settings


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, for example `date` and `storage.root`."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def describe_settings(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Lines of help for all settings: flag, values, default, and below each its meaning."""
    for name, setting in model.model_fields.items():
        if isinstance(setting.annotation, type) and issubclass(setting.annotation, BaseModel):
            yield from describe_settings(setting.annotation, f"{prefix}{name}.")
            continue
        default = "required" if setting.is_required() else f"default {_as_text(setting.get_default())}"
        yield f"  --{prefix}{name} {_values(setting.annotation)}  [{default}]"
        yield f"      {' '.join((setting.description or '').split())}"


def _values(annotation: Any) -> str:
    """What a setting may be, in a word."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _values(parts[0])
    if kind is Literal:
        return "|".join(map(str, parts))
    if kind is tuple:
        return f"[{_values(parts[0])}, ...]"
    if parts:
        return " or ".join(_values(part) for part in parts if part is not type(None))
    return {"str": "text", "int": "integer", "float": "number", "bool": "true|false"}.get(
        annotation.__name__, "time"
    )


def _as_text(default: Any) -> str:
    if default is None:
        return "empty"
    if isinstance(default, bool):
        return str(default).lower()
    return str(list(default)) if isinstance(default, tuple) else str(default)


def load_settings(
    argv: Sequence[str], *, prog: str | None = None, defaults: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from `--config FILE.yaml` (repeatable, later files win) and `--section.name value`.

    Args:
        argv: command-line words without the program's name.
        prog: program name shown by `--help`.
        defaults: values that neither a file nor a flag gives; empty: those of the sections alone.

    Raises:
        SettingsError: unknown key, wrong type or contradiction; the message names file, key and remedy.
    """
    files, words = _split_config_files(argv)
    values: dict[str, Any] = copy.deepcopy(dict(defaults or {}))
    for file in files:
        _merge(values, _read_yaml(Path(file)))
    known = list(setting_names())
    for word in words:
        if word.startswith("--") and word not in ("--", "--help"):
            name = word[2:].split("=", 1)[0]
            if name not in known:
                raise SettingsError(f"unknown setting --{name}{_did_you_mean(name, known)}")
    try:
        return Settings(_cli_parse_args=list(words), _cli_prog_name=prog, **values)  # type: ignore[call-arg]
    except MalformedValue as error:
        raise SettingsError(f"command line: {error}; write a list as [1, 2] or repeat the setting") from None
    except ValidationError as error:
        source = ", ".join([*files, "command line"] if words else files) or "command line"
        raise SettingsError(f"settings ({source}):\n" + "\n".join(_explain(error, known))) from None


def _split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    files, words, rest = [], [], iter(argv)
    for word in rest:
        if word == "--config":
            file = next(rest, None)
            if file is None:
                raise SettingsError("--config needs the name of a YAML file")
            files.append(file)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            words.append(word)
    return files, words


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read settings file {file}: {error.strerror}") from None
    try:
        values = _Loader(text).get_single_data() or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day like 2014-02-30.
        hint = "; within braces or brackets, '${NAME}' needs its quotes" if "${" in text else ""
        raise SettingsError(f"settings file {file} is not YAML: {error}{hint}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"settings file {file} must hold sections like `storage:`, not a {type(values).__name__}"
        )
    if isinstance(values.get("date"), calendar_date):  # PyYAML turns 2026-11-23 into a date.
        values["date"] = values["date"].isoformat()
    expanded: dict[str, Any] = _expanded(values, file)
    return expanded


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys: PyYAML would silently drop the first value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    f"the key {key.value!r} comes first", seen[key.value], "and again", key.start_mark
                )
            seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def _expanded(value: Any, file: Path) -> Any:
    """The value with each `${NAME}` in its texts replaced by that environment variable."""

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise SettingsError(
                f"settings file {file} uses ${{{match[1]}}}, but that environment variable is not set"
            )
        return os.environ[match[1]]

    if isinstance(value, dict):
        return {key: _expanded(part, file) for key, part in value.items()}
    if isinstance(value, list):
        return [_expanded(part, file) for part in value]
    return re.sub(r"\$\{(\w+)\}", variable, value) if isinstance(value, str) else value


def _merge(values: dict[str, Any], later: dict[str, Any]) -> None:
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _explain(error: ValidationError, known: list[str]) -> Iterator[str]:
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"  unknown setting {name}{_did_you_mean(name, known)}"
        elif problem["type"] == "missing":
            for wanted in _required(name):
                yield f"  {wanted} is required: set it in the YAML file or with --{wanted}"
        else:
            said = isinstance(problem["input"], dict) or repr(problem["input"]) in problem["msg"]
            got = "" if said else f" (got {problem['input']!r})"
            yield f"  {name + ': ' if name else ''}{problem['msg'].removeprefix('Value error, ')}{got}"


def _required(name: str) -> list[str]:
    """The settings without default of a section; the name itself, if it names a setting."""
    field = Settings.model_fields.get(name)
    section = field.annotation if field else None
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return [name]
    return [f"{name}.{own}" for own, part in section.model_fields.items() if part.is_required()]


def _did_you_mean(name: str, known: Iterator[str] | list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; tiger-ray run --help lists them all"
