"""The YAML files of sweeps and studies: a base run, what varies, seeds, and what to hold equal or decide.

A sweep's runs are all combinations of its axes; a study chooses its runs in rounds. docs/sweeps.md has examples.
Settings of runs are kept as YAML text and converted when the runs' configurations are loaded, so that a setting is
read the same way in a run file, on the command line and here.
"""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml

from plt_megatron.config.fields import (
    LoopCount,
    NotNegative,
    Positive,
    PositiveCount,
    Range,
    RenamedFrom,
    Size,
    field_types,
)
from plt_megatron.config.loader import check, load
from plt_megatron.config.presets import ATTENTION
from plt_megatron.config.yaml_nodes import OVERRIDE, compose, describe, is_null, items, to_text, where
from plt_megatron.demo.steps import DemoCorpus
from plt_megatron.errors import UserError
from plt_megatron.predict.cards import card_names

Hold = Literal["tokens", "training_flops", "effective_depth", "parameters", "decode_latency"]
LOOP_SWITCHES = tuple(f"model.{name}" for name in ("loop_count", "cross_loop_parallel", *ATTENTION))
_CHANGES_LOOPS = {*LOOP_SWITCHES, "model.loop_preset"}
SEED_KEY = "training.seed"
OWNED = {"name": "name", "output_dir": "output_dir", SEED_KEY: "seeds"}  # run setting -> the file's own key for it
_HOURS = {"m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}
_BUDGET = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(m|min|h|d)")
# Settings that the study controls in every run, with the keys of its file to use instead.
_OWN_SETTINGS = {
    **OWNED,
    LOOP_SWITCHES[0]: "loops",
    "training.train_iters": "horizons",
    "training.train_tokens": "horizons",
    "optimizer.lr_decay_style": "horizons",
    "optimizer.lr_decay_iters": "horizons",
    "optimizer.lr_wsd_decay_iters": "decay_share",
    "data.order_samples": "horizons",
    "checkpoint.load": "horizons",
    "checkpoint.save_interval": "horizons",
    "checkpoint.keep_every": "horizons",
}


class SettingText(str):
    """A run's setting as the user wrote it."""

    @classmethod
    def from_node(cls, node: yaml.Node, _: str) -> SettingText:
        return cls(to_text(node))


class Settings(tuple[str, ...]):
    """`key=value` settings of runs."""

    @classmethod
    def from_node(cls, node: yaml.Node, key: str) -> Settings:
        """Read a mapping of dotted keys; null is empty."""
        return cls(() if is_null(node) else (f"{name}={to_text(value)}" for name, value, _ in items(node, key)))

    def keys(self) -> set[str]:
        """Return the dotted keys, those inside of sections too."""
        found: set[str] = set()
        for text in self:
            key, _, value = text.partition("=")
            found |= _keys(key.strip(), compose(value, f"{OVERRIDE}{text!r}"))
        return found


def _keys(key: str, value: yaml.Node | None) -> set[str]:
    if not isinstance(value, yaml.MappingNode):
        return {key}
    return {key}.union(*(_keys(f"{key}.{name}", inner) for name, inner, _ in items(value, key)))


@dataclass(frozen=True)
class Choice:
    """One value of an axis: its label and the settings that it stands for."""

    label: str
    overrides: Settings


@dataclass(frozen=True)
class Axis:
    """A dimension that varies: a configuration key, or a name of the user's own with named sets of settings."""

    name: str
    choices: tuple[Choice, ...]

    @classmethod
    def from_node(cls, node: yaml.Node, key: str) -> Axis:
        """Read a list of values of the configuration key that names the axis, or a mapping of labels to settings."""
        name = key.partition(".")[2]
        if isinstance(node, yaml.SequenceNode):
            texts = [to_text(item) for item in node.value]
            choices = [Choice(_value_label(name, text), Settings([f"{name}={text}"])) for text in texts]
        elif isinstance(node, yaml.MappingNode):
            named = items(node, key)
            choices = [Choice(label, Settings.from_node(value, f"{key}.{label}")) for label, value, _ in named]
        else:
            raise UserError(f"{where(node)}: {key}: expected a list of values or a mapping of named settings")
        labels = [choice.label for choice in choices]
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"{where(node)}: {key}: {'is empty' if not labels else 'has a value twice'}")
        return cls(name, tuple(choices))


@dataclass(frozen=True)
class DecodeSettings:
    """The definition of decoding latency for `match_budget: decode_latency`: estimated, or from a measured table."""

    context_length: Size = 2048
    batch_size: Size = 4
    gpu: str = "h100"
    table: str | None = None  # a CSV of measured milliseconds; see docs/sweeps.md


