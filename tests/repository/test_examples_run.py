"""The examples in docstrings do what they show."""

import doctest
import importlib

import pytest

from tests.repository.test_layout import MODULES, RAY_ROOMS, own_imports, room_of


def needs_ray(module, seen=frozenset()):
    """True for a module of a room with Ray, and for a module that imports such a module."""
    below = own_imports(MODULES[module]) - seen
    return room_of(MODULES[module]) in RAY_ROOMS or any(needs_ray(name, seen | below) for name in below)


WITH_EXAMPLES = sorted(
    name
    for name, file in MODULES.items()
    if ">>> " in file.read_text(encoding="utf-8") and not needs_ray(name)
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_give_what_they_show(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed


def test_modules_with_ray_are_skipped_and_others_are_not():
    assert needs_ray("tiger_ray.cluster.connect")
    assert not needs_ray("tiger_ray.core.hashing")
