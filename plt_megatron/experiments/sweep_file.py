"""A sweep's YAML file: a base run, axes to vary, seeds, and what is held equal.

    base: ../runs/plt2_demo.yaml      # a run configuration, relative to this file
    set: {training.micro_batch_size: 8}   # settings of every run
    axes:
      model.loop_count: [1, 2, 3, 4]  # a configuration key and its values
      size:                           # or a name of your own, and named sets of settings
        small: {model.num_layers: 2, model.hidden_size: 64}
        large: {model.num_layers: 4, model.hidden_size: 128}
    seeds: [1, 2, 3]
    match_budget: tokens
    questions:                        # pairs of the compared axis' values that the report sets against each other
      does the second loop help: [2 loops, 1 loop]

Values are kept as YAML text and converted by the configuration's own loader, so that a setting is read alike in a run
file, on the command line and here.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from plt_megatron.errors import UserError

Hold = Literal["tokens", "training_flops", "effective_depth", "parameters", "decode_latency"]
HOLDS: tuple[str, ...] = typing.get_args(Hold)
LOOP_SWITCHES = ("model.loop_count", "model.cross_loop_parallel", "model.share_kv", "model.gated_window")
SEED_KEY = "training.seed"
_OWNED = {"name", "output_dir", SEED_KEY}  # the sweep sets these itself


@dataclass(frozen=True)
class Choice:
    """One value of an axis: what it is called and which `key=value` overrides it stands for."""

    label: str
    overrides: tuple[str, ...]

    def keys(self) -> set[str]:
        return {override.partition("=")[0] for override in self.overrides}


@dataclass(frozen=True)
class Axis:
    """What varies: a configuration key, or a name of the user's own with named sets of settings."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class DecodeSettings:
    """What decoding latency means for `match_budget: decode_latency`: on paper, or by a measured table."""

    context_length: int = 2048
    batch_size: int = 4
    gpu: str = "h100"
    table: str | None = None  # a CSV of measured milliseconds; see docs/sweeps.md


@dataclass(frozen=True)
class DemoCorpus:
    """The data of `make demo`, with a tokenizer of another size, made before the first run."""

    vocab_size: int = 2048
    folder: str = ".demo/vocab_2048"


@dataclass
class SweepFile:
    """A sweep as its file and the command line state it.

    Attributes:
        compare: the axis whose values are compared, holding `match_budget`; None: the one that changes the loops.
        baseline: label of the compared axis' value that the others are measured against; None: the first.
        questions: what the report asks -> labels [value, reference] of the compared axis.
    """

    path: Path
    name: str
    base: Path
    overrides: list[str] = field(default_factory=list)
    axes: list[Axis] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1])
    match_budget: Hold | None = None
    tolerance: float = 0.02
    compare: str | None = None
    baseline: str | None = None
    questions: dict[str, list[str]] = field(default_factory=dict)
    output_dir: str = "runs/sweeps"
    title: str | None = None
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    demo_corpus: DemoCorpus | None = None

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    def compared_axis(self) -> Axis | None:
        """The axis that is compared: as named, else the first that sets a switch of the loop, else the first."""
        for axis in self.axes:
            if axis.name == self.compare:
                return axis
        if self.compare is not None:
            known = ", ".join(axis.name for axis in self.axes) or "none"
            raise UserError(f"{self.path}: compare: there is no axis {self.compare!r}; the axes are {known}")
        touching = [a for a in self.axes if any(choice.keys() & set(LOOP_SWITCHES) for choice in a.choices)]
        return (touching or self.axes or [None])[0]  # type: ignore[list-item]


_FIELDS = [f.name for f in dataclasses.fields(SweepFile) if f.name not in ("path", "overrides")] + ["set"]