@dataclass(kw_only=True)
class FileOfRuns:
    """The common part of the files of sweeps and studies, with changes from the command line.

    Attributes:
        set: settings of every run, by key.
        path: the file; its name is the sweep's or study's, if it gives none.
        settings: `key=value` settings of every run from the command line; `changes`: those of the file's own keys.
    """

    base: Path
    name: str = ""
    title: str | None = None
    set: dict[str, SettingText] = field(default_factory=dict)
    seeds: list[Annotated[int, Range(1, 2**31 - 1)]] = field(default_factory=lambda: [1])
    output_dir: str = ""
    demo_corpus: DemoCorpus | None = None
    path: Path = field(init=False)
    settings: list[str] = field(init=False)
    changes: list[str] = field(init=False)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def overrides(self) -> Settings:
        return Settings([*(f"{key}={text}" for key, text in self.set.items()), *self.settings])

    def common_problems(self, what: str, owned: Mapping[str, str], groups: Mapping[str, Set[str]]) -> Iterator[str]:
        """Yield the problems of a file of any kind (`what`).

        Args:
            owned: settings that the file controls in every run -> its keys to use instead.
            groups: keys that runs set, by their place in the file; without `set`.
        """
        for place, keys in {**groups, "set": self.overrides.keys()}.items():
            for key in sorted(keys & owned.keys()):
                written = next((name for name in self.set if f"{key}.".startswith(f"{name}.")), key)
                at = f"set.{written}" if place == "set" else place
                yield f"{at}: {key} is set by the {what}; use {owned[key]}"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield "seeds: give at least one, each once"
        if Path(self.name).name != self.name or self.name == "..":
            yield f"name: must be a folder name, got {self.name!r}"


@dataclass(kw_only=True)
class SweepFile(FileOfRuns):
    """The file of a sweep.

    Attributes:
        compare: the axis whose values are compared, holding `match_budget`; None: the one that changes the loops.
        baseline: label of the compared axis' value that the others are measured against; None: the first.
        questions: question for the report -> labels [value, reference] of the compared axis.
    """

    axes: dict[str, Axis] = field(default_factory=dict)
    match_budget: Annotated[Hold | None, RenamedFrom("hold_equal")] = None
    tolerance: Annotated[float, Range(0, 1, low_excluded=True, high_excluded=True)] = 0.02
    compare: str | None = None
    baseline: str | None = None
    questions: dict[str, list[str]] = field(default_factory=dict)
    output_dir: str = "runs/sweeps"
    decode: DecodeSettings = field(default_factory=DecodeSettings)

    def compared_axis(self) -> Axis | None:
        """Return the compared axis: the one named, else the first that sets a switch of the loop, else the first."""
        if self.compare is not None:
            return self.axes[self.compare]
        axes = list(self.axes.values())
        touching = [a for a in axes if any(choice.overrides.keys() & _CHANGES_LOOPS for choice in a.choices)]
        return next(iter(touching or axes), None)


def read_sweep(path: str | Path, settings: Sequence[str] = ()) -> SweepFile:
    """Read a sweep's file like `_read`; `axes.model.loop_count=[1,2]` changes an axis."""
    return _read(SweepFile, path, settings, _sweep_problems)


def _read[T: FileOfRuns](
    kind: type[T], path: str | Path, settings: Sequence[str], problems: Callable[[T], Iterator[str]]
) -> T:
    """Read a file. `settings`: `key=value` from the command line; those of the file's own keys (`seeds=[1,2]`) change
    it, all others are settings of every run.

    Raises `UserError` naming file, line and key, also for what `problems` yields.
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
    """Return the label of an axis' value: `2 loops`, `hidden_size=128`."""
    if key == LOOP_SWITCHES[0]:
        return f"{text} loop" if text == "1" else f"{text} loops"
    return f"{key.rpartition('.')[2]}={text}"


