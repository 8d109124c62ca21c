"""Bytes that one rank sends in an optimizer step, by purpose.

A ring collective over n ranks sends (n - 1) / n of the whole tensor per rank for an all-gather or a reduce-scatter,
and twice that for an all-reduce. Data-parallel traffic is a lower bound: each gradient is reduced once, and each weight
gathered once (with ZeRO, in each pass that has no room for the whole).
"""

from __future__ import annotations

from plt_megatron.config import derived
from plt_megatron.config.schema import ParallelConfig
from plt_megatron.model.parameters import Sizes
from plt_megatron.predict.activations import Activations
from plt_megatron.predict.held import Stage
from plt_megatron.predict.layers import FP32, runs
from plt_megatron.predict.layout import Layout
from plt_megatron.predict.step import Step

_COUNT = 8  # bytes of a token count


def communication_bytes(step: Step) -> dict[str, float]:
    """Return the bytes that one rank of the busiest kind sends per step, by purpose; purposes without traffic are left
    out. `host transfers` are between device and host, if DeepSpeed offloads.
    """
    config, layout, shapes = step.config, step.layout, step.shapes
    stage = max(step.stages, key=lambda each: len(each.layers))
    ran = runs(config.model, stage.layers)
    gathered = max(each.dense.busiest(lambda matrix: matrix.gathered) for each in step.stages)
    traffic = {
        "tensor parallel": max(_tensor_stage(step, stage) for stage in step.stages),
        "pipeline": _pipeline(layout, config.model.loop_count) * shapes.hidden_bytes(),
        **_data_parallel(step, layout.microbatches * len(ran) / len(stage.layers)),
        "context parallel": layout.microbatches
        * sum(count * _context_run(run, config.parallel) for run, count in shapes.by_kind(ran)),
        "expert parallel": layout.microbatches * _most_expert_runs(step) * _expert_layer(step),
        "matrix updates": _share(layout.tensor) * FP32 * gathered,
    }
    if layout.pipeline > 1 and config.model.share_embeddings_and_output_weights:
        traffic["tied embeddings"] = float(FP32 * step.stages[0].trained.embedding)
    return {name: amount for name, amount in traffic.items() if amount > 0}


def _data_parallel(step: Step, passes: float) -> dict[str, float]:
    """Return the traffic of the busiest stage's gradients and weights, and of the largest one's to the host and back,
    for `passes` forward passes per step."""
    layout, element = step.layout, step.shapes.element
    once = max(sum(held.reduced for held in each.held) for each in step.stages)
    reduced, gathered = 1, 1.0
    if layout.zero_stage == 0:  # an all-reduce
        reduced, gathered = 2, 0.0
    if layout.zero_stage >= 2:  # after every microbatch, since no rank has room for the sum
        reduced = layout.microbatches
    if layout.zero_stage == 3:  # in every loop, forward and backward
        gathered = 2 * passes
    owned = 0 if layout.on_cpu else step.largest.parameters.total // layout.shards
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


def _most_expert_runs(step: Step) -> int:
    """Count how often a microbatch passes a layer of experts, in the stage where it does most."""
    experts = derived.expert_layers(step.config.model)
    return max(sum(run.layer in experts for run in runs(step.config.model, stage.layers)) for stage in step.stages)


def _tensor_stage(step: Step, stage: Stage) -> float:
    """Return the traffic of a stage's layers and of the end of the model that it has, if any."""
    kinds = step.shapes.by_kind(runs(step.config.model, stage.layers))
    layers = step.layout.microbatches * sum(count * _tensor_run(run) for run, count in kinds)
    return layers + _tensor_ends(step, stage) + _whole_gradients(step, stage.layers)


