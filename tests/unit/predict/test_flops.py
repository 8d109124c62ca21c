"""The FLOP formula, against multiply-adds counted one matrix product at a time."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from plt_megatron.config.schema import LengthStage, LoopStage, ModelConfig, RunConfig
from plt_megatron.predict.flops import (
    Flops,
    flops_of_loops,
    forward_flops,
    mean_keys,
    run_flops_per_token,
    step_flops_per_token,
    training_flops_per_token,
)
from plt_megatron.predict.parameters import Weights
from tests.settings import changed, make

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=40,
    ffn_hidden_size=56,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    loop_count=2,
    window_size=5,
)
N, V = 16, 384


def forward(model: ModelConfig, n: int, vocab: int, loop: int | None = None) -> Flops:
    """Mean over a sequence's tokens."""
    return forward_flops(Weights(model), mean_keys(n), mean_keys(n, model.window_size), vocab, loop=loop)


class Counter:
    """Adds up what a sequence of `n` tokens costs, product by product."""

    def __init__(self, n: int) -> None:
        self.n, self.flops = n, 0

    def linear(self, fan_in: int, fan_out: int) -> None:
        self.flops += 2 * self.n * fan_in * fan_out

    def attention(self, heads: int, channels: int, window: int) -> None:
        for query, key in itertools.product(range(self.n), repeat=2):
            if query - window < key <= query:
                self.flops += heads * (2 * channels + 2 * channels)  # score, and weight times value


def brute_force(model: ModelConfig, n: int, vocab: int) -> int:
    c, heads, groups = 8, model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    count = Counter(n)
    first, last = model.loop_span or (0, model.num_layers)
    for loop, layer in itertools.product(range(model.loop_count), range(model.num_layers)):
        if loop > 0 and not first <= layer < last:
            continue
        later = loop > 0
        count.linear(model.hidden_size, heads * c)  # Q
        if not later or model.gated_window or not model.share_kv:
            count.linear(model.hidden_size, groups * c)  # K
        if not later or model.gated_window or not model.share_kv or not model.share_values:
            count.linear(model.hidden_size, groups * c)  # V
        early = model.full_attention == "last_loop" and first <= layer < last and loop < model.loop_count - 1
        count.attention(heads, c, model.window_size if early else n)
        if later and model.gated_window:
            count.attention(heads, c, model.window_size)
            for _ in range(heads):
                count.linear(c if model.gate_input == "query" else model.hidden_size, 1)
        count.linear(heads * c, model.hidden_size)
        experts = model.moe.num_experts if model.moe and layer >= model.moe.first_k_dense_replace else 0
        for width in ffn_widths(model) if experts else [model.ffn_hidden_size]:
            for _ in ("gate", "up", "down"):
                count.linear(model.hidden_size, width)
        count.linear(model.hidden_size, experts)  # router
    count.linear(model.hidden_size, vocab)
    return count.flops


def ffn_widths(model: ModelConfig) -> list[int]:
    """Of the experts that a token goes through."""
    assert model.moe is not None
    return [model.moe.ffn_hidden_size or 0] * model.moe.router_topk + [model.moe.shared_expert_intermediate_size or 0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loop_count": 1},
        {"loop_count": 4},
        {"gated_window": False},
        {"gated_window": False, "share_values": False, "loop_count": 3},
        {"gated_window": False, "share_kv": False},
        {"gated_window": False, "share_kv": False, "full_attention": "last_loop", "loop_count": 3},
        {"gated_window": False, "share_kv": False, "full_attention": "last_loop", "loop_count": 1},
        {"gated_window": False, "share_kv": False, "full_attention": "last_loop", "loop_span": [1, 2]},
        {"gated_window": False, "share_kv": False, "cross_loop_parallel": False},
        {"gate_input": "hidden"},
        {"num_query_groups": None},
        {"loop_span": [1, 2], "loop_count": 3},
        {"loop_span": [1, 3], "gated_window": False},
        {"window_size": 1},
        {"window_size": 99},
        {"share_embeddings_and_output_weights": False},
        {"moe.num_experts": 9, "moe.router_topk": 3, "moe.ffn_hidden_size": 24},
        {"moe.num_experts": 9, "moe.ffn_hidden_size": 24, "moe.shared_expert_intermediate_size": 31, "loop_count": 3},
        {"moe.num_experts": 9, "moe.ffn_hidden_size": 24, "moe.first_k_dense_replace": 1, "loop_count": 3},
        {"moe.num_experts": 9, "moe.ffn_hidden_size": 24, "moe.first_k_dense_replace": 2, "loop_span": [1, 3]},
    ],
    ids=str,
)
def test_forward_equals_the_count_by_hand(changes):
    model = changed(MODEL, changes)
    whole = forward(model, N, V)
    assert whole.total * N == pytest.approx(brute_force(model, N, V), rel=1e-12)
    loops = [forward(model, N, V, loop=loop).looped for loop in range(1, model.loop_count + 1)]
    assert sum(loops) == pytest.approx(whole.looped)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("w", [1, 2, 7, 64, 1000, None])
