"""Recipes by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gdn.core.errors import ConfigError, nearest
from gdn.recipes import published, small

if TYPE_CHECKING:
    from gdn.train import Trainer

RECIPES: dict[str, Callable[[], Trainer.Config]] = {
    "demo": small.demo,
    "corpus": small.corpus,
    "gdn_0.4b": published.gdn_0_4b,
    "gdn_1.3b": published.gdn_1_3b,
}


def names() -> list[str]:
    """The recipes that come with gdn."""
    return list(RECIPES)


def load(name: str) -> Trainer.Config:
    """The configuration of a recipe by name, or of a function in a file, `file.py:function`."""
    from gdn.train import Trainer

    made = _function(name)()
    if not isinstance(made, Trainer.Config):
        raise ConfigError(f"{name}: expected a function that returns a Trainer.Config, it returned {made!r}")
    return made


def summary(name: str) -> str:
    """The first line of a recipe's description."""
    return (_function(name).__doc__ or name).splitlines()[0]


def _function(name: str) -> Callable[[], Trainer.Config]:
    if name in RECIPES:
        return RECIPES[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ConfigError(f'no recipe "{name}" (a recipe of your own is path/to/file.py:function).{nearest(name, RECIPES)}')
    if not Path(file).is_file():
        raise ConfigError(f"{file}: no such file")
    module = _module(Path(file).resolve())
    if not hasattr(module, function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise ConfigError(f'{file} defines no "{function}".{nearest(function, own)}')
    return getattr(module, function)


def _module(file: Path) -> ModuleType:
    """A file as a module, executed once in a process: it may register kernels. Dataclasses look their module up by its name."""
    name = f"gdn_recipes.{file.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
