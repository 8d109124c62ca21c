"""Bytes that one rank sends in an optimizer step, by purpose.

A ring collective over n ranks sends (n - 1) / n of the whole tensor per rank for an all-gather or a reduce-scatter,
and twice that for an all-reduce. Data-parallel traffic is a lower bound: each gradient is reduced once, and each weight
gathered once (with ZeRO, in each pass that has no room for the whole).
"""

from __future__ import annotations

from plt_megatron.config import derived
from plt_megatron.model.parameters import parameters_of
from plt_megatron.model.trainable import EMBEDDING, selection, trains, trains_head
from plt_megatron.predict.activations import Activations
from plt_megatron.predict.held import Stage, count_in_layers
from plt_megatron.predict.layers import FP32, runs
from plt_megatron.predict.layout import Layout
from plt_megatron.predict.parameters import elements
from plt_megatron.predict.step import Step

_COUNT = 8  # bytes of a token count
_GATHERING = ("self_attention.linear_qkv.weight", ".mlp.linear_fc1.weight")  # gather inputs with sequence parallelism


def communication_bytes(step: Step) -> dict[str, float]:
    """Return the bytes that one rank of the busiest kind sends per step, by purpose; purposes without traffic are left
    out. `host transfers` are between device and host, if DeepSpeed offloads.
    """
    config, layout, shapes, largest = step.config, step.layout, step.shapes, step.largest
    stage = max(step.stages, key=lambda each: len(each.layers))
    ran = runs(config.model, stage.layers)
    traffic = {
        "tensor parallel": layout.microbatches * (_tensor_layers(layout, shapes, ran) - _frozen_layers(step, ran))
        + _tensor_ends(step)
        + _whole_gradients(step, stage.layers),
        "pipeline": _pipeline(layout, config.model.loop_count) * shapes.hidden_bytes(),
        **_data_parallel(step, largest, layout.microbatches * len(ran) / len(stage.layers)),
        "context parallel": layout.microbatches * _context_layers(step, stage),
        "expert parallel": layout.microbatches * _most_expert_runs(step) * _expert_layer(step),
        "matrix updates": _share(layout.tensor) * FP32 * largest.dense.busiest(lambda each: each.gathered),
    }
    if layout.pipeline > 1 and config.model.share_embeddings_and_output_weights:
        traffic["tied embeddings"] = float(FP32 * step.stages[0].trained.embedding)
    return {name: amount for name, amount in traffic.items() if amount > 0}


def _data_parallel(step: Step, stage: Stage, passes: float) -> dict[str, float]:
    """Return the traffic of a stage's gradients and weights, and to the host and back, for `passes` forward passes per
    step."""
    layout, element = step.layout, step.shapes.element
    once = sum(held.reduced for held in stage.held)
    reduced, gathered = 1, 1.0
    if layout.zero_stage == 0:  # an all-reduce
        reduced, gathered = 2, 0.0
    if layout.zero_stage >= 2:  # after every microbatch, since no rank has room for the sum
        reduced = layout.microbatches
    if layout.zero_stage == 3:  # in every loop, forward and backward
        gathered = 2 * passes
    owned = 0 if layout.on_cpu else stage.parameters.total // layout.shards
    offloaded = (FP32 + element) * owned if layout.offload_optimizer else 0  # a rank's gradients there, weights back
    offloaded_weights = 2 * passes * element * owned if layout.offload_weights else 0
    return {
        "gradient reduction": FP32 * once * reduced,
        "weight gathering": element * once * gathered,
        "host transfers": float(offloaded + offloaded_weights),
    }


def _pipeline(layout: Layout, loops: int) -> float:
    """Count a step's messages: hidden states forward and gradients backward in every loop. The first stage sends no
    gradients in the first loop, and the last stage no hidden states in the last loop."""
    if layout.pipeline == 1:
        return 0.0
    return float(layout.microbatches * (2 * loops - (1 if layout.pipeline == 2 else 0)))


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor_layers(layout: Layout, shapes: Activations, layers: list[int]) -> float:
    """Return the layers' traffic in one microbatch, each counted as often as it is listed."""
    kinds = shapes.by_kind(layers)
    layer = sum(count * _tensor_layer(layout, kind) for kind, count in kinds)
    return layer + sum(count * (_hidden_gate(layout, kind) + _key_shift(kind)) for kind, count in kinds)


def _most_expert_runs(step: Step) -> int:
    """Count how often a microbatch passes a layer of experts, in the stage where it does most."""
    experts = derived.expert_layers(step.config.model)
    return max(sum(layer in experts for layer in runs(step.config.model, stage.layers)) for stage in step.stages)


def _tensor_layer(layout: Layout, shapes: Activations) -> float:
    """Return the traffic of attention and FFN in one layer, loop and microbatch, forward and backward.

    Attention and FFN each have an all-reduce each way. Sequence parallelism replaces each with an all-gather and a
    reduce-scatter, and adds one more all-gather each for weight gradients. Ranks that share a key/value head gather the
    output of the QKV projection, and reduce-scatter its gradient.
    """
    whole = _share(layout.tensor) * shapes.tokens * shapes.hidden * shapes.element
    if shapes.ffn == 0:  # experts alone: attention's half
        whole /= 2
    qkv = _share(layout.tensor) * shapes.tokens * shapes.gathered_qkv * shapes.element
    forward, backward = 4 * whole + qkv, (6 if layout.sequence_parallel else 4) * whole + qkv
    return forward + backward + (forward if layout.recompute == "full" else 0)


