"""A study's current knowledge: its runs' results, the law fitted to them, the frontiers, and the cost of training."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig, MoeConfig, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import DecideSettings
from plt_megatron.experiments.law import LawFit, fit_law
from plt_megatron.experiments.matching import flops_per_token
from plt_megatron.experiments.records import RunResult, load_results, state_of
from plt_megatron.experiments.solver import Run
from plt_megatron.experiments.study.decision import Candidate, Frontier, LawVerdict, decide, headline
from plt_megatron.experiments.study.grid import Grid, GridArm, is_ready, loop_parameters, source_of, start_step
from plt_megatron.experiments.sweep_plan import SweepPlan
from plt_megatron.predict.decode_cost import ELEMENT, decode_milliseconds, kv_cache_bytes, state_bytes
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.predict.run_estimate import estimate_run
from plt_megatron.run_folder.text import first_few

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
        observations: the runs that count, as the law sees them.
        fit: the law; None if there is none yet, for the reason `no_law`.
        frontiers: empty without a law.
        rates: model FLOP/s that each wiring's runs reached.
        domains: one for each validation source, if runs were validated by source.
    """

    measure: str
    results: tuple[RunResult, ...]
    observations: tuple[Run, ...]
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
        lines: list[str] = []
        waiting: list[str] = []
        for result in self.results:
            run, status = result.run, result.status
            if status == "missing" and (is_ready(run) or state_of(run) != "pending"):
                waiting.append(run.name)
            elif status == "missing":
                reason = f"its trunk {source_of(run)} has no checkpoint of step {start_step(run)}"
                lines.append(f"{run.name} does not count (missing): {reason}")
            elif status != "used":
                lines.append(f"{run.name} does not count ({status}): {result.reason}")
            elif _value(result, self.measure) is None:
                lines.append(f"{run.name} does not count: it was validated without {self.measure.replace('_', ' ')}")
        return [*lines, f"not started: {first_few(waiting)}"] if waiting else lines


def learn(grid: Grid, plan: SweepPlan, bootstraps: int = 400) -> Knowledge:
    """Read the runs of a plan, fit the law, and decide."""
    results = tuple(load_results(plan.folder).runs) if plan.runs else ()
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


def _observations(grid: Grid, results: Sequence[RunResult], measure: str) -> tuple[Run, ...]:
    """Return the runs that count. `measure`: the study's, or a source's name for its bits per byte."""
    places, runs = grid.places(), []
    for result in results:
        value = _value(result, measure)
        if value is not None:
            arm = grid.arms[places[result.run.name][0]]
            runs.append(arm.trained(result.run.tokens, value, arm.name, arm.seed))
    return tuple(runs)


def _value(result: RunResult, measure: str) -> float | None:
    """Return a run's final value of the measure; None if the run does not count or was not measured."""
    if measure == "loss" or result.status != "used":
        return result.loss
    record = result.validation
    found = record.get(measure) if measure == "bits_per_byte" else record.get("source_bits_per_byte", {}).get(measure)
    return found if isinstance(found, float) else None


def _sources(results: Sequence[RunResult]) -> list[str]:
    """Return the validation sources that runs have bits per byte of, if there are several."""
    used = [result for result in results if result.status == "used"]
    names = dict.fromkeys(name for r in used for name in r.validation.get("source_bits_per_byte", {}))
    return list(names) if len(names) > 1 else []


def priced_arms(grid: Grid, rates: Mapping[Wiring, float], gpu: str) -> list[GridArm]:
    """Return the arms with their training seconds per token, as measured, else as estimated for `gpu` (`cpu`: one
    core of this machine)."""
    usual = statistics.median(rates.values()) if rates else None
    prices: dict[tuple[str, str, int], float] = {}
    priced = []
    for arm in grid.arms:
        model = (arm.variant, arm.size, arm.loops)  # the same for all seeds
        if model not in prices:
            rate = rates.get((arm.variant, arm.loops), usual)
            if rate is not None:
                prices[model] = flops_per_token(arm.config, arm.vocab) / rate
            else:
                estimate = estimate_run(arm.config, gpu=gpu, vocab_size=arm.vocab)
                prices[model] = estimate.step_seconds / derived.tokens_per_step(arm.config)
        priced.append(dataclasses.replace(arm, seconds_per_token=prices[model]))
    return priced


def _rates(grid: Grid, results: Sequence[RunResult]) -> dict[Wiring, float]:
    places = grid.places()
    found: dict[Wiring, list[float]] = {}
    for result in results:
        if result.tokens_per_second:
            arm = grid.arms[places[result.run.name][0]]
            rate = result.tokens_per_second * result.run.flops_per_token
            found.setdefault((arm.variant, arm.loops), []).append(rate)
    return {wiring: statistics.median(values) for wiring, values in found.items()}


# ---------------------------------------------------------------- the models that are decided about

_STEP = 1.1  # ratio of a shape's scale to that of the one before
_SMALLEST = 0.05  # smallest scale, relative to the study's largest size
_MOST_PARAMETERS = 1e12


def make_candidates(grid: Grid, rates: Mapping[Wiring, float]) -> list[Candidate]:
    """Build the candidate shapes of every wiring: the study's largest, scaled down and up in the same proportions.
    `rates`: as in `Knowledge`."""
    largest = max(grid.arms, key=lambda arm: arm.looped if arm.loops == 1 else 0.0)
    wirings = {(arm.variant, arm.loops): arm for arm in grid.arms if arm.size == largest.size}
    decide = grid.study.decide
    return [
        _candidate(arm.variant, config, decide.vocab_size or arm.vocab, decide, rates.get(wiring))
        for wiring, arm in wirings.items()
        for config in _ladder(arm.config)
    ]


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
    layers = max(1, round(model.num_layers * scale))
    return dataclasses.replace(
        model,
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=max(8, 8 * round(model.ffn_hidden_size * width / model.hidden_size / 8)),
        num_attention_heads=heads,
        num_query_groups=new_groups,
        kv_channels=head,
        moe=None if model.moe is None else _scaled_experts(model.moe, scale, layers),
    )


def _scaled_experts(moe: MoeConfig, scale: float, layers: int) -> MoeConfig:
    own, shared = _times(moe.ffn_hidden_size, scale), _times(moe.shared_expert_intermediate_size, scale)
    dense = min(round(moe.first_k_dense_replace * scale), layers - 1)  # of `layers`, some have experts
    return dataclasses.replace(
        moe, ffn_hidden_size=own, shared_expert_intermediate_size=shared, first_k_dense_replace=dense
    )


def _times(width: int | None, scale: float) -> int | None:
    return None if width is None else max(8, 8 * round(width * scale / 8))


def _candidate(variant: str, config: RunConfig, vocab: int, settings: DecideSettings, rate: float | None) -> Candidate:
    once, looped = loop_parameters(config, vocab)
    flops = flops_per_token(config, vocab)
    model, context, batch = config.model, settings.context_length, settings.batch_size
    weights = ELEMENT * count_parameters(model, vocab).total
    memory = weights + batch * (kv_cache_bytes(model, context) + state_bytes(model, context))
    seconds = None if rate is None else flops / rate
    latency = decode_milliseconds(model, vocab, context, batch, settings.gpu)
    return Candidate(variant, once, looped, model.loop_count, flops, seconds, latency, float(memory))
