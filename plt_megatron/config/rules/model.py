"""Rules for the model's layers, their positions and the window's kernel."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.rules import find_obstacle_problems
from plt_megatron.config.schema import RunConfig


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    yield from _check_layers(config)
    yield from _check_rope_scaling(config)
    yield from _check_fused_window(config)


def _check_layers(config: RunConfig) -> Iterator[str]:
    model, head_dim = config.model, derived.head_dim(config.model)
    if model.key_shift == "channels" and head_dim % 4 == 2:
        yield f"model.key_shift channels needs a head dimension (model.kv_channels) divisible by 4, not {head_dim}"
    if model.key_shift == "heads" and derived.num_query_groups(model) < 2:
        yield "model.key_shift heads shifts half of model.num_query_groups, which is 1; set model.key_shift=channels"
    if model.loop_count > 1 and model.gated_window and not model.share_kv:
        yield (
            "model.gated_window needs model.share_kv: without sharing, the later loops' attention is already "
            "their own; set model.gated_window=false or model.share_kv=true"
        )
    if model.loop_count > 1 and not model.share_values and not model.share_kv:
        yield (
            "model.share_values=false applies to shared keys, but model.share_kv=false shares neither; set "
            "model.share_values=true or model.share_kv=true"
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
