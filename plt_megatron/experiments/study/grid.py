"""Every run that a study may make: arms (a size, a wiring, a loop count, a seed) and their horizons, as configurations.

An arm's runs are one trunk and its branches (`config.branching`): they share the seed, the order of samples and the
constant rate, and keep checkpoints where any of the horizons begins to decay. A run starts from the latest of these
checkpoints that an earlier run of its arm has passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.branching import first_decay_step, stages_problem
from plt_megatron.config.loader import load_config, setting
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import Settings, StudyFile
from plt_megatron.experiments.matching import parameters
from plt_megatron.experiments.study.design import Arm, Horizons
from plt_megatron.experiments.sweep_plan import PlannedRun, name_clashes, slug, vocab_of
from plt_megatron.run_folder.checkpoints import folder_name, step_of
from plt_megatron.run_folder.text import plural

ONE_LOOP = "every"  # the variant of a run of one loop
_PARTS = 4  # parts of the shortest horizon; all decays begin at a multiple of one, so that few checkpoints serve all


@dataclass(frozen=True, kw_only=True)
class GridArm(Arm):
    """An arm and its runs.

    Attributes:
        config: configuration of its runs, without name and length.
        lengths: for each horizon, the step after which the rate decays, and the number of steps of decay.
    """

    config: RunConfig
    vocab: int
    lengths: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """Common part of its runs' names, without the horizon."""
        return "-".join([slug(self.variant or ONE_LOOP), slug(self.size), f"{self.loops}x", f"seed{self.seed}"])


@dataclass(frozen=True)
class Grid:
    """All arms, and their common horizons."""

    study: StudyFile
    arms: tuple[GridArm, ...]
    horizons: Horizons

    def run_name(self, arm: int, tokens: float) -> str:
        return f"{self.arms[arm].name}-{_short(tokens)}"

    def places(self) -> dict[str, tuple[int, float]]:
        """Return arm and horizon of all possible runs, by name."""
        return {self.run_name(arm, t): (arm, t) for arm in range(len(self.arms)) for t in self.horizons.tokens}

    def planned(
        self, chosen: Sequence[tuple[int, float]], number: int, before: Sequence[PlannedRun]
    ) -> list[PlannedRun]:
        """Return the runs of round `number`. `before`: those of earlier rounds, in order."""
        runs: list[PlannedRun] = []
        for index, tokens in chosen:
            own = [run for run in (*before, *runs) if run.name.startswith(f"{self.arms[index].name}-")]
            runs.append(self._planned(index, tokens, number, own))
        return runs

    def _planned(self, index: int, tokens: float, number: int, own: Sequence[PlannedRun]) -> PlannedRun:
        arm, name = self.arms[index], self.run_name(index, tokens)
        step, decay = arm.lengths[self.horizons.tokens.index(tokens)]
        source = _source(own, step)
        load = None if source is None else str(source[0].folder.checkpoints / folder_name(source[1]))
        config = replace(
            _lasting(arm.config, step, decay),
            name=name,
            checkpoint=replace(arm.config.checkpoint, load=load, allow_other_schedule=source is not None),
        )
        labels = {
            "variant": arm.variant or ONE_LOOP,
            "size": arm.size,
            "loops": plural(arm.loops, "loop"),
            "horizon": f"{_short(tokens)} tokens",
            "round": str(number),
        }
        change = "" if source is None else f"branch of {source[0].name} at step {source[1]}"
        return PlannedRun(name, labels, arm.seed, config, arm.vocab, change)


def _lasting(config: RunConfig, step: int, decay: int) -> RunConfig:
    """Return an arm's configuration of a run of `step` steps with a constant rate and `decay` steps of its decay."""
    return replace(
        config,
        training=replace(config.training, train_iters=step + decay),
        optimizer=replace(config.optimizer, lr_decay_iters=step + decay, lr_wsd_decay_iters=decay),
    )


def make_grid(study: StudyFile) -> Grid:
    """Build the grid of a study, whose files need not exist yet.

    Raises `UserError`, one line per problem, if settings of runs are wrong.
    """
    wirings = [("", 1), *((variant, loops) for variant in study.variants for loops in study.loops if loops > 1)]
    width = load_config(study.base, study.overrides).model.hidden_size
    arms: list[GridArm] = []
    problems: list[str] = []
    for size in study.sizes:
        for variant, loops in wirings:
            config = _config(study, size, variant, loops, width)
            named = replace(config, name="run")
            shortest = _lasting(named, *_lengths(study, derived.tokens_per_step(config))[0])
            # What is wrong with the longest horizon is wrong with the others too, and said once.
            found = find_problems(named, check_files=False) or find_problems(shortest, check_files=False)
            if not config.checkpoint.enabled:
                found.append("checkpoint.enabled: a study's runs branch from checkpoints; must be true")
            if config.validation.iters == 0:
                found.append("validation.iters: a study compares validated losses; must be above 0")
            if loops not in derived.validation_loop_counts(config):
                found.append(
                    f"validation.loop_counts: a study compares losses at the run's own loops; must have {loops}"
                )
            if study.measure == "bits_per_byte" and not config.validation.by_source:
                found.append("measure: bits_per_byte needs validation.by_source=true")
            if config.model.loop_span is not None:
                found.append("model.loop_span: a study's law needs all layers to loop; leave it out")
            problems += [f"size {size}, {variant or ONE_LOOP}, {plural(loops, 'loop')}: {text}" for text in found]
            if not found:
                arms += _arms(study, size, variant, loops, config)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    grid = Grid(study, tuple(arms), Horizons(tuple(study.horizons), study.decay_share))
    clashes = name_clashes(
        (grid.run_name(index, tokens), f"{arm.variant or ONE_LOOP}, {arm.size}, {tokens:,.0f} tokens")
        for index, arm in enumerate(grid.arms)
        for tokens in grid.horizons.tokens
    )
    if clashes:
        raise UserError(f"{study.path}: {clashes[0]}")
    return grid