def _leaves(keys: Iterable[str]) -> set[str]:
    """Return the keys that are no section of others."""
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def _meet(keys: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return those of `keys` that are also in `others`, are inside a section there, or are a section of a key there."""
    pairs = ((key, f"{key}.", f"{other}.") for key in keys for other in others)
    return sorted({key for key, own, other in pairs if own.startswith(other) or other.startswith(own)})


def _sweep_problems(sweep: SweepFile) -> Iterator[str]:
    axes = {
        f"axes.{axis.name}": set[str]().union(*(_leaves(choice.overrides.keys()) for choice in axis.choices))
        for axis in sweep.axes.values()
    }
    yield from sweep.common_problems("sweep", OWNED, axes)
    for (first, keys), (other, more) in itertools.combinations(axes.items(), 2):
        for key in _meet(more, keys):
            yield f"{other}: {key} is also set by {first}, whose rows would have another value than they say"
    given = Settings(sweep.settings).keys()
    for axis in sweep.axes.values():
        for key in sorted(given.intersection(*(choice.overrides.keys() for choice in axis.choices))):
            yield f"{key}: axes.{axis.name} sets it in every run; change that, or leave this out"
    if sweep.compare is not None and sweep.compare not in sweep.axes:
        yield f"compare: there is no axis {sweep.compare!r}; the axes are {', '.join(sweep.axes) or 'none'}"
        return
    compared = sweep.compared_axis()
    labels = [choice.label for choice in compared.choices] if compared else []
    known = ", ".join(labels) or "the axis values (no axis)"
    if sweep.baseline is not None and sweep.baseline not in labels:
        yield f"baseline: {sweep.baseline!r} is not one of {known}"
    # The command line may leave out some of the file's rows.
    has_other_axes = any(change.startswith("axes.") for change in sweep.changes)
    for question, pair in sweep.questions.items():
        if len(pair) != 2:
            yield f"questions.{question}: expected two labels, [value, reference]; got {len(pair)}"
        elif not has_other_axes:
            yield from (
                f"questions.{question}: {label!r} is not one of {known}" for label in pair if label not in labels
            )


# ---------------------------------------------------------------- studies


class Hours(float):
    """A duration in hours, written as `40h`, `90min` or `2d`."""

    @classmethod
    def from_node(cls, node: yaml.Node, key: str) -> Hours:
        match = _BUDGET.fullmatch(node.value.strip()) if isinstance(node, yaml.ScalarNode) else None
        if match is None or not float(match[1]) > 0:
            raise UserError(f"{where(node)}: {key}: expected a time as in 40h, 90min or 2d, got {describe(node)}")
        return cls(float(match[1]) * _HOURS[match[2]])


@dataclass(frozen=True)
class DecideSettings:
    """The operating point that a study decides for.

    Attributes:
        context_length, batch_size, gpu: conditions of decoding.
        vocab_size: vocabulary of the models to decide between; None: the study's.
        confidence: share of the bootstrap samples required to decide.
        indifference: a difference in the study's `measure` that is too small to matter.
    """

    training_flops: Positive = 1e20
    latency_ms: Positive = 30.0
    memory_gb: Positive = 80.0
    context_length: Size = 4096
    batch_size: Size = 1
    gpu: str = "h100"
    vocab_size: Size | None = None
    confidence: Annotated[float, Range(0.5, 1, low_excluded=True)] = 0.9
    indifference: NotNegative = 0.002


@dataclass(frozen=True)
class NoiseSettings:
    """Standard deviations of the loss assumed before the first round: `trunk` is common to all branches of a trunk,
    `run` is each run's own."""

    trunk: Positive = 0.006
    run: Positive = 0.003


@dataclass(kw_only=True)
class StudyFile(FileOfRuns):
    """The file of a study.

    Attributes:
        horizons: tokens of a run, ascending; the learning rate decays over the last `decay_share` of each.
        lr_exponent_of_width: a size's learning rate is the base's times (base's width / its width) to this power;
            across depths and loops the loop parameterisation transfers it.
        budget: hours of training of all runs together, each on the hardware that its configuration asks for.
        rounds: maximum number of rounds; after each, the next runs are chosen by what is known.
        measure: quantity that the law predicts: nats per token, or bits per byte of all validation sources together,
            which needs `validation.by_source`.
    """

    horizons: list[Annotated[float, Range(1, 1e15)]]
    variants: dict[str, Settings] = field(default_factory=lambda: {"PLT": Settings()})
    sizes: dict[str, Settings] = field(default_factory=dict)
    loops: list[LoopCount] = field(default_factory=lambda: [1, 2, 3])
    decay_share: Annotated[float, Range(0.01, 0.9)] = 0.2
    lr_exponent_of_width: NotNegative = 0.0
    budget: Hours = Hours(8.0)
    rounds: PositiveCount = 3
    measure: Literal["loss", "bits_per_byte"] = "loss"
    decide: DecideSettings = field(default_factory=DecideSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    output_dir: str = "runs/studies"


def read_study(path: str | Path, settings: Sequence[str] = ()) -> StudyFile:
    """Read a study's file like `_read`."""
    return _read(StudyFile, path, settings, _study_problems)


def _study_problems(study: StudyFile) -> Iterator[str]:
    groups = {f"sizes.{name}": own.keys() for name, own in study.sizes.items()}
    groups |= {f"variants.{name}": own.keys() for name, own in study.variants.items()}
    yield from study.common_problems("study", _OWN_SETTINGS, groups)
    if not study.loops or len(set(study.loops)) < len(study.loops):
        yield "loops: give at least one, each once"
    if 1 not in study.loops or len(study.loops) < 2:
        yield "loops: give 1 and at least one more: a loop's worth is measured against one loop"
    if not study.variants:
        yield "variants: give at least one"
    for key, count, why in (("sizes", len(study.sizes), "size"), ("horizons", len(study.horizons), "token")):
        if count < 3:
            yield f"{key}: give at least 3: the law fits an exponent of the {why}s"
    if list(study.horizons) != sorted(set(study.horizons)):
        yield "horizons: give them ascending, each once"
    if study.decide.gpu not in card_names():
        yield f"decide.gpu: no card {study.decide.gpu!r} in the table; known: {', '.join(card_names())}"
