"""Rules for mixtures of experts (`model.moe`); part of `validation`."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config.schema import MoeConfig, RunConfig


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    size, moe, layers = config.parallel.expert_model_parallel_size, config.model.moe, config.model.num_layers
    if moe is None:
        if size > 1:
            yield (
                f"parallel.expert_model_parallel_size {size} needs experts: set model.moe.num_experts, or "
                "parallel.expert_model_parallel_size=1"
            )
        return
    if moe.first_k_dense_replace >= layers:
        yield (
            f"model.moe.first_k_dense_replace {moe.first_k_dense_replace} leaves none of model.num_layers {layers} for "
            "experts"
        )
    yield from _check_routing(moe)


def _check_routing(moe: MoeConfig) -> Iterator[str]:
    topk, sigmoid = moe.router_topk, moe.router_score_function == "sigmoid"
    if topk > moe.num_experts:
        yield f"model.moe.router_topk {topk} is more than model.moe.num_experts {moe.num_experts}"
    if topk == 1 and moe.router_score_function == "softmax":
        yield (
            "model.moe.router_topk 1 gives the one chosen expert the weight 1, so the router learns nothing; set "
            "model.moe.router_score_function=pre_softmax"
        )
    if moe.router_bias_update_rate is None:
        return
    if not sigmoid:
        yield (
            "model.moe.router_bias_update_rate needs scores that do not depend on one another; set "
            "model.moe.router_score_function=sigmoid"
        )
    if moe.expert_capacity_factor is not None:
        yield (
            "model.moe.router_bias_update_rate with model.moe.expert_capacity_factor "
            f"{moe.expert_capacity_factor:g}: tokens that an expert drops would not count in its load; leave out "
            "one of them"
        )
