"""Averages the weights of checkpoints of one model, whatever layouts saved them, into a weights-only checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from plt_megatron.hf.arguments import published_folder
from plt_megatron.hf.averaged_checkpoints import AverageOptions, find_checkpoints
from plt_megatron.hf.checkpoint_writer import LazyTensor, padded, write_checkpoint
from plt_megatron.hf.conversion import ParamMapping, mappings_for
from plt_megatron.hf.sources import PRECISIONS, check_ema, saved_model
from plt_megatron.run_folder import checkpoints
from plt_megatron.run_folder.text import first_few
from plt_megatron.train.checkpoint.reading import Weights

# Settings of a model that its weights do not depend on.
_ANY = ("backend", "vocab_size", "make_vocab_size_divisible_by", "loop_preset", "fused_gated_window")
# Entries of a run's record that the average's record keeps.
_KEPT = (
    "consumed_tokens",
    "consumed_samples",
    "data_fingerprint",
    checkpoints.LONGEST_TEXT,
    checkpoints.DOCUMENT_END,
    checkpoints.MADE_ELSEWHERE,
    *checkpoints.ORIGIN,
)


@dataclass(frozen=True)
class AverageResult:
    """The output: a run's folder with one checkpoint, the average of `checkpoints`, whose `shares` add up to 1."""

    output: Path
    checkpoint: Path
    checkpoints: list[Path]
    shares: list[float]
    tensors: int
    precision: str


@dataclass(frozen=True)
class _Member:
    """A checkpoint to average."""

    path: Path
    progress: dict[str, Any]
    model: ModelConfig
    weights: Weights

    @property
    def step(self) -> int:
        return self.progress["step"]

    @property
    def name(self) -> str:
        return f"{self.progress['config']['name']}@{self.step}"


def average(options: AverageOptions, say: Callable[[str], None] = print) -> AverageResult:
    """Write the averaged checkpoint, completely or not at all, with one tensor in memory at a time.

    If a checkpoint has fp32 main weights, those are averaged. The sum is in fp64.

    Raises:
        UserError: a checkpoint is missing or damaged, they are not of one model, or the target exists.
    """
    options = dataclasses.replace(options, sources=[*map(str, options.sources)], output=Path(options.output))
    paths, shares = find_checkpoints(options)
    members = [_open(path, options.ema) for path in paths]
    for other in members[1:]:
        _check_alike(members[0], other)
    last = max(members, key=lambda member: member.step)
    mappings = mappings_for(last.model, last.progress["vocab_size"])
    _check_names(members, mappings)
    config = last.progress["config"]
    precision = options.precision or config["training"]["precision"]
    say(f"averaging {', '.join(member.name for member in members)}" + (" (their moving averages)" * options.ema))
    progress = {name: last.progress[name] for name in _KEPT if name in last.progress}
    progress["averaged_from"] = [[member.name, share] for member, share in zip(members, shares, strict=True)]
    with published_folder(options.output) as folder:
        written = write_checkpoint(
            folder / checkpoints.FOLDER,
            list(_tensors(members, shares, mappings, last)),
            config | {"training": config["training"] | {"precision": precision}},
            last.progress["vocab_size"],
            PRECISIONS[precision],
            progress | {"of_moving_averages": options.ema},
            last.step,
        )
    target = options.output / written.relative_to(folder)
    return AverageResult(options.output, target, paths, shares, len(mappings), precision)


# Checking that they go together.


def _open(path: Path, ema: bool) -> _Member:
    problem = checkpoints.damage(path)
    if problem is not None:
        raise UserError(problem)
    progress = checkpoints.read_verified_progress(path)
    checkpoints.warn_of_doubt(path, progress)
    if ema:
        check_ema(progress, path)
        weights = Weights(path, "ema")
    else:
        weights = Weights(path, "main weights")
        if not weights.names:  # an import's, or another average's
            weights = Weights(path)
    return _Member(path, progress, saved_model(progress["config"]["model"], path), weights)


def _check_alike(one: _Member, other: _Member) -> None:
    both = f"{one.path} and {other.path}"
    before, now = dataclasses.asdict(one.model), dataclasses.asdict(other.model)
    different = next((name for name in now if name not in _ANY and before[name] != now[name]), None)
    if different is not None:
        raise UserError(
            f"{both} are of different models: model.{different} is {before[different]} and {now[different]}"
        )
    sizes = one.progress["vocab_size"], other.progress["vocab_size"]
    if sizes[0] != sizes[1]:
        raise UserError(f"{both} have different vocabularies, of {sizes[0]} and {sizes[1]} entries")
    tokenizers = [(each.progress.get("data_fingerprint") or {}).get("tokenizer") for each in (one, other)]
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        raise UserError(f"{both} were trained with different tokenizers")


def _check_names(members: Sequence[_Member], mappings: Sequence[ParamMapping]) -> None:
    for member in members:
        known = set(member.weights.names)
        missing = [mapping.name for mapping in mappings if mapping.name not in known]
        if missing:
            raise UserError(f"checkpoint {member.path} lacks {first_few(missing, 1)}, which its model has")


# Writing the average.


def _tensors(
    members: Sequence[_Member], shares: Sequence[float], mappings: Sequence[ParamMapping], last: _Member
) -> Iterator[LazyTensor]:
    rows = derived.padded_vocab_size(last.model, last.progress["vocab_size"])
    for mapping in mappings:
        yield padded(LazyTensor(mapping.name, mapping.shape, partial(_mean, members, shares, mapping.name)), rows)


def _mean(members: Sequence[_Member], shares: Sequence[float], name: str) -> Tensor:
    total: Tensor | None = None
    for member, share in zip(members, shares, strict=True):
        part = member.weights.read(name).double() * share
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(torch.float32)
