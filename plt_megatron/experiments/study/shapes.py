"""The models that a decision is about: the study's largest shape, scaled down and up at the same proportions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig, MoeConfig, RunConfig
from plt_megatron.estimate.decode_cost import ELEMENT, decode_milliseconds, kv_cache_bytes, state_bytes
from plt_megatron.estimate.parameters import count_parameters
from plt_megatron.experiments.matching import flops_per_token
from plt_megatron.experiments.study.decision import Candidate
from plt_megatron.experiments.study.grid import Grid, loop_parameters
from plt_megatron.experiments.study.study_file import DecideSettings

_STEP = 1.1  # width and depth of a shape over those of the one before
_SMALLEST = 0.05  # of the widths: of the study's largest
_MOST_PARAMETERS = 1e12


def make_candidates(grid: Grid, rates: Mapping[tuple[str, int], float]) -> list[Candidate]:
    """Shapes of every wiring.

    Args:
        rates: model FLOP/s that runs of a variant ("" for one loop) with so many loops reached.
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
    """The configuration at all scales, smallest first, each shape once."""
    found: dict[tuple[int, int], RunConfig] = {}
    scale = _SMALLEST
    while True:
        model = _scaled(config.model, scale)
        if model.num_layers * model.hidden_size**2 * 12 > _MOST_PARAMETERS:
            return list(found.values())
        found.setdefault((model.num_layers, model.hidden_size), dataclasses.replace(config, model=model))
        scale *= _STEP


def _scaled(model: ModelConfig, scale: float) -> ModelConfig:
    """Layers, width and FFN times `scale`, with the same heads' width and share of K/V heads."""
    head, groups = derived.head_dim(model), derived.num_query_groups(model)
    ratio = model.num_attention_heads // groups
    new_groups = max(1, round(groups * scale))
    heads = new_groups * ratio
    # A head's width may differ from width / heads: the width's own proportion to the heads is kept.
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
