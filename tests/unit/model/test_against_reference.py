"""The model against the plain-PyTorch PLT: logits, losses and every parameter's gradient.

The model computes in float32, the reference in float64. Two tensors agree when their largest difference is at most
1e-5 of the reference's largest element. Gates and norms are random, and the weights' spread is such that attention is
far from uniform; `test_the_comparison_sees_every_mistake` shows that the comparison would notice.

Some gradients are ill-conditioned: the norm on a token's small FFN output multiplies every rounding before it.
The reference itself moves there by 1e-5 when its weights move within half a unit of fp32's last place, so that a CPU's
fp32 may well be a little above. A tensor may differ by `ROUNDINGS` such moves. They are computed in float64: the bound
is the same on every CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import (
    BASE,
    CLP,
    KV_SHARING,
    LAST_LOOP,
    LOOPCODER_V2,
    VANILLA_LOOP,
    VOCAB_SIZE,
    YARN,
    build,
    differences,
    draw,
    gradients,
)
from torch import Tensor

from plt_megatron.config.schema import ModelConfig
from tests.reference.gates import GATES
from tests.reference.loop_inputs import LOOP_INPUTS
from tests.reference.megatron_weights import to_plain
from tests.reference.plain_plt import KV, PlainPLT
from tests.settings import changed, make

pytestmark = pytest.mark.usefixtures("one_process")

TOLERANCE = 1e-5
ROUNDINGS = 4  # roundings that meet: the layers, loops and factors that a weight's gradient passes
EXPERTS: dict[str, Any] = {
    "moe.num_experts": 4,
    "moe.router_topk": 2,
    "moe.ffn_hidden_size": 12,
    "moe.aux_loss_coeff": 0.1,
    "moe.z_loss_coeff": 0.01,
}
SIGMOID = {**EXPERTS, "moe.router_score_function": "sigmoid"}
BIASED = {**SIGMOID, "moe.router_bias_update_rate": 1e-3}
DENSE_FIRST = {**EXPERTS, "moe.first_k_dense_replace": 1}
SPANS: dict[str, dict[str, Any]] = {
    "prelude and coda": {"num_layers": 4, "loop_span": [1, 3], "loop_count": 3},
    "prelude": {**LOOPCODER_V2, "num_layers": 3, "loop_span": [1, 3]},
    "coda, norm between loops": {**LOOPCODER_V2, "num_layers": 3, "loop_span": [0, 2], "loop_count": 3},
    "prelude, naive loop": {**VANILLA_LOOP, "num_layers": 3, "loop_span": [1, 2], "loop_count": 3},
    "prelude and coda, scale per channel": {
        **LOOP_INPUTS["scale per channel"],
        "hidden_scale": 0.0,
        "residual_scaling": "layers",
        "num_layers": 3,
        "loop_span": [1, 2],
    },
    "prelude and coda, one loop": {"num_layers": 3, "loop_span": [1, 2], "loop_count": 1},
    "prelude and coda of experts": {**EXPERTS, "num_layers": 3, "loop_span": [1, 2]},
}
ORDERS: dict[str, dict[str, Any]] = {
    "by layer": {**VANILLA_LOOP, "loop_order": "layer", "loop_count": 3},
    "by layer, sharing and windows": {"cross_loop_parallel": False, "loop_order": "layer", "gate_input": "hidden"},
    "by layer, full attention in the last loop": {**VANILLA_LOOP, "loop_order": "layer", "full_attention": "last_loop"},
    "by layer, prelude and coda": {
        **SPANS["prelude and coda"],
        "cross_loop_parallel": False,
        "loop_order": "layer",
        "residual_scaling": "layers",
    },
}
CASES: dict[str, dict[str, Any]] = {
    "PLT-1, the plain transformer": {"loop_count": 1},
    "PLT-2": {"loop_count": 2},
    "PLT-3": {"loop_count": 3},
    "vanilla loop x2": VANILLA_LOOP,
    "vanilla loop x3": {**VANILLA_LOOP, "loop_count": 3},
    "+ CLP": CLP,
    "+ KV sharing": KV_SHARING,
    "own V": {"share_values": False, "loop_count": 3},
    "own V, no window": {**KV_SHARING, "share_values": False},
    "full attention in the last loop": LAST_LOOP,
    "full attention in the last loop, three loops, keys shifted": {**LAST_LOOP, "loop_count": 3, "key_shift": "heads"},
    "full attention in the last loop, serial": {**LAST_LOOP, "cross_loop_parallel": False, "loop_count": 3},
    "full attention in the last loop, spans": {**LAST_LOOP, "num_layers": 3, "loop_span": [1, 2], "loop_count": 3},
    "KV sharing without CLP": {**KV_SHARING, "cross_loop_parallel": False, "loop_count": 3},
    "PLT-3 without CLP": {"cross_loop_parallel": False, "loop_count": 3},
    "LoopCoder-v2": LOOPCODER_V2,
    "LoopCoder-v2, 3 loops": {**LOOPCODER_V2, "loop_count": 3},
    **GATES,
    "global side": {"gate_side": "global"},
    "tanh": {"gate_activation": "tanh", "loop_count": 3},
    "tanh, hidden gate, global side": {"gate_activation": "tanh", "gate_input": "hidden", "gate_side": "global"},
    "norm between loops": {"loop_norm": "final", "loop_count": 3},
    "scales": {"embedding_scale": 0.5, "hidden_scale": 0.25, "loop_count": 3},
    **LOOP_INPUTS,
    "qk-norm": {"qk_layernorm": True},
    "ffn output norm": {"norm_placement": "pre_ffn_output"},
    "the paper's dense models": {"qk_layernorm": True, "norm_placement": "pre_ffn_output", "loop_count": 3},
    "qk-norm and hidden gate": {"qk_layernorm": True, "gate_input": "hidden"},
    "untied": {"share_embeddings_and_output_weights": False},
    "untied, one loop": {"share_embeddings_and_output_weights": False, "loop_count": 1},
    "qkv bias": {"qkv_bias": True},
    "as many groups as heads": {"num_query_groups": None},
    "one group": {"num_query_groups": 1},
    "head dimension of its own": {"kv_channels": 6},
    "YaRN": {**YARN, "loop_count": 3},
    "YaRN, ends not rounded, hidden gate": {
        **YARN,
        "rope_scaling.yarn.correction_range_round_to_int": False,
        "gate_input": "hidden",
    },
    "keys shifted by heads": {"key_shift": "heads", "loop_count": 3},
    "keys shifted by heads, three groups": {
        "key_shift": "heads",
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "hidden_size": 24,
    },
    "keys shifted by channels": {"key_shift": "channels", "loop_count": 3, "qk_layernorm": True},
    "keys shifted by channels, one group, one loop": {"key_shift": "channels", "num_query_groups": 1, "loop_count": 1},
    "keys shifted by channels, YaRN, hidden gate": {**YARN, "key_shift": "channels", "gate_input": "hidden"},
    "learned shift": {"key_shift": "learned", "loop_count": 3},
    "learned shift, own V": {"key_shift": "learned", "share_values": False},
    "learned shift, one loop, post-norm": {"key_shift": "learned", "loop_count": 1},
    "window of one": {"window_size": 1, "loop_count": 3},
    "window beyond the row": {"window_size": 64},
    "experts": EXPERTS,
    "experts, one loop": {**EXPERTS, "loop_count": 1, "moe.router_score_function": "pre_softmax", "moe.router_topk": 1},
    "experts and a shared one": {**EXPERTS, "loop_count": 3, "moe.shared_expert_intermediate_size": 8},
    "sigmoid scores, one expert": {**SIGMOID, "moe.router_topk": 1, "loop_count": 1},
    "biased experts, a shared one": {**BIASED, "loop_count": 3, "moe.shared_expert_intermediate_size": 8},
    "biased experts after a dense prelude": {
        **DENSE_FIRST,
        **BIASED,
        "num_layers": 3,
        "loop_span": [1, 3],
        "moe.shared_expert_intermediate_size": 8,
    },
    "experts after dense layers that loop": {
        **DENSE_FIRST,
        "num_layers": 3,
        "moe.first_k_dense_replace": 2,
        "loop_span": [1, 3],
        "loop_count": 3,
        "norm_placement": "pre_ffn_output",
    },
    "experts without balancing": {
        **EXPERTS,
        "moe.router_load_balancing_type": "none",
        "norm_placement": "pre_ffn_output",
    },
    **SPANS,
    **ORDERS,
}


def run(stage: Any, data: dict[str, Tensor], packed: bool, loops: int | None = None) -> dict[str, Tensor]:
    """The model's logits, losses and gradients, under the plain model's names."""
    from plt_megatron.model.build import global_names
    from plt_megatron.model.looped_gpt import MicroBatch

    device = torch.cuda.current_device()
    inputs = {"tokens": data["tokens"].to(device)}
    if packed:
        inputs["document_starts"] = data["starts"].to(device)
    stage.zero_grad()
    with torch.no_grad():
        logits = stage(MicroBatch(**inputs), loops)
    losses = stage(MicroBatch(**inputs, labels=data["labels"].to(device)), loops)
    (losses * data["loss_mask"].to(losses)).sum().backward()
    assert torch.all(logits[..., VOCAB_SIZE:] == -torch.inf)
    found = gradients(dict(global_names(stage)))
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & found.keys():
        assert torch.all(found[name][VOCAB_SIZE:] == 0)
    results = {"logits": logits[..., :VOCAB_SIZE].cpu().double(), "losses": losses.detach().cpu().double()}
    return results | to_plain(stage.config.plt, found, VOCAB_SIZE)


def expect(
    stage: Any,
    data: dict[str, Tensor],
    packed: bool,
    loops: int | None = None,
    plain_class: type[PlainPLT] = PlainPLT,
    noise: int | None = None,
    **mutations: Any,
) -> dict[str, Tensor]:
    """What `run` should return, from the reference. `noise`: the seed by which its weights are moved within what fp32
    rounds away; None: they are not."""
    from plt_megatron.model.build import global_names, global_tensors

    weights = to_plain(stage.config.plt, dict(global_names(stage)), VOCAB_SIZE)
    everything = to_plain(stage.config.plt, dict(global_tensors(stage)), VOCAB_SIZE)
    if noise is not None:
        generator = torch.Generator().manual_seed(noise)
        for weight in weights.values():
            weight *= 1 + 2**-24 * (2 * torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 1)
    for weight in weights.values():
        weight.requires_grad_()
    plain = plain_class(changed(stage.config.plt, mutations), everything | weights)
    starts = data["starts"] if packed else None
    losses = plain.losses(data["tokens"], data["labels"], starts, loops)
    # An auxiliary loss is a mean over tokens, the model's a sum over them, to be divided by their number.
    ((losses * data["loss_mask"]).sum() + data["tokens"].numel() * plain.auxiliary_loss()).backward()
    results = {"logits": plain.logits(data["tokens"], starts, loops).detach(), "losses": losses.detach()}
    return results | gradients(weights)


def assert_agree(
    stage: Any, data: dict[str, Tensor], packed: bool, loops: int | None = None, **mutations: Any
) -> dict[str, Tensor]:
    """The model's tensors are the reference's, which it returns."""
    reference = partial(expect, stage, data, packed, loops, **mutations)
    expected = reference()
    errors = differences(run(stage, data, packed, loops), expected)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        moves = [differences(reference(noise=seed), expected) for seed in range(4)]
        bounds = {name: min(ROUNDINGS * max(move[name] for move in moves), 10 * TOLERANCE) for name in wrong}
        wrong = {name: error for name, error in wrong.items() if not error <= bounds[name]}
    assert not wrong, f"relative differences above {TOLERANCE} and above what rounding explains: {wrong}"
    return expected


# What documents meet: attention, shifts, positions, and the order of layers and loops.
MET = (
    *("loop_count", "loop_span", "loop_order", "cross_loop_parallel", "key_shift", "full_attention"),
    *("share_kv", "share_values", "gated_window", "window_size", "rotary_base", "rope_scaling"),
    *("num_attention_heads", "num_query_groups", "kv_channels"),
)


def _met(settings: dict[str, Any]) -> str:
    model = make(ModelConfig, {**BASE, **settings})
    return str([getattr(model, name) for name in MET])


# Of the cases that are the same to documents, the first.
PACKED = {_met(settings): name for name, settings in reversed(CASES.items())}.values()


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        *(pytest.param(settings, False, id=f"{name}-rows") for name, settings in CASES.items()),
        *(pytest.param(CASES[name], True, id=f"{name}-packed") for name in PACKED),
    ],
)
def test_logits_losses_and_every_gradient(settings, packed):
    expected = assert_agree(build(settings), draw(), packed)
    assert all(tensor.abs().max() > 0 for tensor in expected.values()), "an unused parameter proves nothing"


RECOMPUTED: dict[str, dict[str, Any]] = {
    "PLT-1": {"loop_count": 1},
    "PLT-3": {"loop_count": 3},
    "LoopCoder-v2": {**LOOPCODER_V2, "loop_count": 3},
    "KV sharing": {**KV_SHARING, "loop_count": 3},
    "last loop": {**LAST_LOOP, "loop_count": 3},
    "experts": {**EXPERTS, "loop_count": 3},
    "prelude and coda": SPANS["prelude and coda"],
    "by layer": ORDERS["by layer, prelude and coda"],
}


# Rows of one text and packed ones take turns.
@pytest.mark.parametrize(
    ("name", "recompute", "packed"),
    [
        (name, recompute, (place + turn) % 2 == 1)
        for place, name in enumerate(RECOMPUTED)
        for turn, recompute in enumerate(("selective", "full"))
    ],
)
def test_recomputation_changes_nothing(name, recompute, packed):
    settings = RECOMPUTED[name]
    stage, data = build(settings, recompute=recompute), draw()
    assert_agree(stage, data, packed)


@pytest.mark.parametrize(
    "settings",
    [{}, LOOPCODER_V2, LAST_LOOP, SPANS["prelude and coda"]],
    ids=["PLT", "LoopCoder-v2", "last loop", "prelude and coda"],
)
@pytest.mark.parametrize("loops", [1, 2, 4])
def test_the_same_weights_run_for_other_loop_counts(settings, loops):
    stage, data = build({**settings, "loop_count": 3}), draw()
    assert_agree(stage, data, False, loops)


def test_a_second_backward_starts_afresh():
    stage, data = build({"loop_count": 3}), draw()
    first, second = run(stage, data, False), run(stage, data, False)
    assert all(torch.equal(first[name], second[name]) for name in first)


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window one short": ({}, {"window_size": 4}),
    "window one long": ({}, {"window_size": 6}),
    "no shift": ({}, {"cross_loop_parallel": False}),
    "no sharing": ({}, {"share_kv": False}),
    "no window": ({}, {"gated_window": False}),
    "every loop": (LAST_LOOP, {"full_attention": "every_loop"}),
    "window one long in an earlier loop": (LAST_LOOP, {"window_size": 6}),
    "wrong side": ({}, {"gate_side": "global"}),
    "sigmoid for tanh": ({"gate_activation": "tanh"}, {"gate_activation": "sigmoid"}),
    "norm between": ({}, {"loop_norm": "final"}),
    "no norm between": (LOOPCODER_V2, {"loop_norm": "none"}),
    "embedding scale": (LOOPCODER_V2, {"embedding_scale": 1.0}),
    "hidden scale": (LOOPCODER_V2, {"hidden_scale": 1.0}),
    "no injection": (LOOP_INPUTS["naive loop with E"], {"input_injection": False}),
    "no norm of h": (LOOP_INPUTS["scale per channel"], {"loop_norm": "none"}),
    "scale of h": (LOOP_INPUTS["scaled"], {"hidden_scale": 0.084}),
    "residual scale": (LOOP_INPUTS["branches by layers"], {"residual_scale": 1.4}),
    "residual scaling": (LOOP_INPUTS["branches by layers"], {"residual_scaling": "loops_sqrt_layers"}),
    "rotary base": ({}, {"rotary_base": 9000.0}),
    "no shifted keys": ({"key_shift": "channels"}, {"key_shift": "none"}),
    "the other shift": ({"key_shift": "channels"}, {"key_shift": "heads"}),
    "no YaRN": (YARN, {"rope_scaling.yarn": None}),
    "YaRN's factor": (YARN, {"rope_scaling.factor": 4.5}),
    "YaRN's length": (YARN, {"rope_scaling.yarn.original_max_position_embeddings": 128}),
    "YaRN's ends": (YARN, {"rope_scaling.yarn.correction_range_round_to_int": False}),
    "epsilon": ({}, {"layernorm_epsilon": 1e-3}),
    "loops": ({}, {"loop_count": 3}),
    "no prelude": (SPANS["prelude, naive loop"], {"loop_span": [0, 2]}),
    "order by stack": (ORDERS["by layer"], {"loop_order": "stack"}),
    "coda in the loop": (SPANS["prelude, naive loop"], {"loop_span": [1, 3]}),
    "normalized weights": (EXPERTS, {"moe.router_score_function": "pre_softmax"}),
    "experts of a token": (EXPERTS, {"moe.router_topk": 3}),
    "scores": (EXPERTS, {"moe.router_score_function": "sigmoid"}),
    "no bias": (BIASED, {"moe.router_bias_update_rate": None}),
}


@pytest.mark.parametrize(("settings", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_the_comparison_sees_every_mistake(settings, mistake):
    stage, data = build(settings), draw()
    assert differences(run(stage, data, False), expect(stage, data, False, **mistake))["logits"] > 100 * TOLERANCE


def test_what_rounding_may_explain_hides_no_mistake():
    """In the worst-conditioned case."""
    stage, data = build(CASES["experts without balancing"]), draw()
    for mistake in ({"window_size": 4}, {"layernorm_epsilon": 1.1e-5}, {"rotary_base": 9990.0}):
        with pytest.raises(AssertionError, match="relative differences"):
            assert_agree(stage, data, True, **mistake)


def test_the_comparison_sees_documents():
    stage, data = build({}), draw()
    assert differences(run(stage, data, True), expect(stage, data, False))["logits"] > 100 * TOLERANCE


@pytest.mark.parametrize("coefficient", ["moe.aux_loss_coeff", "moe.z_loss_coeff"])
def test_the_comparison_sees_auxiliary_losses(coefficient):
    stage, data = build(EXPERTS), draw()
    actual = run(stage, data, False)
    for wrong in (0.0, EXPERTS[coefficient] / 2):  # of one of the two loops only, say
        errors = differences(actual, expect(stage, data, False, **{coefficient: wrong}))
        assert errors["logits"] <= TOLERANCE and errors["layers.0.router"] > 100 * TOLERANCE


class StopGradientPLT(PlainPLT):
    """The mistake of sharing the first loop's K and V without their gradients."""

    def _attention(self, x: Tensor, layer: int, loop: int, starts: Tensor, first_loop_kv: KV) -> Tensor:
        detached = {number: (key.detach(), value.detach()) for number, (key, value) in first_loop_kv.items()}
        out = super()._attention(x, layer, loop, starts, detached)
        first_loop_kv.update({number: pair for number, pair in detached.items() if number not in first_loop_kv})
        return out


def test_the_comparison_sees_a_stopped_gradient():
    stage, data = build({"loop_count": 3}), draw()
    wrong = differences(run(stage, data, False), expect(stage, data, False, plain_class=StopGradientPLT))
    assert wrong["logits"] <= TOLERANCE
    assert all(wrong[f"layers.{layer}.{name}"] > 100 * TOLERANCE for layer in (0, 1) for name in ("k", "v"))