def _tensor_run(run: Activations) -> float:
    """Return the traffic of attention and FFN in one run of a layer and microbatch, forward and backward.

    Matrices split by rows reduce their input's gradient, those split by columns their output. Sequence parallelism
    gathers and reduce-scatters instead, and gathers inputs once more for the gradients of trained weights. Ranks that
    share a key/value head gather the output of the QKV projection, and reduce-scatter its gradient.
    """
    layout, sequence, sizes = run.layout, run.layout.sequence_parallel, Sizes.of(run.model, 0)
    matrices = [each for each in run.parameters if each.is_hidden_matrix and each.split]
    by_rows = [each for each in matrices if each.split == "rows"]
    whole, qkv = run.tokens * run.hidden * run.element, run.tokens * run.gathered_qkv * run.element
    forward = (len(matrices) if sequence else 2 * (len(matrices) - len(by_rows))) * whole + qkv
    regathered = sum(each.name not in run.frozen for each in by_rows)
    backward = (len(matrices) + regathered if sequence else 2 * len(by_rows)) * whole + qkv
    if run.hidden_gate:  # each rank's rows of the logits of all heads
        logits = run.tokens * run.heads * layout.tensor * run.element
        forward, backward = forward + sequence * logits, backward + logits
    if run.model.qk_layernorm and run.model.norm_placement == "post":  # Q's and K's sums of squares over all heads
        keys_used = run.part != "later" or derived.later_loops_use_keys(run.model)  # else K has no gradient
        sums = 2 * run.tokens * FP32
        forward, backward = forward + 2 * sums, backward + (1 + keys_used) * sums
    mixing = [each for each in run.parameters if each.mixes_tokens and each.name not in run.frozen]
    backward += 2 * sum(each.size(sizes) for each in mixing) * run.element
    if run.recomputes_ffn:
        ffn = [each for each in matrices if not each.in_attention]
        backward += (len(ffn) if sequence else 2 * sum(each not in by_rows for each in ffn)) * whole
    return _share(layout.tensor) * ((2 if layout.recompute == "full" else 1) * forward + backward)


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


def _tensor_ends(step: Step, stage: Stage) -> float:
    """Return the traffic of the embedding, in the first stage, and of the output layer, in the last, in all
    microbatches: the latter once per loop with a loss; in a pipeline each loop embeds again. The cross-entropy reduces
    three numbers per token, the last loop's z-loss one."""
    layout, shapes = step.layout, step.shapes
    whole = _share(layout.tensor) * shapes.tokens * shapes.hidden * shapes.element
    heads = len(step.losses(stage))
    gathers = 3 if layout.sequence_parallel and shapes.trained.has_head else 2
    numbers = 3 * heads + (1 if heads and step.config.training.z_loss_coeff else 0)
    losses = 2 * _share(layout.tensor) * numbers * shapes.tokens * FP32
    embedding = (1 if layout.sequence_parallel and not shapes.trained.has("embedding") else 2) * whole
    head = heads * gathers * whole + losses
    embeds_again = layout.pipeline > 1 and derived.adds_embeddings(step.config.model)
    embeds = (step.config.model.loop_count if embeds_again else 1) if stage.index == 0 else 0
    return layout.microbatches * (embeds * embedding + head)


def _whole_gradients(step: Step, layers: range) -> float:
    """Return the traffic of gradients of unsplit tensors (norms, routers), which sequence parallelism reduces because
    each rank sees only part of the rows."""
    if not step.layout.sequence_parallel:
        return 0.0
    trained = step.shapes.trained
    counted = [*trained.elements(layers, experts=1), *trained.elements(None, "final_norm")]
    at_once = (each for each in counted if each[0].is_replicated and not each[0].mixes_tokens)
    return 2 * _share(step.layout.tensor) * FP32 * sum(number for _, number in at_once)


def _context_run(run: Activations, parallel: ParallelConfig) -> float:
    """Return the traffic of K and V in one run of a layer and microbatch.

    Transformer Engine sends them in each attention, as `cp_comm_type` and `window_cp_comm_type` say: around a ring or
    gathered, and once more in the backward pass with their gradients; or exchanging rows for heads (`a2a`), also of
    queries and outputs. With packed documents the shared K and V are exchanged once for all loops. The torch backend
    gathers K and V (once for all loops if shared, and again to recompute core attention) and reduces their gradients.
    The few rows before a rank's own, needed for its window, are left out.
    """
    if run.local and not run.te:
        return 0.0
    layout, again = run.layout, run.layout.recompute == "full" or "core_attn" in run.recomputed
    passes, rows = 3 if again else 2, run.tokens * run.channels * run.element
    reads_first_loop = run.part == "later" and run.shares_kv
    own = (not reads_first_loop) + (not (reads_first_loop and derived.shares_values(run.model)))  # of K and V

    def exchanged(kind: str, tensors: int) -> float:
        if kind == "a2a":
            return passes * (2 * run.heads + tensors * run.groups) * _share(layout.context) * rows
        return (passes + run.te) * tensors * (layout.context - 1) * run.groups * rows

    if not run.te:
        return exchanged("all_gather", own)
    full = 0.0 if run.local else exchanged(parallel.cp_comm_type, own if run.documents else 2)
    return full + (exchanged(parallel.window_cp_comm_type, 2) if run.windowed else 0.0)
