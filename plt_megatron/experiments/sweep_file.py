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

Settings of runs are kept as YAML text and converted where the runs' configurations are loaded, so that a setting is
read alike in a run file, on the command line and here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml

from plt_megatron.config.fields import Range, RenamedFrom, Size, field_types
from plt_megatron.config.loader import check, load
from plt_megatron.config.yaml_nodes import is_null, items, to_text, where
from plt_megatron.errors import UserError

Hold = Literal["tokens", "training_flops", "effective_depth", "parameters", "decode_latency"]
HOLDS: tuple[str, ...] = typing.get_args(Hold)
LOOP_SWITCHES = ("model.loop_count", "model.cross_loop_parallel", "model.share_kv", "model.gated_window")
SEED_KEY = "training.seed"
OWNED = {"name": "name", "output_dir": "output_dir", SEED_KEY: "seeds"}  # the sweep sets these itself: by which key


class SettingText(str):
    """A run's setting as the user wrote it."""

    @classmethod
    def from_node(cls, node: yaml.Node, _: str) -> SettingText:
        return cls(to_text(node))


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

    @classmethod
    def from_node(cls, node: yaml.Node, key: str) -> Axis:
        """A list of values of the configuration key that the axis is named for, or a mapping of labels to settings."""
        name = key.partition(".")[2]
        if isinstance(node, yaml.SequenceNode):
            texts = [to_text(item) for item in node.value]
            choices = [Choice(_value_label(name, text), (f"{name}={text}",)) for text in texts]
        elif isinstance(node, yaml.MappingNode):
            choices = [
                Choice(label, tuple(settings_of(value, f"{key}.{label}"))) for label, value, _ in items(node, key)
            ]
        else:
            raise UserError(f"{where(node)}: {key}: expected a list of values or a mapping of named settings")
        labels = [choice.label for choice in choices]
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"{where(node)}: {key}: {'is empty' if not labels else 'has a value twice'}")
        return cls(name, tuple(choices))


@dataclass(frozen=True)
class DecodeSettings:
    """What decoding latency means for `match_budget: decode_latency`: on paper, or by a measured table."""

    context_length: Size = 2048
    batch_size: Size = 4
    gpu: str = "h100"
    table: str | None = None  # a CSV of measured milliseconds; see docs/sweeps.md


@dataclass(frozen=True)
class DemoCorpus:
    """The data of `make demo`, with a tokenizer of another size, made before the first run; and of further domains."""

    vocab_size: Size = 2048
    folder: str = ".demo/vocab_2048"
    domains: list[Literal["prose", "mathematics"]] = field(default_factory=list)


class FileOfRuns:
    """What the files of sweeps and studies have in common: settings of all their runs, and a folder for these."""

    name: str
    set: dict[str, SettingText]
    output_dir: str
    path: Path
    settings: list[str]
    changes: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    def name_problems(self) -> Iterator[str]:
        if Path(self.name).name != self.name or self.name == "..":
            yield f"name: must be a folder name, got {self.name!r}"

    @property
    def overrides(self) -> list[str]:
        """Settings of every run."""
        return [*(f"{key}={text}" for key, text in self.set.items()), *self.settings]


@dataclass
class SweepFile(FileOfRuns):
    """A sweep as its file and the command line state it.

    Attributes:
        set: key -> value of settings of every run.
        compare: the axis whose values are compared, holding `match_budget`; None: the one that changes the loops.
        baseline: label of the compared axis' value that the others are measured against; None: the first.
        questions: what the report asks -> labels [value, reference] of the compared axis.
        path: the file; its name is the sweep's, if it gives none.
        settings: `key=value` settings of every run, from the command line; `changes`: of the file's own keys.
    """

    base: Path
    name: str = ""
    set: dict[str, SettingText] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    seeds: list[Annotated[int, Range(1, 2**31 - 1)]] = field(default_factory=lambda: [1])
    match_budget: Annotated[Hold | None, RenamedFrom("hold_equal")] = None
    tolerance: Annotated[float, Range(0, 1, low_excluded=True, high_excluded=True)] = 0.02
    compare: str | None = None
    baseline: str | None = None
    questions: dict[str, list[str]] = field(default_factory=dict)
    output_dir: str = "runs/sweeps"
    title: str | None = None
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    demo_corpus: DemoCorpus | None = None
    path: Path = field(init=False)
    settings: list[str] = field(init=False)
    changes: list[str] = field(init=False)

    def compared_axis(self) -> Axis | None:
        """The axis that is compared: as named, else the first that sets a switch of the loop, else the first."""
        if self.compare is not None:
            return self.axes[self.compare]
        axes = list(self.axes.values())
        touching = [a for a in axes if any(choice.keys() & set(LOOP_SWITCHES) for choice in a.choices)]
        return next(iter(touching or axes), None)


