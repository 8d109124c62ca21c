"""A study's current knowledge: its runs' results, the law fitted to them, the frontiers, and the cost of training."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig, MoeConfig, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import DecideSettings
from plt_megatron.experiments.law import LawFit, fit_law
from plt_megatron.experiments.matching import flops_per_token
from plt_megatron.experiments.records import RunResult, first_few, load_results, state_of
from plt_megatron.experiments.solver import Observation
from plt_megatron.experiments.study.decision import Candidate, Frontier, LawVerdict, decide, headline
from plt_megatron.experiments.study.design import Arm
from plt_megatron.experiments.study.grid import Grid, loop_parameters, source_of, start_step, trained_steps
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan
from plt_megatron.predict.decode_cost import ELEMENT, decode_milliseconds, kv_cache_bytes, state_bytes
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.predict.run_estimate import estimate_run

Wiring = tuple[str, int]  # a variant, "" for one loop, and a number of loops
UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}  # of the law's loss


@dataclass(frozen=True)
class Domain:
    """The law and the headline of one validation source alone, in bits per byte."""

    name: str
    fit: LawFit
    answer: LawVerdict


@dataclass(frozen=True)
class Knowledge:
    """The state of a study's knowledge.

    Attributes:
        results: results of all planned runs, in order.
        measure: quantity that the law predicts: `loss` or `bits_per_byte`.
        observations: observations from the runs that count.
        fit: the law; None if there is none yet, for the reason `no_law`.
        frontiers: empty without a law.
        rates: model FLOP/s that each wiring's runs reached.
        domains: one for each validation source, if runs were validated by source.
    """

    measure: str
    results: tuple[RunResult, ...]
    observations: tuple[Observation, ...]
    fit: LawFit | None
    no_law: str
    frontiers: tuple[Frontier, ...]
    rates: dict[Wiring, float]
    domains: tuple[Domain, ...] = ()

    @property
    def answer(self) -> LawVerdict | None:
        return headline(self.frontiers) if self.frontiers else None

    def counted(self) -> list[str]:
        """Return the names of the runs that count, in the order of the observations."""
        return [result.run.name for result in self.results if _value(result, self.measure) is not None]

    def problems(self) -> list[str]:
        """Describe each planned run that does not count, with the reason, in one line."""
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
        lines += [
            f"{r.run.name} does not count: it was validated without {self.measure.replace('_', ' ')}"
            for r in self.results
            if r.status == "used" and _value(r, self.measure) is None
        ]
        if waiting:
            lines.append(f"not started: {first_few(waiting)}")
        return lines


def learn(grid: Grid, plan: SweepPlan | None, bootstraps: int = 400) -> Knowledge:
    """Read the runs of a plan, fit the law, and decide. `plan` None: before the first round."""
    results = tuple(load_results(plan.folder).runs if plan is not None else ())
    rates, measure = _rates(grid, results), grid.study.measure
    observations = _observations(grid, results, measure)
    try:
        fit = fit_law(observations, variants=list(grid.study.variants), bootstraps=bootstraps)
    except UserError as error:
        return Knowledge(measure, results, observations, None, str(error), (), rates)
    candidates, target = make_candidates(grid, rates), grid.study.decide
    frontiers = tuple(decide(fit, candidates, target, UNITS[measure]))
    domains = []
    for name in _sources(results):
        own = _observations(grid, results, name)
        with contextlib.suppress(UserError):  # some runs were validated without it
            law = fit_law(own, variants=list(grid.study.variants), bootstraps=bootstraps // 2)
            found = decide(law, candidates, target, UNITS["bits_per_byte"], curves=False)
            domains.append(Domain(name, law, headline(found)))
    return Knowledge(measure, results, observations, fit, "", frontiers, rates, tuple(domains))


def _observations(grid: Grid, results: Sequence[RunResult], measure: str) -> tuple[Observation, ...]:
    """Return observations of the runs that count. `measure`: the study's, or a source's name for its bits per byte."""
    places, observations = grid.places(), []
    for result in results:
        value = _value(result, measure)
        if value is not None:
            own = grid.arms[places[result.run.name][0]]
            arm = own.arm
            seen = (arm.variant, arm.once, arm.looped, arm.loops, result.run.tokens, value)
            observations.append(Observation(*seen, own.name, arm.seed))
    return tuple(observations)


def _value(result: RunResult, measure: str) -> float | None:
    """Return a run's final value of the measure; None if the run does not count or was not measured."""
    if result.status != "used":
        return None
    if measure == "loss":
        return result.loss
    record = result.validation
    found = record.get(measure) if measure == "bits_per_byte" else record.get("source_bits_per_byte", {}).get(measure)
    return found if isinstance(found, float) else None


