"""Rules for the model: its layers and positions, its loops (input, span, order), and its mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.rules import find_obstacle_problems
from plt_megatron.config.schema import ModelConfig, MoeConfig, RunConfig


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    yield from _check_layers(config)
    yield from _check_rope_scaling(config)
    yield from _check_fused_window(config)
    yield from _loop_problems(config)
    yield from _moe_problems(config)


def _check_layers(config: RunConfig) -> Iterator[str]:
    model, head_dim = config.model, derived.head_dim(config.model)
    if model.key_shift == "channels" and head_dim % 4 == 2:
        yield f"model.key_shift channels needs a head dimension (model.kv_channels) divisible by 4, not {head_dim}"
    if model.key_shift == "heads" and derived.num_query_groups(model) < 2:
        yield "model.key_shift heads shifts half of model.num_query_groups, which is 1; set model.key_shift=channels"
    if model.loop_count > 1 and model.gated_window and not model.share_kv:
        yield (
            "model.gated_window needs model.share_kv: without sharing, the later loops' attention is already "
            "their own; set model.gated_window=false, or model.share_kv=true and model.full_attention=every_loop"
        )
    if model.loop_count > 1 and not model.share_values and not model.share_kv:
        yield (
            "model.share_values=false applies to shared keys, but model.share_kv=false shares neither; set "
            "model.share_values=true, or model.share_kv=true and model.full_attention=every_loop"
        )
    if derived.windows_earlier_loops(model) and model.share_kv:
        values = "" if model.share_values else "model.share_values=true, "
        yield (
            "model.full_attention last_loop needs model.share_kv=false: the first loop, which attends within a window, "
            f"keeps no keys of the whole context to share; set {values}model.share_kv=false and "
            "model.gated_window=false, or model.full_attention=every_loop"
        )


def _check_rope_scaling(config: RunConfig) -> Iterator[str]:
    scaling = config.model.rope_scaling
    if scaling is None or scaling.yarn is None:
        return
    key, yarn, factor = "model.rope_scaling.yarn", scaling.yarn, scaling.factor
    if yarn.beta_fast <= yarn.beta_slow:
        yield (
            f"{key}.beta_fast {yarn.beta_fast:g} must be above {key}.beta_slow {yarn.beta_slow:g}: both count "
            "rotations over the original length"
        )
    original = yarn.original_max_position_embeddings
    if config.data.sequence_length > factor * original:
        yield (
            f"data.sequence_length {config.data.sequence_length} is longer than YaRN's model.rope_scaling.factor "
            f"{factor:g} x {key}.original_max_position_embeddings {original}: set a larger factor"
        )


def _check_fused_window(config: RunConfig) -> Iterator[str]:
    """Yield what the fused kernel does not support. A missing GPU is reported when the model is built."""
    model = config.model
    if not model.fused_gated_window:
        return
    context, head = config.parallel.context_parallel_size, derived.head_dim(model)
    obstacles = {
        "needs model.gated_window and model.loop_count > 1: there is no window to fuse": not derived.has_gates(model),
        f"does not compute model.gate_activation {model.gate_activation}": model.gate_activation != "sigmoid",
        f"does not run with parallel.context_parallel_size {context}": context > 1,
        "does not run with deepspeed": config.deepspeed is not None,
        f"takes head dimensions from 16 to 256, got {head}": not 16 <= head <= 256,
    }
    yield from find_obstacle_problems("model.fused_gated_window", obstacles, "; set model.fused_gated_window=false")


def _loop_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    yield from _check_input(model)
    yield from _check_order(config)
    span = model.loop_span
    if span is None:
        return
    if len(span) != 2 or not span[0] < span[1] <= model.num_layers:
        example = [model.num_layers // 4, model.num_layers - model.num_layers // 4]
        yield (
            f"model.loop_span {span}: give the first layer that loops and the first after it that does not, counted "
            f"from 0, as in {example} of model.num_layers {model.num_layers}; null: all layers"
        )
        return
    yield from _check_loops(config)
    yield from _check_layout(config)


def _check_input(model: ModelConfig) -> Iterator[str]:
    """Check the input of loops >= 2. A one-loop model ignores it; for loops by layer see `_check_order`."""
    if model.loop_count == 1 or model.loop_order == "layer":
        return
    scaled = {
        "loop_norm rms": model.loop_norm == "rms",
        f"learned_hidden_scale {model.learned_hidden_scale}": model.learned_hidden_scale != "none",
    }
    first = next((name for name, given in scaled.items() if given), None)
    if first is not None and not derived.adds_embeddings(model):
        yield (
            f"model.{first} applies to E + h, but without model.cross_loop_parallel a loop reads h itself; "
            "set model.input_injection=true"
        )


def _check_order(config: RunConfig) -> Iterator[str]:
    """Check loops by layer for settings that need the whole stack to finish a loop before the next begins."""
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    if model.loop_order == "stack" or model.loop_count == 1:
        return
    reads_more = {
        "model.input_injection=false": model.input_injection,
        "model.loop_norm=none": model.loop_norm != "none",
        "model.learned_hidden_scale=none": model.learned_hidden_scale != "none",
    }
    off = " ".join(setting for setting, on in reads_more.items() if on)
    missing = "a loop would need the whole stack's output for the token before, but a layer has only its own"
    in_the_way = {  # settings with the values that fit -> whether they have others, and why those do not
        "model.cross_loop_parallel=false": (model.cross_loop_parallel, missing),
        off: (bool(off), "a layer's next loop reads its own output as it is"),
        "training.loop_loss_weights=[]": (
            bool(config.training.loop_loss_weights),
            "only the last loop ends at the head",
        ),
        "parallel.pipeline_model_parallel_size=1": (stages > 1, "loops are virtual stages of the whole stack"),
    }
    for settings, (given, why) in in_the_way.items():
        if given:
            names = ", ".join(setting.partition("=")[0] for setting in settings.split())
            yield f"{names} with model.loop_order layer: {why}; set {settings}, or model.loop_order=stack"


def _check_loops(config: RunConfig) -> Iterator[str]:
    """Check settings that take the embeddings as the loops' input, or the last layer as a loop's end."""
    model, layers = config.model, derived.looped_layers(config.model)
    prelude, coda = layers.start > 0, layers.stop < model.num_layers
    if (prelude or coda) and model.residual_scaling == "loops_sqrt_layers":
        yield (
            f"model.residual_scaling loops_sqrt_layers is for layers that all loop, not for model.loop_span "
            f"{model.loop_span}; set model.residual_scaling=layers"
        )
    if coda and config.training.loop_loss_weights:
        yield (
            f"training.loop_loss_weights with model.loop_span {model.loop_span}: an earlier loop's output reaches no "
            f"head without the coda; leave them out, or set model.loop_span={[layers.start, model.num_layers]}"
        )


def _check_layout(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    if stages > 1:
        tensor = stages * parallel.tensor_model_parallel_size
        divided = (model.num_attention_heads, derived.num_query_groups(model), *derived.split_ffns(model).values())
        nearest = f" and parallel.tensor_model_parallel_size={tensor}" if not any(n % tensor for n in divided) else ""
        yield (
            f"parallel.pipeline_model_parallel_size {stages} with model.loop_span {model.loop_span}: "
            "stages would run different numbers of layers per loop, which the schedule does not support; set "
            f"parallel.pipeline_model_parallel_size=1{nearest}"
        )


def _moe_problems(config: RunConfig) -> Iterator[str]:
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
