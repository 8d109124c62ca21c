"""Balance of experts: how a step moves their biases, against counts of the plain model, what must not move them, and
what auxiliary losses weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import checkpoint_jobs as jobs
from tests.reference.megatron_weights import to_plain
from tests.reference.plain_plt import PlainPLT

pytestmark = pytest.mark.usefixtures("one_process")

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "loop_count": 3,
    "moe.num_experts": 4,
    "moe.ffn_hidden_size": 12,
    "moe.router_score_function": "sigmoid",
    "moe.router_bias_update_rate": 0.03,
    "init_method_std": 0.2,  # scores are well apart
}


def engine_of(layout: dict[str, Any] | None = None, precision: str = "fp32", **changes: Any) -> Any:
    return jobs.build(jobs.run_config(layout, precision, **{**MODEL, **changes}))


def tensors(engine: Any) -> dict[str, Tensor]:
    """By the plain model's names."""
    from plt_megatron.model.build import global_tensors

    return to_plain(engine.config.model, dict(global_tensors(engine.stage)), jobs.VOCAB)


def biases(engine: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors(engine).items() if name.endswith("router_bias")}


def counts(engine: Any) -> list[Tensor]:
    return [layer.mlp.router.local_tokens_per_expert for layer in engine.stage.decoder.layers]


@pytest.mark.parametrize(
    ("recompute", "changes"),
    [
        ({"recompute_granularity": "full"}, {}),
        pytest.param(
            {"recompute_granularity": "selective"},
            {"num_layers": 3, "loop_span": [1, 2], "moe.z_loss_coeff": 0.1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["full recomputation", "prelude and coda"],
)
def test_a_step_moves_a_bias_by_its_load_over_all_loops_and_microbatches(recompute, changes):
    """Recomputation does not count twice, nor validation at all. The second step has fewer loops."""
    engine = engine_of(recompute, **changes)
    assert all(torch.all(bias == 0) for bias in biases(engine).values())
    for step, loops in ((1, 3), (2, 2)):
        plain = PlainPLT(engine.config.model, tensors(engine))
        batches = jobs.batches_of(step)
        for batch in batches:
            plain.losses(batch.tokens, batch.labels, loops=loops)
        engine.evaluate(jobs.batches_of(9), loop_count=3)
        engine.train_step(batches, loop_count=loops)
        engine.evaluate(jobs.batches_of(9), loop_count=3)
        after, expected = biases(engine), plain.moved_biases()
        assert after.keys() == expected.keys() and len(after) == engine.config.model.num_layers
        for name, bias in after.items():
            torch.testing.assert_close(bias, expected[name], rtol=0, atol=1e-7)
            assert not torch.equal(bias, plain.weights[name])
        assert all(torch.all(count == 0) for count in counts(engine)), "the next step begins from nothing"


def test_a_step_that_is_not_accepted_moves_nothing():
    engine = engine_of()
    jobs.train(engine, 1, 1)
    before = biases(engine)
    for step, accept in ((2, lambda loss, norm: False), (3, lambda loss, norm: True)):
        engine.train_step(jobs.batches_of(step), accept)
        same = [torch.equal(bias, before[name]) for name, bias in biases(engine).items()]
        assert all(same) if step == 2 else not any(same)


def test_counts_and_biases_are_exact_in_bf16():
    """Where bf16 would have stopped at 256 tokens."""
    engine = engine_of(None, "bf16", num_layers=1)
    assert engine.stage.decoder.layers[0].mlp.router.weight.dtype is torch.bfloat16
    for step in range(1, 5):
        for batch in jobs.batches_of(step):
            engine.stage(batch)
    sent = 2 * 3 * 4 * jobs.BATCH * jobs.LENGTH
    for count in counts(engine):
        assert count.dtype is torch.float32 and count.sum() == sent and count.max() > 256
        assert any(count != count.bfloat16()), "these would not have been kept"
        count.zero_()
    jobs.train(engine, 1, 2)
    rate = MODEL["moe.router_bias_update_rate"]
    for layer in engine.stage.decoder.layers:
        assert layer.mlp.router.expert_bias.dtype is torch.float32
        moves = layer.mlp.router.expert_bias / rate
        torch.testing.assert_close(moves, moves.round())  # whole ones, not rounded to bf16


@pytest.mark.slow
def test_biases_even_out_the_load():
    """Of a model that begins with one expert that all tokens go to."""
    engine = engine_of(num_layers=1, loop_count=2, **{"moe.aux_loss_coeff": 0.0, "moe.router_bias_update_rate": 0.05})
    router, busiest = engine.stage.decoder.layers[0].mlp.router, []
    router.expert_bias[1] = 1.0
    for steps in (15, 0):
        plain = PlainPLT(engine.config.model, tensors(engine))
        plain.logits(torch.cat([batch.tokens for batch in jobs.batches_of(1)]))
        (load,) = plain.loads.values()
        busiest.append(float(load.max() / load.mean()))
        jobs.train(engine, 1, steps)
    assert busiest[0] == 2 and busiest[1] < 1.4, "two of four experts a token: twice an even load is the most"


def test_a_model_without_biases_has_none():
    engine = engine_of(**{"moe.router_bias_update_rate": None})
    assert not biases(engine) and all(count is None for count in counts(engine))


@pytest.mark.parametrize("losses", [{"moe.aux_loss_coeff": 0.1}, {"moe.aux_loss_coeff": 0.0, "moe.z_loss_coeff": 0.1}])
def test_auxiliary_losses_weigh_the_same_with_any_loss_mask(losses):
    """Gradients are divided by the tokens that count, here all or one of eight, more of them in some microbatches."""
    off = {"num_layers": 1, "loop_count": 2, "moe.aux_loss_coeff": 0.0, "moe.router_bias_update_rate": None}
    parts = []
    for share in (1.0, 0.125):
        own, rest = (router_gradients(engine_of(**{**off, **changes}), share) for changes in (losses, {}))
        parts.append({name: own[name] - rest[name] for name in own})
    for name, part in parts[0].items():
        assert part.norm() > 1e-3
        torch.testing.assert_close(part, parts[1][name], rtol=1e-3, atol=1e-5)


def router_gradients(engine: Any, share: float) -> dict[str, Tensor]:
    """Of a step in which this share of the tokens counts in the loss."""
    batches = jobs.batches_of(1)
    for index, batch in enumerate(batches):
        order = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(index))
        batch.loss_mask = (order <= share * (0.5 if share < 1 and index % 2 else 1)).float()
    engine.train_step(batches, lambda loss, norm: False)
    named = engine.stage.named_parameters()
    return {name: each.main_grad.clone() for name, each in named if name.endswith("router.weight")}


def test_the_router_of_a_model_in_fp32_does_not_take_transformer_engines_product(monkeypatch):
    """megatron-core would, wherever that is installed: in TF32."""
    from megatron.core.transformer.moe import moe_utils

    router = engine_of().stage.decoder.layers[0].mlp.router
    monkeypatch.setattr(moe_utils, "te_general_gemm", lambda *args, **kwargs: pytest.fail("TF32"))
    hidden_states = torch.randn(3, 2, router.weight.shape[1])
    torch.testing.assert_close(router.gating(hidden_states), hidden_states @ router.weight.T)
