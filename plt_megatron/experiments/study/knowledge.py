"""What a study knows so far: its runs' results, the law fitted to them, the frontiers, and what training costs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.errors import UserError
from plt_megatron.estimate.run_estimate import estimate_run
from plt_megatron.experiments.matching import flops_per_token
from plt_megatron.experiments.report.results import RunResult, load_results
from plt_megatron.experiments.study.decision import Frontier, Target, Verdict, decide, headline
from plt_megatron.experiments.study.design import Arm
from plt_megatron.experiments.study.grid import Grid, source_of, start_step, trained_steps
from plt_megatron.experiments.study.law import LawFit, fit_law
from plt_megatron.experiments.study.observations import Observation
from plt_megatron.experiments.study.shapes import make_candidates
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan
from plt_megatron.experiments.sweep_status import state_of

Wiring = tuple[str, int]  # a variant, "" for one loop, and a number of loops


@dataclass(frozen=True)
class Knowledge:
    """Of a study in one moment.

    Attributes:
        results: of all planned runs, in order.
        observations: of those that count.
        fit: the law; None where there is none yet, for the reason `no_law`.
        frontiers: empty without a law.
        rates: model FLOP/s that each wiring's runs reached.
    """

    results: tuple[RunResult, ...]
    observations: tuple[Observation, ...]
    fit: LawFit | None
    no_law: str
    frontiers: tuple[Frontier, ...]
    rates: dict[Wiring, float]

    @property
    def answer(self) -> Verdict | None:
        return headline(self.frontiers) if self.frontiers else None

    def problems(self) -> list[str]:
        """One line for each planned run that does not count, with the reason."""
        waiting = [r.run.name for r in self.results if r.status == "missing" and not _lost_its_trunk(r.run)]
        lines = [
            f"{r.run.name} does not count ({r.status}): {r.reason}"
            for r in self.results
            if r.status not in ("used", "missing")
        ]
        lines += [
            f"{r.run.name} does not count (missing): its trunk {source_of(r.run)} has no checkpoint of step "
            f"{start_step(r.run)}"
            for r in self.results
            if r.status == "missing" and _lost_its_trunk(r.run)
        ]
        if waiting:
            shown = ", ".join(waiting[:6]) + (f" and {len(waiting) - 6} more" if len(waiting) > 6 else "")
            lines.append(f"not started: {shown}")
        return lines


def learn(grid: Grid, plan: SweepPlan | None, bootstraps: int = 400) -> Knowledge:
    """Read the runs of a plan, fit the law, and decide. `plan` None: before the first round."""
    results = load_results(plan.folder).runs if plan is not None else []
    places, observations = grid.places(), []
    for result in results:
        if result.status != "used" or result.loss is None:
            continue
        own = grid.arms[places[result.run.name][0]]
        arm = own.arm
        seen = (arm.variant, arm.once, arm.looped, arm.loops, result.run.tokens, result.loss)
        observations.append(Observation(*seen, own.name, arm.seed))
    rates = _rates(grid, results)
    try:
        fit = fit_law(observations, variants=list(grid.study.variants), bootstraps=bootstraps)
    except UserError as error:
        return Knowledge(tuple(results), tuple(observations), None, str(error), (), rates)
    settings = grid.study.decide
    target = Target(
        settings.training_flops,
        settings.latency_ms,
        1e9 * settings.memory_gb,
        settings.confidence,
        settings.indifference,
    )
    frontiers = tuple(decide(fit, make_candidates(grid, rates), target))
    return Knowledge(tuple(results), tuple(observations), fit, "", frontiers, rates)


def priced_arms(grid: Grid, rates: Mapping[Wiring, float], gpu: str | None) -> list[Arm]:
    """The arms with the seconds that a token of training takes: as measured, else as estimated for `gpu` (None: one
    core of this machine's CPU)."""
    usual = statistics.median(rates.values()) if rates else None
    priced: dict[tuple[str, str, int], float] = {}
    for own in grid.arms:
        arm, key = own.arm, (own.arm.variant, own.arm.size, own.arm.loops)
        if key in priced:
            continue
        rate = rates.get((arm.variant if arm.loops > 1 else "", arm.loops), usual)
        if rate is not None:
            priced[key] = flops_per_token(own.config, own.vocab) / rate
        else:
            estimate = estimate_run(own.config, gpu=gpu or "cpu", vocab_size=own.vocab)
            priced[key] = estimate.step_seconds / derived.tokens_per_step(own.config)
    return [
        dataclasses.replace(own.arm, seconds_per_token=priced[own.arm.variant, own.arm.size, own.arm.loops])
        for own in grid.arms
    ]


def seconds_of(run: PlannedRun, arm: Arm) -> float:
    """Of training, by the arm's price; without the trunk's part."""
    return trained_steps(run) * derived.tokens_per_step(run.config) * arm.seconds_per_token


def is_ready(run: PlannedRun) -> bool:
    """Whether it can start, or go on: its own checkpoint or its trunk's is there."""
    load = run.config.checkpoint.load
    return (
        load is None
        or run.folder.latest_checkpoint(verify=False) is not None
        or run.folder.path.parent.joinpath(*load.split("/")[-3:]).is_dir()
    )


def _lost_its_trunk(run: PlannedRun) -> bool:
    """Whether a branch has nothing to start from, although nothing of its trunk is left to be trained."""
    return not is_ready(run) and state_of(run) == "pending"


def _rates(grid: Grid, results: Sequence[RunResult]) -> dict[Wiring, float]:
    places = grid.places()
    found: dict[Wiring, list[float]] = {}
    for result in results:
        if result.tokens_per_second:
            arm = grid.arms[places[result.run.name][0]].arm
            wiring = (arm.variant if arm.loops > 1 else "", arm.loops)
            found.setdefault(wiring, []).append(result.tokens_per_second * result.run.flops_per_token)
    return {wiring: statistics.median(values) for wiring, values in found.items()}
