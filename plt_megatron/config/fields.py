"""Metadata of a setting's type: its range, whether it may be empty, and its former name.

They are given with `typing.Annotated`, so that a schema states them once, where the setting is:

    window_size: Size = 64
    match_budget: Annotated[Hold | None, RenamedFrom("hold_equal")] = None

A dataclass with mutually exclusive fields has `ALTERNATIVES`, sets of fields of which only one may be given.
`loader` reads any dataclass of such fields; `find_type_problems` checks an instance however it was made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context
from typing import Annotated, Any, Literal

MAX_LOOP_COUNT = 8


@dataclass(frozen=True)
class Range:
    """Range of finite numbers from `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf
    low_excluded: bool = False
    high_excluded: bool = False

    def problem(self, value: float) -> str | None:
        """Return why `value` is out of range; None if it is in range."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, got {value}"
        if value < self.low or (self.low_excluded and value == self.low):
            return f"must be {'above' if self.low_excluded else 'at least'} {self.low:,}, got {_number(value)}"
        if value > self.high or (self.high_excluded and value == self.high):
            return f"must be {'below' if self.high_excluded else 'at most'} {self.high:,}, got {_number(value)}"
        return None


def _number(value: float) -> str:
    return (
        str(value)
        if isinstance(value, float) or abs(value) < 10**15
        else str(Context(prec=6).create_decimal(value).normalize())
    )


@dataclass(frozen=True)
class NotEmpty:
    """A text or list with something in it, and no item twice; `what` says what to give."""

    what: str

    def problem(self, value: str | list[Any]) -> str | None:
        """Return why `value` is not accepted; None if it is."""
        if not value:
            return f"is empty: give {self.what}"
        plain = value if isinstance(value, list) and isinstance(value[0], str | int | float) else []
        if any(item in plain[:index] for index, item in enumerate(plain)):
            return f"{value} names something twice: give {self.what}"
        return None


@dataclass(frozen=True)
class RenamedFrom:
    """The name a field had in an earlier version."""

    name: str


# Upper limits are far above any real use and far below values that would run out of memory or never finish.
Size = Annotated[int, Range(1, 2**24)]  # channels, heads, rows, tokens of a sequence
Ranks = Annotated[int, Range(1, 2**20)]
Steps = Annotated[int, Range(0, 10**9)]
PositiveSteps = Annotated[int, Range(1, 10**9)]
LoopCount = Annotated[int, Range(1, MAX_LOOP_COUNT)]
TokenCount = Annotated[int, Range(1, 10**15)]  # of a run
Count = Annotated[int, Range(0, 10**6)]
PositiveCount = Annotated[int, Range(1, 10**6)]
Positive = Annotated[float, Range(0, low_excluded=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, high_excluded=True)]
Finite = Annotated[float, Range()]
Minutes = Annotated[float, Range(0, 10**6, low_excluded=True)]
WholeSeconds = Annotated[int, Range(1, 10**8)]
Seconds = Annotated[float, Range(0, 10**8, low_excluded=True)]


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return name -> type, metadata included, of the fields that a dataclass's constructor takes."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def plain_type(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Split a field's type into the type without metadata and `None`, the metadata, and whether None is allowed."""
    metadata: tuple[Any, ...] = ()
    optional = False
    while True:
        if typing.get_origin(hint) is Annotated:
            metadata += hint.__metadata__
            hint = hint.__origin__
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = [member for member in typing.get_args(hint) if member is not type(None)]
            optional = True
        else:
            return hint, metadata, optional


def from_plain(cls: type, values: Mapping[str, Any]) -> Any:
    """Build a dataclass instance from the output of `dataclasses.asdict`; missing fields keep their defaults."""
    return cls(**{name: _from_plain(field_types(cls)[name], value) for name, value in values.items()})


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dictionaries; an empty one is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def unknown_keys(cls: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of `values` that a dataclass, or a section in it, does not have."""
    found = [prefix + name for name in values if name not in field_types(cls)]
    for name, value in values.items():
        section = section_of(field_types(cls).get(name))
        if section is not None and isinstance(value, Mapping):
            found += unknown_keys(section, value, f"{prefix}{name}.")
    return found


def _from_plain(hint: Any, value: Any) -> Any:
    plain, section = plain_type(hint)[0], section_of(hint)
    if section is not None and isinstance(value, Mapping):
        return from_plain(section, value)
    if typing.get_origin(plain) is list and isinstance(value, list):
        return [_from_plain(typing.get_args(plain)[0], item) for item in value]
    return value


@functools.cache
def section_of(hint: Any) -> type | None:
    """Return the dataclass that a field holds; None if it holds none."""
    plain = plain_type(hint)[0]
    return plain if isinstance(plain, type) and dataclasses.is_dataclass(plain) else None


def find_type_problems(settings: Any, *, ranges: bool = True) -> Iterator[str]:
    """Yield a line, starting with the dotted key, for each value of a dataclass that its type does not allow: one of
    another type, a number out of range, an empty text or list, several of mutually exclusive fields.

    Args:
        ranges: False: only values of another type, which other checks cannot read.
    """
    return _find_problems(type(settings), settings, "", ranges)


def _find_problems(hint: Any, value: Any, key: str, ranges: bool) -> Iterator[str]:
    plain, metadata, optional = plain_type(hint)
    if value is None and optional:
        return
    wrong, parts = _wrong_type(plain, value), [part for part in metadata if isinstance(part, Range | NotEmpty)]
    for problem in [wrong] if wrong else [part.problem(value) for part in parts if ranges]:
        if problem:
            yield f"{key} {problem}"
    section = section_of(plain)
    if wrong:
        return
    if section is not None:
        alternatives: Sequence[Sequence[str]] = getattr(section, "ALTERNATIVES", ()) if ranges else ()
        if sum(any(getattr(value, name) for name in names) for names in alternatives) > 1:
            yield f"{key}: give either {either(alternatives)}, not both"
        for name, inner in field_types(section).items():
            yield from _find_problems(inner, getattr(value, name), f"{key}.{name}" if key else name, ranges)
    elif typing.get_origin(plain) is list:
        for index, item in enumerate(value):
            yield from _find_problems(typing.get_args(plain)[0], item, f"{key}[{index}]", ranges)


_TYPES: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("text", (str,)),
}


def _wrong_type(plain: Any, value: Any) -> str | None:
    """Return why `value` is not of a field's type; None if it is. Only programs and files that `loader` does not read
    give such values. Subclasses of numbers, such as numpy's, could not be written to a file."""
    if plain in _TYPES:
        what, kinds = _TYPES[plain]
        fits = type(value) in kinds
    elif typing.get_origin(plain) is Literal:
        what, fits = f"one of {', '.join(typing.get_args(plain))}", value in typing.get_args(plain)
    elif typing.get_origin(plain) is list:
        what, fits = "a list", isinstance(value, list | tuple)
    elif section_of(plain) is not None:
        what, fits = f"a {plain.__name__}", isinstance(value, plain)
    elif typing.get_origin(plain) is dict:
        what, fits = "a mapping", isinstance(value, dict)
    else:  # a type with `from_node`
        return None
    return None if fits else f"must be {what}, got {reprlib.repr(value)}"


def either(alternatives: Sequence[Sequence[str]]) -> str:
    """Return mutually exclusive sets of fields in words: `one or other/another`."""
    return " or ".join("/".join(names) for names in alternatives)


# Settings at the top of each kind of file, for who gives a command another kind.
_KINDS = {
    "a run (plt train, plt submit)": {
        *("model", "parallel", "data", "training", "optimizer", "validation", "checkpoint", "evaluation", "logging"),
        "deepspeed",
    },
    "a sweep (plt sweep)": {
        *("title", "base", "set", "axes", "seeds", "demo_corpus", "match_budget", "tolerance", "compare", "baseline"),
        *("questions", "decode"),
    },
    "a study (plt study)": {
        *("title", "base", "set", "variants", "sizes", "loops", "horizons", "seeds", "demo_corpus", "decay_share"),
        *("lr_exponent_of_width", "budget", "rounds", "measure", "decide", "noise"),
    },
}


def kinds_with(name: str) -> str:
    """Return which kinds of files have a setting of this name at the top, in words; empty if none has."""
    return " or ".join(kind for kind, names in _KINDS.items() if name in names)


_OFFLOAD = "it counts a stack's layers once per forward pass, but loops pass through them several times"
_GRAPH = (
    "a captured layer replays one call's tensors, while a looped one is called once per loop and passes the first "
    "loop's keys and values to the others, as new tensors in each microbatch"
)
_FP8_PARAM = (
    "initial weights are written into layers that are already built, where Transformer Engine would keep no copy of "
    "them in full precision; FP8 copies are made once per step instead"
)
_STATES = "moments are fp32: other types need Transformer Engine, and are not verified with checkpoints"
_STATES_ON_HOST = "checkpoints would lack its state; use deepspeed.offload_optimizer=cpu"

REFUSED = {
    "tp_comm_overlap": "it can only be verified on GPUs, and is not yet",
    **dict.fromkeys(("fp8_param_gather", "fp8_param"), _FP8_PARAM),
    **dict.fromkeys(("cpu_offloading", "cpu_offloading_num_layers"), _OFFLOAD),
    **dict.fromkeys(("fine_grained_activation_offloading", "offload_modules"), _OFFLOAD),
    **dict.fromkeys(("cuda_graph_impl", "cuda_graph_modules", "cuda_graph_scope"), _GRAPH),
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph"), _GRAPH),
    "overlap_param_gather_with_optimizer_step": "loops share one chunk of weights; use parallel.overlap_param_gather",
    "align_param_gather": "loops share one chunk of weights, which is gathered once",
    "use_precision_aware_optimizer": "it is not verified with this project's checkpoints",
    **dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), _STATES),
    **dict.fromkeys(("optimizer_cpu_offload", "optimizer_offload_fraction"), _STATES_ON_HOST),
    "use_layer_wise_distributed_optimizer": "set optimizer.name=muon, which uses its buffer layout",
    "use_mup": "set model.mup_base_hidden_size",
    "decoupled_lr": "set optimizer.lr_mult.embedding and optimizer.lr_mult.head",
}
