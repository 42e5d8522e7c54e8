"""Configurations: frozen, strict dictionaries with paths and nearest names in errors, and families of variants."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pytest
import torch

from gdn.core.config import Config
from gdn.core.errors import ConfigError
from gdn.mixers import MixerConfig
from gdn.models import LM


class Inner(Config):
    size: int = 3
    rate: float = 0.5

    def check(self) -> None:
        if self.size < 0:
            raise ConfigError(f"size: expected at least 0, got {self.size}")


class Outer(Config):
    name: str
    inner: Inner = Inner()
    more: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    mode: Literal["a", "b", 3] = "a"
    maybe: int | None = None
    either: int | str = 0
    table: dict[str, float] = dataclasses.field(default_factory=dict)
    flag: bool = False
    anything: Any = None


FULL = Outer(
    name="x",
    inner=Inner(size=4),
    more=(Inner(), Inner(rate=2.0)),
    pair=(5, 6.0),
    mode=3,
    maybe=7,
    either="s",
    table={"k": 1.0},
    flag=True,
    anything=[1, "z"],
)


def test_round_trip_through_json() -> None:
    for config in (FULL, Outer(name="y")):
        assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_plain_dictionaries() -> None:
    assert Inner().to_dict() == {"size": 3, "rate": 0.5}
    assert FULL.to_dict()["more"] == [{"size": 3, "rate": 0.5}, {"size": 3, "rate": 2.0}]


def test_left_out_fields_take_their_defaults_and_numbers_their_type() -> None:
    config = Outer.from_dict({"name": "x", "inner": {"rate": 2}, "pair": [1, 3]})
    assert config == Outer(name="x", inner=Inner(rate=2.0), pair=(1, 3.0))
    assert isinstance(config.inner.rate, float)


def test_is_frozen_keyword_only_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().size = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Inner(4)  # type: ignore[misc]
    assert len({Inner(), Inner(size=3), Inner(size=4)}) == 2


def test_with_changes_a_copy_and_checks_it() -> None:
    config = Inner(size=3)
    assert config.with_(size=4) == Inner(size=4)
    assert config.size == 3
    with pytest.raises(ConfigError, match="size: expected at least 0"):
        config.with_(size=-1)
    with pytest.raises(ConfigError, match=r'Inner has no field "sise"\. Did you mean "size"\?'):
        config.with_(sise=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Outer: missing name"),
        ({"nane": "xr"}, 'nane: unknown field of Outer. Did you mean "name"?'),
        ({"name": "x", "inner": {"ratter": 1}}, 'inner.ratter: unknown field of Inner. Did you mean "rate"?'),
        ({"name": "x", "more": [{}, {"zzzzz": 1}]}, "more.1.zzzzz: unknown field of Inner. Known: rate, size"),
        ({"name": 3}, "name: expected str, got 3"),
        ({"name": "x", "inner": {"size": 1.5}}, "inner.size: expected int, got 1.5"),
        ({"name": "x", "inner": {"size": True}}, "inner.size: expected int, got True"),
        ({"name": "x", "inner": {"rate": True}}, "inner.rate: expected float, got True"),
        ({"name": "x", "inner": 5}, "inner: expected a dictionary, got 5"),
        ({"name": "x", "inner": {"size": -1}}, r"inner\.size: expected at least 0, got -1"),
        ({"name": "x", "pair": [1]}, "pair: expected 2 values, got 1"),
        ({"name": "x", "pair": [1, "b"]}, "pair.1: expected float, got 'b'"),
        ({"name": "x", "pair": "ab"}, "pair: expected a list, got 'ab'"),
        ({"name": "x", "mode": "c"}, "mode: expected one of 'a', 'b', 3, got 'c'"),
        ({"name": "x", "maybe": "3"}, "maybe: expected int, got '3'"),
        ({"name": "x", "either": 1.5}, "either: expected int, got 1.5"),
        ({"name": "x", "table": {"k": "v"}}, "table.k: expected float, got 'v'"),
        ({"name": "x", "table": [1]}, r"table: expected a dictionary, got \[1\]"),
        ({"name": "x", "flag": 1}, "flag: expected bool, got 1"),
    ],
)
def test_wrong_dictionaries_say_where_and_what(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Outer.from_dict(values)


def test_no_number_is_no_value() -> None:
    """NaN is neither too small nor too large."""
    for nan in (math.nan, np.float32(math.nan)):
        with pytest.raises(ConfigError, match=r"^rate: expected a number, got nan$"):
            Inner(rate=nan)
    with pytest.raises(ConfigError, match=r"^pair\.1: expected a number, got nan$"):
        FULL.with_(pair=(1, math.nan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maybe": "8"}, "maybe: expected int, got '8'"),
        ({"maybe": 8.0}, "maybe: expected int, got 8.0"),
        ({"maybe": True}, "maybe: expected int, got True"),
        ({"maybe": torch.tensor(8)}, r"maybe: expected int, got tensor\(8\)"),
        ({"flag": 1}, "flag: expected bool, got 1"),
        ({"flag": None}, "flag: expected bool, got None"),
        ({"pair": (1, "2")}, "pair.1: expected float, got '2'"),
        ({"pair": (True, 2)}, "pair.0: expected int, got True"),
        ({"more": (5,)}, "more.0: expected a dictionary, got 5"),
        ({"name": 5}, "name: expected str, got 5"),
    ],
)
def test_values_given_by_name_have_the_types_of_their_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        FULL.with_(**changes)


def test_values_given_by_name_become_what_a_dictionary_makes_of_them() -> None:
    given: dict[str, Any] = {
        "name": "x",
        "maybe": np.int64(3),
        "pair": [np.int32(1), 2],
        "inner": FULL.inner.with_(rate=np.float32(2)),
        "more": [],
    }
    config = Outer(**given)
    assert config.pair == (1, 2.0) and config == Outer.from_dict(json.loads(json.dumps(config.to_dict())))
    assert [type(value) for value in (config.maybe, *config.pair, config.inner.rate)] == [int, int, float, float]
    assert hash(config.more) == hash(())


def test_types_that_say_more_than_can_be_checked_take_what_comes() -> None:
    class Elsewhere(Config):
        items: list[int]
        call: Callable[[int], int] = abs
        size: int = 0

    config = Elsewhere(items=[1], size=np.int64(2))
    assert config == Elsewhere.from_dict({"items": [1], "size": 2}) and config.call(-3) == 3
    with pytest.raises(ConfigError, match=r"^size: expected int, got '2'$"):
        config.with_(size="2")


@pytest.mark.parametrize("cls", [LM.Config, *MixerConfig.members().values()], ids=lambda cls: cls.tag())
def test_every_number_of_a_model_is_checked(cls: type[Config]) -> None:
    fields: list[dataclasses.Field[Any]] = list(dataclasses.fields(cast("Any", cls)))
    samples = {"int": 1, "bool": True, "float": 1.0}
    required = {f.name: samples.get(str(f.type), ()) for f in fields if f.default is dataclasses.MISSING}
    numbers = {f.name: str(f.type).split(" | ")[0] for f in fields if str(f.type).split(" | ")[0] in samples}
    assert len(numbers) > 1
    for name, kind in numbers.items():
        with pytest.raises(ConfigError, match=f"^{name}: expected {kind}, got '8'$"):
            cls(**required | {name: "8"})


def test_a_field_of_a_few_values_takes_no_other() -> None:
    with pytest.raises(ConfigError, match=r"^mode: expected one of 'a', 'b', 3, got 'c'$"):
        FULL.with_(mode="c")
    with pytest.raises(ConfigError, match=r"^mode: expected one of 'a', 'b', 3, got None$"):
        FULL.with_(mode=None)


def test_the_path_starts_where_it_is_told() -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: missing name"):
        Outer.from_dict({}, where="run.toml")


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Config]]:
    """A base whose variants are modules of a package, none of them imported yet."""
    package = tmp_path / "shapes_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(
        "from gdn.core.config import Config\nclass Shape(Config):\n    variants = 'shapes_of_a_test'\n    colour: str = 'red'\n"
    )
    for name, field in (("circle", "radius"), ("square", "side")):
        body = f"from shapes_of_a_test.base import Shape\nclass {name.title()}(Shape):\n    {field}: float = 1.0\n"
        (package / f"{name}.py").write_text(body)
    (package / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    from shapes_of_a_test.base import Shape  # type: ignore[import-not-found]

    yield Shape
    for module in set(sys.modules) - before:
        if module.startswith("shapes_of_a_test"):
            del sys.modules[module]


def test_a_variant_is_found_by_its_module_name(family: type[Config]) -> None:
    assert "shapes_of_a_test.circle" not in sys.modules
    circle = family.from_dict({"type": "circle", "radius": 2.0})
    assert circle.to_dict() == {"type": "circle", "colour": "red", "radius": 2.0}
    assert family.from_dict(circle.to_dict()) == circle
    assert "shapes_of_a_test.square" not in sys.modules, "only what is asked for is imported"


def test_variants_nest_in_other_configurations(family: type[Config]) -> None:
    drawing = type("Drawing", (Config,), {"__annotations__": {"shapes": tuple[family, ...]}, "__module__": __name__})
    values = {"shapes": [{"type": "square", "colour": "red", "side": 3.0}, {"type": "circle", "colour": "blue", "radius": 1.0}]}
    assert drawing.from_dict(values).to_dict() == values
    with pytest.raises(ConfigError, match=r'shapes\.1\.type: no "cirle" .* Did you mean "circle"\?'):
        drawing.from_dict({"shapes": [{"type": "square"}, {"type": "cirle"}]})
    with pytest.raises(ConfigError, match=r'shapes\.0\.sidee: unknown field of Square. Did you mean "side"\?'):
        drawing.from_dict({"shapes": [{"type": "square", "sidee": 1}]})


def test_classes_from_elsewhere_take_part_once_imported(family: type[Config]) -> None:
    hexagon = type("Hexagon", (family,), {"__module__": "somewhere.hexagon"})
    assert isinstance(family.from_dict({"type": "hexagon"}), hexagon)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, 'Shape: needs "type", one of circle, empty, square'),
        ({"type": 3}, 'Shape: needs "type"'),
        ({"type": "empty"}, 'type: no "empty"'),
        ({"type": "os.path"}, 'type: no "os.path"'),
        ({"type": "../circle"}, "type: no"),
    ],
)
def test_wrong_variants(family: type[Config], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family.from_dict(values)


def test_a_member_refuses_another_members_dictionary(family: type[Config]) -> None:
    circle = type(family.from_dict({"type": "circle"}))
    assert circle.from_dict({"type": "circle", "radius": 3.0}) == circle(radius=3.0)
    with pytest.raises(ConfigError, match='type: "square" is not a Circle'):
        circle.from_dict({"type": "square"})


def test_a_family_is_no_member_of_its_own_tags() -> None:
    class Alone(Config):
        variants: ClassVar[str | None] = "gdn.mixers"

    assert Alone._tags == {}
    assert Config._tags == {}


def test_dictionaries_are_copies(family: type[Config]) -> None:
    values = FULL.to_dict()
    values["more"].append(3)
    values["table"]["k"] = 9.0
    assert FULL.to_dict() != values
    values = {"type": "circle"}
    family.from_dict(values)
    assert values == {"type": "circle"}
