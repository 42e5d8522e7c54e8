"""The public names are those that are listed, every one of them loads, and every public function and class is documented."""

from __future__ import annotations

import importlib
import inspect

import pytest

import gdn

MODULES = [
    "gdn",
    "gdn.compat.fla",
    "gdn.data",
    "gdn.data.synthetic",
    "gdn.eval",
    "gdn.experiments",
    "gdn.hf",
    "gdn.mixers",
    "gdn.models",
    "gdn.nn",
    "gdn.ops",
    "gdn.train",
]


@pytest.mark.parametrize("name", MODULES)
def test_listed_names_load_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"


def test_the_top_level_is_what_the_readme_says() -> None:
    assert set(gdn.__all__) == {"Packing", "__version__", "accelerate", "restore", "data", "eval", "mixers", "models", "nn", "ops", "train"}


def test_operators_take_at_most_eight_parameters() -> None:
    for name in gdn.ops.__all__:
        value = getattr(gdn.ops, name)
        if inspect.isfunction(value) and name not in ("ops", "use"):
            assert len(inspect.signature(value).parameters) <= 8, name


@pytest.mark.parametrize("name", MODULES)
def test_unknown_names_raise(name: str) -> None:
    assert not hasattr(importlib.import_module(name), "no_such_name")