def _frozen_layers(step: Step, layers: list[int]) -> float:
    """Return the traffic that layers with frozen weights save, each counted as often as it is listed: inputs gathered
    for weight gradients, and gradients of learned shifts."""
    if not step.config.training.trainable:
        return 0.0
    model, shapes, is_trained = step.config.model, step.shapes, trains(step.config)
    frozen = [
        name
        for parameter in parameters_of(model)
        for layer in layers
        if parameter.per_layer and layer in parameter.layers(model)
        if not is_trained(name := parameter.in_layer(layer))
    ]
    gathered = sum(name.endswith(_GATHERING) for name in frozen) if step.layout.sequence_parallel else 0
    whole = _share(step.layout.tensor) * shapes.tokens * shapes.hidden * shapes.element
    return gathered * whole + sum(".key_shift." in name for name in frozen) * _key_shift(shapes) / 2


def _hidden_gate(layout: Layout, shapes: Activations) -> float:
    """Return the traffic of one layer's gate logits of all heads, per loop and microbatch: with sequence parallelism
    they are gathered, and their gradients are in any case."""
    if not shapes.hidden_gate:
        return 0.0
    gathers = (2 if layout.recompute == "full" else 1) if layout.sequence_parallel else 0
    heads = shapes.heads * layout.tensor
    return (gathers + 1) * _share(layout.tensor) * shapes.tokens * heads * shapes.element


def _key_shift(shapes: Activations) -> float:
    """Return the traffic of one layer's learned-factor gradients, per loop and microbatch: a rank has its groups'."""
    if shapes.model.key_shift != "learned":
        return 0.0
    return 2 * _share(shapes.tensor) * 2 * derived.num_query_groups(shapes.model) * shapes.element


def _expert_layer(step: Step) -> float:
    """Return the traffic of tokens to their experts and back, per layer, loop and microbatch, forward and backward, at
    an even load.

    `alltoall` sends a token to the ranks of its experts; `allgather` sends every token to all ranks and sums what
    returns. The router's weights go along and, in the forward pass, the assignment of tokens: counts or the whole map.
    """
    layout, shapes = step.layout, step.shapes
    if layout.expert == 1:
        return 0.0
    others, forwards = layout.expert - 1, 2 if layout.recompute == "full" else 1
    if step.config.parallel.moe_token_dispatcher_type == "alltoall":
        sent = shapes.rows * shapes.topk * _share(layout.expert)
        there = back = sent * shapes.hidden * shapes.element
        weights, choice = sent * FP32, _COUNT * shapes.experts * others
    else:
        sent = shapes.rows * others
        there, back = sent * shapes.hidden * shapes.element, sent * shapes.hidden * FP32  # sums of experts' outputs
        weights, choice = sent * shapes.experts * FP32, sent * shapes.experts
    return float((there + back + weights) * (forwards + 1) + choice * forwards)


def _tensor_ends(step: Step) -> float:
    """Return the traffic of embedding and output layer in all microbatches, the latter once per loop with a loss; in a
    pipeline, where each loop embeds again, the busier of the two. The cross-entropy reduces three numbers per token,
    the last loop's z-loss one."""
    layout, shapes = step.layout, step.shapes
    whole = _share(layout.tensor) * shapes.tokens * shapes.hidden * shapes.element
    heads = len(step.losses(step.stages[-1]))
    gathers = 3 if layout.sequence_parallel and trains_head(step.config) else 2
    numbers = 3 * heads + (1 if step.config.training.z_loss_coeff else 0)
    losses = 2 * _share(layout.tensor) * numbers * shapes.tokens * FP32
    embedding = (1 if layout.sequence_parallel and not trains(step.config)(EMBEDDING) else 2) * whole
    head = heads * gathers * whole + losses
    ends = embedding + head if layout.pipeline == 1 else max(step.config.model.loop_count * embedding, head)
    return layout.microbatches * ends


def _whole_gradients(step: Step, layers: range) -> float:
    """Return the traffic of gradients of unsplit tensors (norms, routers), which sequence parallelism reduces because
    each rank sees only part of the rows."""
    if not step.layout.sequence_parallel:
        return 0.0
    model, selected = step.config.model, selection(step.config)
    whole = count_in_layers(model, layers, selected)["whole"]
    whole += sum(number for _, number in elements(model, None, "final_norm", is_trained=selected))
    if model.key_shift == "learned":  # summed in each backward pass
        of_attention = elements(model, layers, "attention", is_trained=selected)
        whole -= sum(number for parameter, number in of_attention if parameter.dims == "groups")
    return 2 * _share(step.layout.tensor) * FP32 * whole


def _context_layers(step: Step, stage: Stage) -> float:
    """Return the traffic of K and V in all of a stage's layers and all loops of one microbatch."""
    looped = len(derived.looped_among(step.config.model, stage.layers))
    in_all_loops = _context_layer(step.layout, step.shapes, step.config.model.loop_count)
    return looped * in_all_loops + (len(stage.layers) - looped) * _context_layer(step.layout, step.shapes, 1)


def _context_layer(layout: Layout, shapes: Activations, loops: int) -> float:
    """Return the traffic of K and V in one layer and microbatch, over all loops.

    Transformer Engine sends them around a ring in every loop, and their gradients too in the backward pass. With packed
    documents, ranks exchange rows for heads, also of queries and outputs. The torch backend gathers K and V (once for
    all loops if shared, and again to recompute core attention) and reduces their gradients. The few rows before a
    rank's own, needed for its window, are left out.
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
    gathered = (1 if shapes.shares_kv else loops) + (1 if shapes.shares_values else loops)  # times for K, and for V
    return gathered / 2 * passes * others
