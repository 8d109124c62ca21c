"""Ranges: every number that a user writes has one, and integers have an upper end."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import pytest

from plt_megatron.config.fields import NotEmpty, Range, field_types, find_type_problems, plain_type, section_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.experiments.files import SweepFile
from plt_megatron.launcher.job import JobSettings
from plt_megatron.slurm.profile import ClusterProfile


def numbers(hint: Any, key: str) -> Iterator[tuple[str, type, tuple[Any, ...]]]:
    """(key, type, metadata) of every number that a schema can hold."""
    plain, metadata, _ = plain_type(hint)
    if plain in (int, float):
        yield key, plain, metadata
    elif (section := section_of(plain)) is not None:
        for name, inner in field_types(section).items():
            yield from numbers(inner, f"{key}.{name}")
    else:
        for inner in typing.get_args(plain) if typing.get_origin(plain) in (list, dict) else ():
            yield from numbers(inner, f"{key}[]")


@pytest.mark.parametrize("schema", [RunConfig, SweepFile, ClusterProfile, JobSettings], ids=lambda cls: cls.__name__)
def test_every_number_has_a_range_and_every_integer_an_upper_end(schema):
    found = list(numbers(schema, schema.__name__))
    assert len(found) >= 4
    for key, kind, metadata in found:
        (limits,) = [part for part in metadata if isinstance(part, Range)]
        assert kind is float or limits.high < 10**16, key


def test_a_number_outside_is_named_wherever_it_is():
    @dataclass
    class Inner:
        size: Annotated[int, Range(1, 9)] | None = None

    @dataclass
    class Outer:
        one: Inner = field(default_factory=Inner)
        many: list[Inner] = field(default_factory=list)
        shares: list[Annotated[float, Range(0, 1, high_excluded=True)]] = field(default_factory=list)

    globals().update(Inner=Inner)  # where the annotations' names are looked up
    assert list(find_type_problems(Outer())) == []
    settings = Outer(Inner(0), [Inner(9), Inner(10)], [0.0, 1.0, math.nan, 0.5])
    assert list(find_type_problems(settings)) == [
        "one.size must be at least 1, got 0",
        "many[1].size must be at most 9, got 10",
        "shares[1] must be below 1, got 1.0",
        "shares[2] must be a finite number, got nan",
    ]


def test_what_must_have_something_and_what_excludes_another_is_named_wherever_it_is():
    @dataclass
    class Item:
        ALTERNATIVES: ClassVar = (("one",), ("other", "another"))

        text: Annotated[str, NotEmpty("a path")] = "x"
        one: int | None = None
        other: int | None = None
        another: list[int] = field(default_factory=list)

    @dataclass
    class Whole:
        items: Annotated[list[Item], NotEmpty("an item")]
        names: Annotated[list[str], NotEmpty("each name once")] = field(default_factory=lambda: ["a", "b"])

    globals().update(Item=Item)
    assert list(find_type_problems(Whole([Item(), Item(one=1), Item(other=1, another=[2])]))) == []
    assert list(find_type_problems(Whole([], ["a", "a"]))) == [
        "items is empty: give an item",
        "names ['a', 'a'] names something twice: give each name once",
    ]
    assert list(find_type_problems(Whole([Item(), Item("", one=1, another=[2])]))) == [
        "items[1]: give either one or other/another, not both",
        "items[1].text is empty: give a path",
    ]


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        (Range(), [-1e308, 0, 1e308], [math.inf, -math.inf, math.nan]),
        (Range(0, low_excluded=True), [5e-324], [0, 0.0, -1]),
        (Range(0, 1), [0, 1], [-1, 2]),
        (Range(1, 2**53), [2**53], [2**53 + 1, 10**5000]),
    ],
)
def test_ends_belong_to_a_range_unless_they_are_excluded(limits, inside, outside):
    assert [limits.problem(value) for value in inside] == [None] * len(inside)
    assert all(0 < len(limits.problem(value) or "") < 100 for value in outside)