def read_sweep(path: str | Path, settings: Sequence[str] = ()) -> SweepFile:
    """Read a sweep file and apply `key=value` settings from the command line.

    A key of the sweep's own (`seeds=[1,2]`, `match_budget=training_flops`, `name=x`, `axes.model.loop_count=[1,2]`)
    changes the sweep; any other is a setting of every run.
    Raises `UserError` naming file, line and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    root = _compose(text, str(path))
    sweep = SweepFile(path=path, name=path.stem, base=Path())
    has_base = False
    for key_node, node in _items(root, str(path)):
        has_base = has_base or key_node.value == "base"
        _apply(sweep, key_node.value, node, _where(key_node))
    if not has_base:
        raise UserError(f"{path}: base: name the run configuration that the sweep varies")
    for setting in settings:
        _apply_setting(sweep, setting)
    _check(sweep)
    return sweep


def _apply_setting(sweep: SweepFile, setting: str) -> None:
    key, equals, text = setting.partition("=")
    where = f"setting {setting!r}"
    if not equals or not key:
        raise UserError(f"{where}: expected key=value, as in seeds=[1,2] or model.num_layers=4")
    head, _, rest = key.partition(".")
    if head == "axes" and rest:
        axis = _axis(rest, _compose(text, where), where)
        sweep.axes = [other for other in sweep.axes if other.name != rest] + [axis]
    elif key in _FIELDS:
        _apply(sweep, key, _compose(text, where), where)
    else:
        sweep.overrides.append(setting)


def _apply(sweep: SweepFile, key: str, node: yaml.Node, where: str) -> None:
    if key not in _FIELDS:
        close = difflib.get_close_matches(key, _FIELDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(_FIELDS))}"
        raise UserError(f"{where}: unknown key {key}; {hint}")
    if key == "base":
        sweep.base = sweep.path.parent / _text(node, key, where)
    elif key == "set":
        sweep.overrides += _overrides(node, where)
    elif key == "axes":
        sweep.axes = [_axis(name.value, value, where) for name, value in _items(node, where)]
    elif key == "seeds":
        sweep.seeds = [_integer(item, "seeds", where) for item in _list(node, key, where)]
    elif key == "tolerance":
        sweep.tolerance = _number(node, key, where)
    elif key == "questions":
        sweep.questions = {name.value: _pair(value, name.value, where) for name, value in _items(node, where)}
    elif key == "decode":
        sweep.decode = _section(DecodeSettings, node, key, where)
    elif key == "demo_corpus":
        sweep.demo_corpus = _section(DemoCorpus, node, key, where)
    elif key == "match_budget":
        value = _text(node, key, where)
        if value not in HOLDS:
            raise UserError(f"{where}: match_budget: expected one of {', '.join(HOLDS)}; got {value!r}")
        sweep.match_budget = typing.cast(Hold, value)
    else:
        setattr(sweep, key, _text(node, key, where))


def _axis(name: str, node: yaml.Node, where: str) -> Axis:
    """A list of values of the configuration key `name`, or a mapping of labels to settings."""
    if isinstance(node, yaml.SequenceNode):
        texts = [_yaml_text(item) for item in node.value]
        choices = [Choice(_value_label(name, text), (f"{name}={text}",)) for text in texts]
    elif isinstance(node, yaml.MappingNode):
        choices = [Choice(label.value, tuple(_overrides(value, where))) for label, value in node.value]
    else:
        raise UserError(f"{where}: axis {name}: expected a list of values or a mapping of named settings")
    labels = [choice.label for choice in choices]
    if not labels or len(set(labels)) < len(labels):
        raise UserError(f"{where}: axis {name}: {'is empty' if not labels else 'has a value twice'}")
    return Axis(name, tuple(choices))


def _value_label(key: str, text: str) -> str:
    """`2 loops`, `hidden_size=128`."""
    if key == LOOP_SWITCHES[0]:
        return f"{text} loop" if text == "1" else f"{text} loops"
    return f"{key.rpartition('.')[2]}={text}"


def _overrides(node: yaml.Node, where: str) -> list[str]:
    """`key=value` texts of a mapping of dotted keys; nothing where the node is null."""
    if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
        return []
    return [f"{key.value}={_yaml_text(value)}" for key, value in _items(node, where)]


def _pair(node: yaml.Node, question: str, where: str) -> list[str]:
    labels = [_text(item, "questions", where) for item in _list(node, "questions", where)]
    if len(labels) != 2:
        raise UserError(f"{where}: questions: {question}: expected two labels, [value, reference]; got {len(labels)}")
    return labels


def _check(sweep: SweepFile) -> None:
    problems = []
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        problems.append("seeds: give at least one, each once")
    if not 0 < sweep.tolerance < 1:
        problems.append(f"tolerance: must be between 0 and 1, got {sweep.tolerance}")
    if not sweep.name or Path(sweep.name).name != sweep.name:
        problems.append(f"name: must be a folder name, got {sweep.name!r}")
    for axis in sweep.axes:
        for key in sorted(set().union(*(choice.keys() for choice in axis.choices)) & _OWNED):
            problems.append(f"axes.{axis.name}: {key} is the sweep's own; use {'seeds' if key == SEED_KEY else key}")
    for override in sweep.overrides:
        key = override.partition("=")[0].strip()
        if key in _OWNED:
            problems.append(f"{key}: is the sweep's own; use {'seeds' if key == SEED_KEY else key}")
    compared = sweep.compared_axis()
    labels = [choice.label for choice in compared.choices] if compared else []
    if sweep.baseline is not None and sweep.baseline not in labels:
        problems.append(f"baseline: {sweep.baseline!r} is none of {', '.join(labels) or 'the axis values (no axis)'}")
    for question, pair in sweep.questions.items():
        problems += [
            f"questions: {question}: {label!r} is none of {', '.join(labels) or 'the axis values (no axis)'}"
            for label in pair
            if label not in labels
        ]
    if problems:
        raise UserError("\n".join(f"{sweep.path}: {problem}" for problem in problems))


# ---------------------------------------------------------------- YAML nodes


class _Loader(yaml.SafeLoader):
    """Parses only; values stay text."""


def _compose(text: str, name: str) -> yaml.Node:
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()
    if node is None:
        raise UserError(f"{name}: is empty")
    return typing.cast(yaml.Node, node)


def _yaml_text(node: yaml.Node) -> str:
    """The node as one line of YAML, scalars as their writer wrote them."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) if node.style is None else yaml.serialize(node, width=10**9).strip()
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_yaml_text(item) for item in node.value) + "]"
    pairs = (f"{_yaml_text(key)}: {_yaml_text(value)}" for key, value in node.value)
    return "{" + ", ".join(pairs) + "}"


