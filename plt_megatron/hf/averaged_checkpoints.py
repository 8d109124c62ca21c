"""Choice of the checkpoints to average, and of their shares, without importing torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.hf.arguments import check_target
from plt_megatron.run_folder import checkpoints
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import plural


@dataclass(frozen=True)
class AverageOptions:
    """Options for averaging. See `plt average --help`.

    Attributes:
        sources: checkpoints, as `RUN@STEP` or by their folders; with `last`, one run's folder.
        last: number of the run's last checkpoints to average; None: those that `sources` names.
        weights: one per checkpoint, only their ratios matter; empty: equal weights.
        ema: average the checkpoints' moving averages instead of their weights; one checkpoint is enough then.
        precision: precision of the result, fp32 or bf16; None: the last checkpoint's.
    """

    sources: Sequence[str]
    output: Path
    last: int | None = None
    weights: Sequence[float] = ()
    ema: bool = False
    precision: str | None = None


def find_checkpoints(options: AverageOptions) -> tuple[list[Path], list[float]]:
    """Return the checkpoints to average, which may be damaged, and their shares, which add up to 1.

    Raises:
        UserError: a checkpoint is missing or named twice, the weights do not fit them, or the target exists.
    """
    check_target(options.output)
    paths = _find(options)
    return paths, _shares(options.weights, paths)


def _find(options: AverageOptions) -> list[Path]:
    if options.last is not None:
        return _last(options.sources, options.last, fewest=1 if options.ema else 2)
    paths = [_named(source) for source in options.sources]
    resolved = [path.resolve() for path in paths]
    double = next((path for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1), None)
    if double is not None:
        raise UserError(f"{double} is named twice: give it once, with --weights for its share")
    if len(paths) == 1 and not options.ema:
        raise UserError(f"{paths[0]} alone is its own average: name two or more checkpoints, or a run with --last N")
    return paths


def _named(source: str) -> Path:
    """Return the checkpoint that `RUN@STEP` or a path refers to."""
    run, at, step = source.rpartition("@")
    if at and step.isdecimal() and not Path(source).exists():
        if not Path(run).is_dir():
            raise UserError(f"{source}: there is no run {run}")
        return RunFolder(run).checkpoint_at(int(step))
    path = Path(source)
    if not path.is_dir():
        raise UserError(f"{source}: no such checkpoint; give its folder, or RUN@STEP as in runs/mine@2000")
    if not checkpoints.NAME.fullmatch(path.name):
        raise UserError(f"{source} is not a checkpoint: name one of its own, as in {source}@2000, or use --last N")
    return path


def _last(sources: Sequence[str], count: int, fewest: int) -> list[Path]:
    if len(sources) != 1 or ("@" in Path(sources[0]).name and not Path(sources[0]).is_dir()):
        raise UserError(f"--last {count} takes the folder of one run, not {', '.join(sources)}")
    if count < fewest:
        raise UserError(f"--last {count}: an average needs two checkpoints or more, or --ema and one")
    found = checkpoints.candidates(Path(sources[0]))
    if len(found) < count:
        raise UserError(
            f"{sources[0]} has {plural(len(found), 'checkpoint')}, fewer than --last {count}: checkpoint.keep_last and "
            "keep_every say how many a run keeps"
        )
    return found[:count][::-1]


def _shares(weights: Sequence[float], paths: Sequence[Path]) -> list[float]:
    if not weights:
        return [1 / len(paths)] * len(paths)
    if len(weights) != len(paths):
        raise UserError(f"--weights: {len(weights)} for {len(paths)} checkpoints; give one for each")
    wrong = next((weight for weight in weights if not (math.isfinite(weight) and weight > 0)), None)
    if wrong is not None:
        raise UserError(f"--weights: {wrong:g} is not a positive number")
    return [weight / math.fsum(weights) for weight in weights]