def test_mean_keys_counts_the_mask(n, w):
    window = n if w is None else w
    seen = sum(1 for q in range(n) for k in range(n) if q - window < k <= q)
    assert mean_keys(n, w) == pytest.approx(seen / n, rel=1e-12)


def test_training_is_three_forward_passes():
    once, training = forward(MODEL, N, V), training_flops_per_token(MODEL, N, V)
    for field in dataclasses.fields(once):
        assert getattr(training, field.name) == 3 * getattr(once, field.name)
    assert training.total == training.looped + training.output


def test_a_loop_count_can_be_asked_for():
    three = dataclasses.replace(MODEL, loop_count=3)
    assert training_flops_per_token(MODEL, N, V, loop_count=3) == training_flops_per_token(three, N, V)
    assert training_flops_per_token(MODEL, N, V, 1).local_attention == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"training.trainable": ["plt_gate"]},
        {"data.length_schedule": [LengthStage(131072, 16)], "data.sequence_length": 512},
        {"training.loop_schedule": [LoopStage(0.5, 1), LoopStage(loop_count=2)], "training.loop_loss_weights": [0.5]},
    ],
    ids=str,
)
def test_a_runs_loops_and_output_are_all_of_its_flops(settings):
    settings = {"model": MODEL, "training.train_iters": 64, "training.global_batch_size": 8, **settings}
    config = make(RunConfig, {"data.sequence_length": 64, **settings})
    run, loops = run_flops_per_token(config, V), flops_of_loops(config, V)
    assert sum(loops) == pytest.approx(run.looped) and loops[0] > 0 and loops[1] > 0


@pytest.mark.parametrize("trained", ["linear_proj", "linear_qkv"])
@pytest.mark.parametrize("form", [{}, {"gated_window": False}, {"gated_window": False, "share_values": False}], ids=str)
def test_frozen_weights_save_one_product_of_three(form, trained):
    """Three products with each weight: the output, the input's gradient, and the weight's own. K and V that later loops
    do not use are no product at all."""
    model = changed(MODEL, form)
    config = make(RunConfig, {"model": model, "training.trainable": [trained], "data.sequence_length": 64})
    width, layers, c = model.hidden_size, model.num_layers, 8
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    used = 2 - (not model.gated_window) * (1 + model.share_values)  # of K and V, in a later loop
    qkv = layers * width * c * (model.loop_count * heads + groups * (2 + (model.loop_count - 1) * used))
    proj = layers * width * c * model.loop_count * heads
    frozen = proj if trained == "linear_qkv" else qkv
    assert step_flops_per_token(config, V, model.loop_count, 64).projections == 2 * (3 * (qkv + proj) - frozen)


def test_full_attention_costs_in_the_last_loop():
    model = changed(MODEL, {"gated_window": False, "share_kv": False, "full_attention": "last_loop"})
    first, last = (forward(model, 4096, V, loop=loop) for loop in (1, 2))
    assert first.global_attention == last.local_attention == 0
    assert last.global_attention == pytest.approx(first.local_attention * mean_keys(4096) / mean_keys(4096, 5))