def _items(node: yaml.Node, where: str) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise UserError(f"{where}: expected `key: value` lines")
    keys = [key.value for key, _ in node.value]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise UserError(f"{where}: {twice[0]} is given twice")
    return list(node.value)


def _list(node: yaml.Node, key: str, where: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"{where}: {key}: expected a list")
    return list(node.value)


def _text(node: yaml.Node, key: str, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise UserError(f"{where}: {key}: expected a string")
    return str(node.value)


def _integer(node: yaml.Node, key: str, where: str) -> int:
    text = _text(node, key, where)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{where}: {key}: expected an integer, got {text!r}") from None


def _number(node: yaml.Node, key: str, where: str) -> float:
    text = _text(node, key, where)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {key}: expected a number, got {text!r}") from None


def _section[Section: (DecodeSettings, DemoCorpus)](
    cls: type[Section], node: yaml.Node, key: str, where: str
) -> Section:
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    for name, value in _items(node, where):
        if name.value not in kinds:
            raise UserError(f"{where}: unknown key {key}.{name.value}; known: {', '.join(kinds)}")
        read = _integer if kinds[name.value] == "int" else _text
        values[name.value] = read(value, f"{key}.{name.value}", where)
    return cls(**values)  # type: ignore[arg-type]


def _where(node: yaml.Node) -> str:
    return f"{node.start_mark.name}:{node.start_mark.line + 1}"