def read_sweep(path: str | Path, settings: Sequence[str] = ()) -> SweepFile:
    """Read a sweep file and apply `key=value` settings from the command line.

    A key of the sweep's own (`seeds=[1,2]`, `match_budget=training_flops`, `name=x`, `axes.model.loop_count=[1,2]`)
    changes the sweep; any other is a setting of every run.
    Raises `UserError` naming file, line and key.
    """
    return read_file_of_runs(SweepFile, path, settings, _problems)


def read_file_of_runs[T: FileOfRuns](
    kind: type[T], path: str | Path, settings: Sequence[str], problems: Callable[[T], Iterator[str]]
) -> T:
    """Read a file; `settings` of its own keys change it, all others are settings of every run.

    Raises `UserError` naming file, line and key, also of what `problems` finds.
    """
    keys = field_types(typing.cast(type, kind))
    own = [text for text in settings if text.partition("=")[0].partition(".")[0].strip() in keys]
    file = load(kind, path, own)
    file.path = Path(path)
    file.settings = [text for text in settings if text not in own]
    file.changes = own
    file.name = file.name or file.path.stem
    check(file, problems(file))
    return file


def _value_label(key: str, text: str) -> str:
    """`2 loops`, `hidden_size=128`."""
    if key == LOOP_SWITCHES[0]:
        return f"{text} loop" if text == "1" else f"{text} loops"
    return f"{key.rpartition('.')[2]}={text}"


def settings_of(node: yaml.Node, key: str) -> list[str]:
    """`key=value` texts of a mapping of dotted keys; nothing where the node is null."""
    return [] if is_null(node) else [f"{name}={to_text(value)}" for name, value, _ in items(node, key)]


def _problems(sweep: SweepFile) -> Iterator[str]:
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        yield "seeds: give at least one, each once"
    yield from sweep.name_problems()
    for axis in sweep.axes.values():
        for key in sorted(set().union(*(choice.keys() for choice in axis.choices)) & OWNED.keys()):
            yield f"axes.{axis.name}: {key} is the sweep's own; use {OWNED[key]}"
    for override in sweep.overrides:
        key = override.partition("=")[0].strip()
        if key in OWNED:
            yield f"set.{key}: {key} is the sweep's own; use {OWNED[key]}"
    if sweep.compare is not None and sweep.compare not in sweep.axes:
        yield f"compare: there is no axis {sweep.compare!r}; the axes are {', '.join(sweep.axes) or 'none'}"
        return
    compared = sweep.compared_axis()
    labels = [choice.label for choice in compared.choices] if compared else []
    known = ", ".join(labels) or "the axis values (no axis)"
    if sweep.baseline is not None and sweep.baseline not in labels:
        yield f"baseline: {sweep.baseline!r} is none of {known}"
    # The command line may have left out some of the file's rows.
    has_other_axes = any(change.startswith("axes.") for change in sweep.changes)
    for question, pair in sweep.questions.items():
        if len(pair) != 2:
            yield f"questions.{question}: expected two labels, [value, reference]; got {len(pair)}"
        elif not has_other_axes:
            yield from (f"questions.{question}: {label!r} is none of {known}" for label in pair if label not in labels)
