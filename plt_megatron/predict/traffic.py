"""Bytes that one rank sends in an optimizer step, by purpose.

A ring collective over n ranks sends (n - 1) / n of the whole tensor per rank for an all-gather or a reduce-scatter,
and twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.predict.activations import FP32, Activations
from plt_megatron.predict.layout import Layout
from plt_megatron.predict.matrices import stage_matrices
from plt_megatron.predict.parameters import RankParameters, active_experts, undivided_parameters

_COUNT = 8  # bytes of a number of tokens


def communication_bytes(
    config: RunConfig,
    layout: Layout,
    shapes: Activations,
    parameters: RankParameters,
    embedding_parameters: int,
    stage: int = 0,
) -> dict[str, float]:
    """Bytes sent per step by one rank of the busiest kind, by purpose; purposes with no traffic are left out.
    `host transfers`: between device and host, where DeepSpeed offloads.

    `parameters` and `embedding_parameters`: of the stage with most, which is `stage`, and of the first one's embedding.
    """
    loops, own = config.model.loop_count, max(layout.stage_layers(config.model.num_layers), key=len)
    looped = derived.looped_among(config.model, own)
    again = (loops - 1) * looped  # layers of a microbatch's later loops
    passes = layout.microbatches * (len(own) + len(again)) / len(own)
    matrices, of_experts = (stage_matrices(config, layout, stage, experts=which) for which in (False, True))
    dense = _share(layout.shards) * (parameters.dense + matrices.padding)
    experts = _share(layout.expert_shards) * (parameters.experts + of_experts.padding)
    traffic = {
        "tensor parallel": layout.microbatches
        * (
            _tensor_layers(config, layout, shapes, [*own, *again])
            + loops * len(looped) * _hidden_gate(layout, shapes)
            + len([*own, *again]) * _key_shift(config.model, layout, shapes)
        )
        + _tensor_ends(config, layout, shapes, loops)
        + _whole_gradients(config, layout, own, shapes.hidden),
        "pipeline": _pipeline(layout, loops) * shapes.layer_input(),
        "gradient reduction": FP32 * (dense + experts),
        "weight gathering": shapes.element * (dense + experts),
        "host transfers": 0.0
        if layout.on_cpu
        else _host(layout, shapes.element, parameters.total // layout.shards, passes),
        "context parallel": layout.microbatches
        * (
            len(looped) * _context_layer(layout, shapes, loops)
            + (len(own) - len(looped)) * _context_layer(layout, shapes, 1)
        ),
        "expert parallel": layout.microbatches
        * _most_expert_runs(config.model, layout)
        * _expert_layer(config, layout, shapes),
        "matrix updates": _share(layout.tensor) * FP32 * matrices.gathered(layout.tensor),
    }
    if layout.pipeline > 1 and config.model.share_embeddings_and_output_weights:
        traffic["tied embeddings"] = float(FP32 * embedding_parameters)
    if layout.zero_stage >= 2:  # after every microbatch, since no rank has room for the sum
        traffic["gradient reduction"] *= layout.microbatches
    if layout.zero_stage == 3:  # in every loop, forward and backward
        traffic["weight gathering"] *= 2 * passes
    if layout.zero_stage == 0:
        traffic["gradient reduction"], traffic["weight gathering"] = 2 * traffic["gradient reduction"], 0.0
    return {name: amount for name, amount in traffic.items() if amount > 0}


def _host(layout: Layout, element: int, owned: int, passes: float) -> float:
    """Offloaded: a rank's gradients go to the host and its weights come back each step, or in every pass."""
    optimizer = (FP32 + element) * owned if layout.offload_optimizer else 0
    weights = 2 * passes * element * owned if layout.offload_weights else 0
    return float(optimizer + weights)


def _pipeline(layout: Layout, loops: int) -> float:
    """Messages of a step: hidden states forward and gradients backward in every loop. The first stage has no gradients
    to send in the first loop, and the last no hidden states in the last."""
    if layout.pipeline == 1:
        return 0.0
    return float(layout.microbatches * (2 * loops - (1 if layout.pipeline == 2 else 0)))


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor_layers(config: RunConfig, layout: Layout, shapes: Activations, layers: Iterable[int]) -> float:
    return sum(count * _tensor_layer(layout, kind) for kind, count in shapes.by_kind(config.model, layers))


def _most_expert_runs(model: ModelConfig, layout: Layout) -> int:
    """How often a microbatch goes through a layer of experts, in the stage with most."""
    experts, looped = derived.expert_layers(model), derived.looped_layers(model)
    runs = {layer: model.loop_count if layer in looped else 1 for layer in experts}
    return max(sum(runs.get(layer, 0) for layer in own) for own in layout.stage_layers(model.num_layers))


