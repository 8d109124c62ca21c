"""Checks of a configuration whose layers are mixtures of experts (`model.num_moe_experts`); part of `validation`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plt_megatron.config.schema import ModelConfig, RunConfig

_SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.name.startswith("moe_") or field.name == "first_k_dense_replace"
)


def find_problems(config: RunConfig) -> Iterator[str]:
    """The problems of a configuration whose single settings are in range, one line each."""
    if config.model.num_moe_experts is None:
        yield from _check_unused(config)
        return
    yield from _check_routing(config.model)


def _check_unused(config: RunConfig) -> Iterator[str]:
    """Settings that a dense model would pass over in silence."""
    default = ModelConfig()
    for name in _SETTINGS:
        value = getattr(config.model, name)
        if value != getattr(default, name):
            yield f"model.{name} {value} needs experts: set model.num_moe_experts, or leave it out"
    size = config.parallel.expert_model_parallel_size
    if size > 1:
        yield (
            f"parallel.expert_model_parallel_size {size} needs experts: set model.num_moe_experts, or "
            "parallel.expert_model_parallel_size=1"
        )


def _check_routing(model: ModelConfig) -> Iterator[str]:
    experts, topk = model.num_moe_experts or 0, model.moe_router_topk
    if topk > experts:
        yield f"model.moe_router_topk {topk} is more than model.num_moe_experts {experts}"
    if model.first_k_dense_replace >= model.num_layers:
        yield (
            f"model.first_k_dense_replace {model.first_k_dense_replace} leaves none of model.num_layers "
            f"{model.num_layers} to model.num_moe_experts"
        )
    sigmoid = model.moe_router_score_function == "sigmoid"
    if topk == 1 and not model.moe_router_pre_softmax and not sigmoid:
        yield (
            "model.moe_router_topk 1 gives the one chosen expert the weight 1, so the router learns nothing; set "
            "model.moe_router_pre_softmax=true"
        )
    if sigmoid and model.moe_router_pre_softmax:
        yield (
            "model.moe_router_pre_softmax with model.moe_router_score_function sigmoid: there is no softmax, and "
            "weights are shares of the chosen; set model.moe_router_pre_softmax=false"
        )
    yield from _check_bias(model)


def _check_bias(model: ModelConfig) -> Iterator[str]:
    rate = model.moe_router_bias_update_rate
    if not model.moe_router_enable_expert_bias:
        if rate != ModelConfig().moe_router_bias_update_rate:
            yield (
                f"model.moe_router_bias_update_rate {rate:g} is of a bias that there is not; set "
                "model.moe_router_enable_expert_bias=true, or leave it out"
            )
        return
    if model.moe_router_score_function != "sigmoid":
        yield (
            "model.moe_router_enable_expert_bias is added to scores that do not depend on one another; set "
            "model.moe_router_score_function=sigmoid"
        )
    if model.moe_expert_capacity_factor is not None:
        yield (
            f"model.moe_router_enable_expert_bias with model.moe_expert_capacity_factor "
            f"{model.moe_expert_capacity_factor:g}: tokens that an expert drops would not count in its load; leave out "
            "one of them"
        )
