"""Frozen, keyword-only, nested configuration with a strict dictionary round trip.

    class Adam(Config):
        lr: float = 1e-3
        betas: tuple[float, float] = (0.9, 0.95)

    Adam.from_dict({"lr": 3e-4}).with_(betas=(0.9, 0.99)).to_dict()

A subclass is a frozen dataclass by itself. Values take the types of their fields when it is constructed, as `from_dict` gives them; what
cannot is a `ConfigError`. Then `check` is called, which raises `ConfigError` for values that cannot work.

Families: a base class with `variants = "package"` (mixers) is polymorphic. Each subclass carries a tag, the name of the module that
defines it, written as `"type"` in the dictionary; `from_dict` on the base finds the subclass by that tag, importing
`package.<tag>` if need be. Classes from elsewhere take part once their module is imported; a dictionary never imports outside `package`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, dataclass_transform

from gdn.core.errors import ConfigError, nearest


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """Base of every configuration. See the module's docstring."""

    variants: ClassVar[str | None] = None
    _tags: ClassVar[dict[str, type[Config]]] = {}
    _hints: ClassVar[dict[str, Any]] = {}
    """The types of each class's fields, once its annotations can be read."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        if "variants" in cls.__dict__ and cls.variants:
            cls._tags = {}
        elif cls.variants:
            cls._tags[cls.tag()] = cls

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _convert(getattr(self, name), hint, name))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` if the values cannot work together. Overridden where there is something to check."""

    @classmethod
    def tag(cls) -> str:
        """The name of a member of a family: the last part of its module's name."""
        return cls.__module__.rsplit(".", 1)[-1]

    @classmethod
    def members(cls) -> dict[str, type[Self]]:
        """The members of a family by tag, after importing every module of its package."""
        for tag in _known(cls):
            if tag not in cls._tags:
                importlib.import_module(f"{cls.variants}.{tag}")
        return {tag: typing.cast("type[Self]", cls._tags[tag]) for tag in sorted(cls._tags)}

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields replaced; unknown names raise `ConfigError`."""
        names = [f.name for f in _fields(type(self))]
        for name in changes:
            if name not in names:
                raise ConfigError(f'{type(self).__qualname__} has no field "{name}".{nearest(name, names)}')
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars, ready for JSON."""
        tag = {"type": self.tag()} if self.variants else {}
        return tag | {f.name: _plain(getattr(self, f.name)) for f in _fields(type(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from a dictionary. Unknown fields, missing fields and wrong types raise `ConfigError` with their full path."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where or cls.__qualname__}: expected a dictionary, got {values!r}")
        values = dict(values)
        if cls.variants:
            return typing.cast("Self", _member(cls, values.pop("type", None), where)._build(values, where))
        return cls._build(values, where)

    @classmethod
    def _build(cls, values: dict[str, Any], where: str) -> Self:
        fields = {f.name: f for f in _fields(cls)}
        hints = typing.get_type_hints(cls)
        for name in values:
            if name not in fields:
                raise ConfigError(f"{_join(where, name)}: unknown field of {cls.__qualname__}.{nearest(name, fields)}")
        missing = [
            f.name
            for f in fields.values()
            if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{where or cls.__qualname__}: missing {', '.join(missing)}")
        converted = {name: _convert(value, hints[name], _join(where, name)) for name, value in values.items()}
        try:
            return cls(**converted)
        except ConfigError as error:  # from `check`, which knows the field and not the path
            raise ConfigError(_join(where, str(error))) from None


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _hints(cls: type[Config]) -> dict[str, Any]:
    """The types of fields."""
    if "_hints" not in cls.__dict__:
        try:
            hints = typing.get_type_hints(cls)
        except NameError:  # names of a function that defines a class, or of a module that is not finished
            return {}
        cls._hints = {f.name: hints[f.name] for f in _fields(cls)}
    return cls._hints


def _join(where: str, name: str | int) -> str:
    return f"{where}.{name}" if where else str(name)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _member(base: type[Config], tag: Any, where: str) -> type[Config]:
    if not isinstance(tag, str):
        raise ConfigError(f'{where or base.__qualname__}: needs "type", one of {", ".join(_known(base))}')
    if tag not in base._tags and tag.isidentifier():
        module = f"{base.variants}.{tag}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    if tag not in base._tags:
        hint = nearest(tag, _known(base))
        raise ConfigError(f'{_join(where, "type")}: no "{tag}" (import the module that defines it first).{hint}')
    member = base._tags[tag]
    if not issubclass(member, base):
        raise ConfigError(f'{_join(where, "type")}: "{tag}" is not a {base.__qualname__}')
    return member


def _known(base: type[Config]) -> list[str]:
    import pkgutil

    package = importlib.import_module(base.variants or "")
    inside = {m.name for m in pkgutil.iter_modules(package.__path__) if m.name != base.__module__.rsplit(".", 1)[-1]}
    return sorted(inside | set(base._tags))


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or `ConfigError`. Only the types that our configurations use; others take anything."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        return _convert_union(value, args, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        return _convert_tuple(value, args, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a dictionary, got {value!r}")
        return {key: _convert(item, args[1], _join(where, key)) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value, where=where)
    if hint is int or hint is float:
        return _convert_number(value, hint, where)
    if hint is Any or not isinstance(hint, type) or isinstance(value, hint):  # `list[int]` of a configuration from elsewhere is no type
        return value
    raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")


def _convert_number(value: Any, hint: type[int] | type[float], where: str) -> float:
    """Of other libraries too: theirs cannot be written as JSON."""
    kind: Any = numbers.Integral if hint is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    if hint is float and math.isnan(value):  # passes every comparison that asks for the wrong
        raise ConfigError(f"{where}: expected a number, got {value}")
    return hint(value)


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(value, option, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_tuple(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(item, args[0], _join(where, i)) for i, item in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}")
    return tuple(_convert(item, arg, _join(where, i)) for i, (item, arg) in enumerate(zip(value, args, strict=True)))
