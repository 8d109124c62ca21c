"""A study's YAML file: which models may be trained, for how much, and what is to be decided.

base: ../sweeps/base/demo_1m.yaml
variants:                          # how loops are wired; the first is the one the answer is about
  PLT: {}
  naive loop: {model.cross_loop_parallel: false, model.share_kv: false, model.gated_window: false}
sizes:
  0.3M: {model.num_layers: 4, model.hidden_size: 80}
  1M: {model.num_layers: 6, model.hidden_size: 128}
  3M: {model.num_layers: 8, model.hidden_size: 176}
loops: [1, 2, 3]
horizons: [1.25e6, 2.5e6, 5e6]     # tokens; shorter ones are decay branches
seeds: [1, 2]
budget: 40h
decide: {training_flops: 1e20, latency_ms: 30}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml

from plt_megatron.config.fields import LoopCount, NotNegative, Positive, PositiveCount, Range, Size
from plt_megatron.config.yaml_nodes import describe, where
from plt_megatron.errors import UserError
from plt_megatron.experiments.sweep_file import (
    LOOP_SWITCHES,
    OWNED,
    DemoCorpus,
    FileOfRuns,
    SettingText,
    read_file_of_runs,
    settings_of,
)
from plt_megatron.predict.cards import card_names

_HOURS = {"m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}
_BUDGET = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(m|min|h|d)")
# What the study sets in every run, and by which of its keys.
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


class Settings(tuple[str, ...]):
    """`key=value` settings of a size or a variant."""

    @classmethod
    def from_node(cls, node: yaml.Node, key: str) -> Settings:
        return cls(settings_of(node, key))

    def keys(self) -> set[str]:
        return {text.partition("=")[0] for text in self}


class Hours(float):
    """A time, in hours: `40h`, `90min`, `2d`."""

    @classmethod
    def from_node(cls, node: yaml.Node, key: str) -> Hours:
        match = _BUDGET.fullmatch(node.value.strip()) if isinstance(node, yaml.ScalarNode) else None
        if match is None or not float(match[1]) > 0:
            raise UserError(f"{where(node)}: {key}: expected a time as in 40h, 90min or 2d, got {describe(node)}")
        return cls(float(match[1]) * _HOURS[match[2]])


@dataclass(frozen=True)
class DecideSettings:
    """Where the decision is asked for.

    Attributes:
        context_length, batch_size, gpu: of decoding.
        vocab_size: of the models decided about; None: the study's.
        confidence: share of the bootstrap samples that decides.
        indifference: a difference of the study's `measure` that nobody would pay for.
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
    """What is believed about luck before the first round, as standard deviations of the loss: `trunk`, what all
    branches of one have in common; `run`, each one's own."""

    trunk: Positive = 0.006
    run: Positive = 0.003


@dataclass
class StudyFile(FileOfRuns):
    """A study as its file and the command line state it.

    Attributes:
        set: settings of every run.
        horizons: tokens of a run, ascending; the rate falls over the last `decay_share` of each.
        lr_exponent_of_width: a size's learning rate is the base's times (base's width / its width) to this power;
            between depths and loops the loop parameterisation carries it over.
        budget: hours of training, of all runs together, each on the hardware that its configuration asks for.
        rounds: at most so many; after each the next runs are chosen by what is known.
        measure: what the law is about: nats per token, or bits per byte of all validation sources together, which takes
            `validation.by_source`.
        settings: `key=value` settings of every run, from the command line.
    """

    base: Path
    horizons: list[Annotated[float, Range(1, 1e15)]]
    name: str = ""
    title: str | None = None
    set: dict[str, SettingText] = field(default_factory=dict)
    variants: dict[str, Settings] = field(default_factory=lambda: {"PLT": Settings()})
    sizes: dict[str, Settings] = field(default_factory=dict)
    loops: list[LoopCount] = field(default_factory=lambda: [1, 2, 3])
    decay_share: Annotated[float, Range(0.01, 0.9)] = 0.2
    seeds: list[Annotated[int, Range(1, 2**31 - 1)]] = field(default_factory=lambda: [1])
    lr_exponent_of_width: NotNegative = 0.0
    budget: Hours = Hours(8.0)
    rounds: PositiveCount = 3
    measure: Literal["loss", "bits_per_byte"] = "loss"
    decide: DecideSettings = field(default_factory=DecideSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    output_dir: str = "runs/studies"
    demo_corpus: DemoCorpus | None = None
    path: Path = field(init=False)
    settings: list[str] = field(init=False)
    changes: list[str] = field(init=False)


def read_study(path: str | Path, settings: Sequence[str] = ()) -> StudyFile:
    """Read a study's file and apply `key=value` settings: of the study itself, else of every run.

    Raises `UserError` naming file, line and key.
    """
    return read_file_of_runs(StudyFile, path, settings, _problems)


def _problems(study: StudyFile) -> Iterator[str]:
    yield from study.name_problems()
    for key, values in (("seeds", study.seeds), ("loops", study.loops)):
        if not values or len(set(values)) < len(values):
            yield f"{key}: give at least one, each once"
    if 1 not in study.loops or len(study.loops) < 2:
        yield "loops: give 1 and at least one more: a loop's worth is measured against one loop"
    if not study.variants:
        yield "variants: give at least one"
    for key, count, why in (("sizes", len(study.sizes), "size"), ("horizons", len(study.horizons), "token")):
        if count < 3:
            yield f"{key}: give at least 3: the law has an exponent of the {why}s"
    if list(study.horizons) != sorted(set(study.horizons)):
        yield "horizons: give them ascending, each once"
    if study.decide.gpu not in card_names():
        yield f"decide.gpu: no card {study.decide.gpu!r} in the table; known: {', '.join(card_names())}"
    groups = {f"sizes.{name}": own.keys() for name, own in study.sizes.items()}
    groups |= {f"variants.{name}": own.keys() for name, own in study.variants.items()}
    groups["set"] = {text.partition("=")[0].strip() for text in study.overrides}
    for group, keys in groups.items():
        for key in sorted(keys & _OWN_SETTINGS.keys()):
            yield f"{group}: {key} is the study's own; use {_OWN_SETTINGS[key]}"