def _tensor_layer(layout: Layout, shapes: Activations) -> float:
    """Attention and FFN of one layer, loop and microbatch, forward and backward.

    All-reduces: one each way for attention, one for the FFN. Sequence parallelism: an all-gather and a reduce-scatter
    in place of each, and one more all-gather for the weights' gradients. Ranks that have a key/value head in common
    gather the projection to Q, K and V, and reduce-scatter its gradient.
    """
    whole = _share(layout.tensor) * shapes.tokens * shapes.hidden * shapes.element
    if shapes.ffn == 0:  # experts alone: attention's half
        whole /= 2
    qkv = _share(layout.tensor) * shapes.tokens * shapes.gathered_qkv * shapes.element
    forward, backward = 4 * whole + qkv, (6 if layout.sequence_parallel else 4) * whole + qkv
    return forward + backward + (forward if layout.recompute == "full" else 0)


def _hidden_gate(layout: Layout, shapes: Activations) -> float:
    """One layer's logits in one loop and microbatch, of all heads: gathered with sequence parallelism, and their
    gradients in any case."""
    if not shapes.hidden_gate:
        return 0.0
    gathers = (2 if layout.recompute == "full" else 1) if layout.sequence_parallel else 0
    heads = shapes.heads * layout.tensor
    return (gathers + 1) * _share(layout.tensor) * shapes.tokens * heads * shapes.element


def _key_shift(model: ModelConfig, layout: Layout, shapes: Activations) -> float:
    """Gradients of learned factors of one layer in one loop and microbatch: each rank has those of its groups."""
    if not shapes.learned_key_shift:
        return 0.0
    return 2 * _share(layout.tensor) * 2 * derived.num_query_groups(model) * shapes.element


def _expert_layer(config: RunConfig, layout: Layout, shapes: Activations) -> float:
    """Tokens of one layer, loop and microbatch to their experts and back, forward and backward, at an even load.

    `alltoall` sends a token to each of its experts' ranks, `allgather` every token to all ranks, and adds up there what
    comes back. With it go the router's weights and, forward, which token goes where: its counts, or the whole map.
    """
    if layout.expert == 1:
        return 0.0
    others, forwards = layout.expert - 1, 2 if layout.recompute == "full" else 1
    if config.parallel.moe_token_dispatcher_type == "alltoall":
        sent = shapes.rows * active_experts(config.model) * _share(layout.expert)
        there = back = sent * shapes.hidden * shapes.element
        weights, choice = sent * FP32, _COUNT * shapes.experts * others
    else:
        sent = shapes.rows * others
        there, back = sent * shapes.hidden * shapes.element, sent * shapes.hidden * FP32  # sums of experts' outputs
        weights, choice = sent * shapes.experts * FP32, sent * shapes.experts
    return float((there + back + weights) * (forwards + 1) + choice * forwards)


def _tensor_ends(config: RunConfig, layout: Layout, shapes: Activations, loops: int) -> float:
    """Embedding and output layer of all microbatches, the latter for each loop with a loss; in a pipeline, where each
    loop embeds anew, of the busier end. The cross-entropy adds up three numbers of each token, the last loop's z-loss
    one."""
    whole = _share(layout.tensor) * shapes.tokens * shapes.hidden * shapes.element
    heads = len(derived.loops_with_loss(config, loops))
    numbers = 3 * heads + (1 if config.training.z_loss_coeff else 0)
    losses = 2 * _share(layout.tensor) * numbers * shapes.tokens * FP32
    embedding, head = 2 * whole, heads * (3 if layout.sequence_parallel else 2) * whole + losses
    return layout.microbatches * (embedding + head if layout.pipeline == 1 else max(loops * embedding, head))


def _whole_gradients(config: RunConfig, layout: Layout, layers: range, hidden: int) -> float:
    """Gradients of what tensor-parallel ranks have whole (norms, routers), where each sees a part of the rows."""
    if not layout.sequence_parallel:
        return 0.0
    whole = undivided_parameters(config.model, layers) + hidden  # the final norm's
    if config.model.key_shift == "learned":  # summed in each backward pass
        whole -= 2 * len(layers) * derived.num_query_groups(config.model)
    return 2 * _share(layout.tensor) * FP32 * whole


def _context_layer(layout: Layout, shapes: Activations, loops: int) -> float:
    """K and V of one layer and microbatch in all loops.

    Transformer Engine sends them around a ring in every loop; in the backward pass, their gradients too. With packed
    documents ranks exchange rows for heads, of queries and outputs too. The torch backend gathers K and V, in the first
    loop for all if they are shared, again to recompute core attention, and reduces their gradients; the few rows before
    a rank's own, for its window, are left out.
    """
    passes = 2 if layout.recompute == "none" else 3
    if shapes.te and shapes.documents:
        both = 2.0 * (shapes.heads + shapes.groups)
        later = both
        if shapes.shares_kv:
            values = 0.0 if shapes.shares_values else shapes.groups
            later = 2.0 * shapes.heads + values + (both if shapes.windowed else 0.0)
        sent = _share(layout.context) * shapes.tokens * shapes.channels * shapes.element
        return passes * (both + (loops - 1) * later) * sent
    others = 2.0 * (layout.context - 1) * shapes.tokens * shapes.groups * shapes.channels * shapes.element
    if shapes.te:
        return 3 * loops * others
    gathered = (1 if shapes.shares_kv else loops) + (1 if shapes.shares_values else loops)  # K's times and V's
    return gathered / 2 * passes * others