def trained_steps(run: PlannedRun) -> int:
    """Return the number of steps that the run itself takes, without its trunk's."""
    return derived.train_iters(run.config) - start_step(run)


def seconds_of(run: PlannedRun, arm: Arm) -> float:
    """Return the training seconds of a run by the arm's price, without the trunk's part."""
    return trained_steps(run) * derived.tokens_per_step(run.config) * arm.seconds_per_token


def is_ready(run: PlannedRun) -> bool:
    """Return whether a run can start or resume: it needs no checkpoint, or its own or its trunk's exists."""
    checkpoint = start_checkpoint(run)
    return checkpoint is None or run.folder.latest_checkpoint(verify=False) is not None or checkpoint.is_dir()


def start_checkpoint(run: PlannedRun) -> Path | None:
    """Return the checkpoint that a branch starts from, in the study's present folder: it may have been moved; None for
    a run that starts from scratch."""
    load = run.config.checkpoint.load
    return None if load is None else run.folder.path.parent.joinpath(*Path(load).parts[-3:])


def start_step(run: PlannedRun) -> int:
    """Return the step of the checkpoint that a branch starts from; 0 for a run that starts from scratch."""
    checkpoint = start_checkpoint(run)
    return 0 if checkpoint is None else step_of(checkpoint)


def source_of(run: PlannedRun) -> str | None:
    """Return the name of the run that a branch starts from; None if it starts from scratch."""
    checkpoint = start_checkpoint(run)
    return None if checkpoint is None else checkpoint.parts[-3]


def _source(own: Sequence[PlannedRun], step: int) -> tuple[PlannedRun, int] | None:
    """Return the run of the arm that has passed the latest step up to `step` with a constant rate, and that step."""
    found = [(run, min(step, first_decay_step(run.config))) for run in own]
    usable = [(run, at) for run, at in found if at > start_step(run)]
    return max(usable, key=lambda item: item[1], default=None)


def _check_schedules(study: StudyFile, config: RunConfig) -> None:
    """Raise `UserError` for settings that would make the first steps of runs of different lengths differ."""
    problem = stages_problem(config)
    if config.training.batch_schedule:
        problem = "training.batch_schedule: a study's runs and branches have one batch size; leave it out"
    elif config.data.length_schedule:
        problem = "data.length_schedule: a study's runs and branches have one row length; leave it out"
    if problem is not None:
        raise UserError(f"{study.path}: {problem}")


def _config(study: StudyFile, size: str, variant: str, loops: int, width: int) -> RunConfig:
    own = Settings([*study.sizes[size], *(study.variants[variant] if loops > 1 else ())])
    common = [f"model.loop_count={loops}", "training.train_iters=2", setting("output_dir", study.folder)]
    config = load_config(study.base, [*study.overrides, *own, *common, "optimizer.lr_decay_style=WSD"])
    _check_schedules(study, config)
    factor = (width / config.model.hidden_size) ** study.lr_exponent_of_width
    if "optimizer.lr" in own.keys():
        factor = 1.0
    lr, min_lr = factor * config.optimizer.lr, config.optimizer.min_lr
    if "optimizer.min_lr" not in own.keys():
        min_lr *= factor
    lengths = _lengths(study, derived.tokens_per_step(config))
    every = math.gcd(*(step for step, _ in lengths))
    longest = _lasting(config, *lengths[-1])
    return replace(
        longest,
        optimizer=replace(longest.optimizer, lr=lr, min_lr=min_lr),
        data=replace(config.data, order_samples=sum(lengths[-1]) * config.training.global_batch_size),
        checkpoint=replace(config.checkpoint, save_interval=every, keep_every=every),
    )


def _arms(study: StudyFile, size: str, variant: str, loops: int, config: RunConfig) -> Iterator[GridArm]:
    vocab = vocab_of(config, study)
    once, looped = loop_parameters(config, vocab)
    lengths = _lengths(study, derived.tokens_per_step(config))
    for seed in study.seeds:
        seeded = replace(config, training=replace(config.training, seed=seed))
        yield GridArm(variant, once, looped, loops, size, seed, config=seeded, vocab=vocab, lengths=lengths)


def loop_parameters(config: RunConfig, vocab: int) -> tuple[float, float]:
    """Return the parameters without embeddings that a token passes once, and in each loop."""
    counted = parameters(config, vocab)
    once = counted.final_norm + counted.loop_input
    return float(once), float(counted.non_embedding - once)


def _lengths(study: StudyFile, tokens_per_step: int) -> tuple[tuple[int, int], ...]:
    """Return (steps with a constant rate, steps of decay) of each horizon."""
    constant = [(1 - study.decay_share) * tokens / tokens_per_step for tokens in study.horizons]
    unit = max(1, round(constant[0] / _PARTS))
    steps = [max(1, round(each / unit)) * unit for each in constant]
    if len(set(steps)) < len(steps):
        raise UserError(f"{study.path}: horizons are too close together for steps of {tokens_per_step:,} tokens")
    share = study.decay_share / (1 - study.decay_share)
    return tuple((step, max(1, round(step * share))) for step in steps)


def _short(tokens: float) -> str:
    """Format a number of tokens: `2.5M`."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= factor:
            return f"{tokens / factor:g}{unit}"
    return f"{tokens:g}"