def _sources(results: Sequence[RunResult]) -> list[str]:
    """Return the validation sources that runs have bits per byte of, if there are several."""
    used = [result for result in results if result.status == "used"]
    names = dict.fromkeys(name for r in used for name in r.validation.get("source_bits_per_byte", {}))
    return list(names) if len(names) > 1 else []


def priced_arms(grid: Grid, rates: Mapping[Wiring, float], gpu: str | None) -> list[Arm]:
    """Return the arms with their training seconds per token, as measured, else as estimated for `gpu` (None: one core
    of this machine's CPU)."""
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
    """Return the training seconds of a run by the arm's price, without the trunk's part."""
    return trained_steps(run) * derived.tokens_per_step(run.config) * arm.seconds_per_token


def is_ready(run: PlannedRun) -> bool:
    """Return whether a run can start or resume: it needs no checkpoint, or its own or its trunk's exists."""
    load = run.config.checkpoint.load
    return (
        load is None
        or run.folder.latest_checkpoint(verify=False) is not None
        or run.folder.path.parent.joinpath(*load.split("/")[-3:]).is_dir()
    )


def _lost_its_trunk(run: PlannedRun) -> bool:
    """Return whether a pending branch has no checkpoint to start from."""
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


# ---------------------------------------------------------------- the models that are decided about

_STEP = 1.1  # ratio of a shape's scale to that of the one before
_SMALLEST = 0.05  # smallest scale, relative to the study's largest size
_MOST_PARAMETERS = 1e12


def make_candidates(grid: Grid, rates: Mapping[tuple[str, int], float]) -> list[Candidate]:
    """Build the candidate shapes of every wiring: the study's largest, scaled down and up in the same proportions.

    Args:
        rates: model FLOP/s that the runs of each (variant, loops) reached; the variant is "" for one loop.
    """
    largest = max(grid.arms, key=lambda each: each.arm.looped if each.arm.loops == 1 else 0.0)
    size = largest.arm.size
    wirings = {(a.arm.variant if a.arm.loops > 1 else "", a.arm.loops): a for a in grid.arms if a.arm.size == size}
    candidates = []
    for (variant, loops), own in wirings.items():
        vocab = grid.study.decide.vocab_size or own.vocab
        for config in _ladder(own.config):
            rate = rates.get((variant, loops))
            candidates.append(_candidate(variant, config, vocab, grid.study.decide, rate))
    return candidates


def _ladder(config: RunConfig) -> list[RunConfig]:
    """Return the configuration at all scales, smallest first, each shape once."""
    found: dict[tuple[int, int], RunConfig] = {}
    scale = _SMALLEST
    while True:
        model = _scaled(config.model, scale)
        if model.num_layers * model.hidden_size**2 * 12 > _MOST_PARAMETERS:
            return list(found.values())
        found.setdefault((model.num_layers, model.hidden_size), dataclasses.replace(config, model=model))
        scale *= _STEP


def _scaled(model: ModelConfig, scale: float) -> ModelConfig:
    """Scale layers, width and FFN by `scale`, with the same head dimension and share of K/V heads."""
    head, groups = derived.head_dim(model), derived.num_query_groups(model)
    ratio = model.num_attention_heads // groups
    new_groups = max(1, round(groups * scale))
    heads = new_groups * ratio
    # The head dimension may differ from width / heads; the ratio of width to heads is kept.
    width = max(1, round(model.hidden_size / model.num_attention_heads)) * heads
    return dataclasses.replace(
        model,
        num_layers=max(1, round(model.num_layers * scale)),
        hidden_size=width,
        ffn_hidden_size=max(8, 8 * round(model.ffn_hidden_size * width / model.hidden_size / 8)),
        num_attention_heads=heads,
        num_query_groups=new_groups,
        kv_channels=head,
        moe=None if model.moe is None else _scaled_experts(model.moe, scale),
    )


def _scaled_experts(moe: MoeConfig, scale: float) -> MoeConfig:
    own, shared = _times(moe.ffn_hidden_size, scale), _times(moe.shared_expert_intermediate_size, scale)
    return dataclasses.replace(moe, ffn_hidden_size=own, shared_expert_intermediate_size=shared)


def _times(width: int | None, scale: float) -> int | None:
    return None if width is None else max(8, 8 * round(width * scale / 8))


def _candidate(variant: str, config: RunConfig, vocab: int, settings: DecideSettings, rate: float | None) -> Candidate:
    once, looped = loop_parameters(config, vocab)
    flops = flops_per_token(config, vocab)
    model, context, batch = config.model, settings.context_length, settings.batch_size
    weights = ELEMENT * count_parameters(model, vocab).total
    memory = weights + batch * (kv_cache_bytes(model, context) + state_bytes(model, context))
    seconds = None if rate is None or not math.isfinite(rate) else flops / rate
    latency = decode_milliseconds(model, vocab, context, batch, settings.gpu)
    return Candidate(variant, model.loop_count, once, looped, flops, seconds, latency, float(memory))
