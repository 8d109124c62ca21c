"""Megatron-LM's fused operations on Transformer Engine's layers, with loops: a run has the same numbers without them.

All other tests of this group have gradient accumulation and RoPE fused, as runs have, and are compared with the torch
backend, which has neither; here each is switched by itself, and what it does is counted. Cross-entropy's Triton kernels
run in Triton's interpreter, which is slow, so only here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from tests.distributed.cases import LOSSES, MODEL, STEPS, Z_LOSS, Case, Layout, train_cases
from tests.distributed.parity_checks import TOLERANCE, differences
from tests.settings import make
from tests.te import emulation
from tests.te import te_jobs as jobs
from tests.te.te_jobs import fp8_case, on_te

BF16_TOLERANCE = 5e-3  # one sum in fp32 instead of rounded loop by loop; cos and sin not rounded
OFF = {"gradient_accumulation_fusion": False, "apply_rope_fusion": False, "cross_entropy_loss_fusion": False}
MICROBATCHES, LAYERS = 2, 4


def fused(case: Case, *names: str) -> Case:
    """The case on Transformer Engine with these fusions and no others."""
    return on_te(replace(case, parallel={**case.parallel, **OFF, **dict.fromkeys(names, True)}))


@pytest.fixture
def same(run_te) -> Callable[..., None]:
    """Train cases with fusions and without, and compare losses, gradient norms and, in fp32, the final weights."""

    def check(layout: Layout, cases: list[Case], *names: str, tolerance: float = TOLERANCE) -> None:
        both = [fused(case, *which) for case in cases for which in ((), names)]
        outcomes = run_te(train_cases, layout.world_size, layout, both, timeout_s=240)
        for case, plain, other in zip(cases, outcomes[::2], outcomes[1::2], strict=True):
            wrong = differences(other, plain, final=tolerance == TOLERANCE)
            assert max(wrong.values()) <= tolerance, (case, wrong)

    return check


# ---------------------------------------------------------------- gradient accumulation


def test_gradients_are_accumulated_over_loops_and_microbatches(same):
    same(Layout(), [Case(1), Case(3), Case(2, "selective"), Case(3, "full")], "gradient_accumulation_fusion")


def test_gradients_are_accumulated_in_pipelines_and_while_they_are_reduced(same):
    same(Layout(pp=2), [Case(2), Case(3, "full", overlap=True)], "gradient_accumulation_fusion")
    same(Layout(tp=2, sp=True), [Case(2, overlap=True)], "gradient_accumulation_fusion")


def test_in_bf16(same):
    names = ("gradient_accumulation_fusion", "apply_rope_fusion")
    same(Layout(), [Case(3, precision="bf16")], *names, tolerance=BF16_TOLERANCE)


def accumulated(layout: Layout, case: Case) -> list[bool]:
    """Tell for each product that went into a buffer in the last step whether it was added to what was there."""
    import sys

    from tests.distributed import parity

    extension = sys.modules["transformer_engine_torch"]
    stock, seen, before = extension.generic_gemm, [], {}

    def noted(*args: Any, **kwargs: Any) -> Any:
        if args[4] is not None and args[11]:  # `out` and `grad`: a weight's gradient
            seen.append(args[14])  # `accumulate`
        return stock(*args, **kwargs)

    def batches(step: int, *args: Any) -> Any:
        before[step] = len(seen)
        return stock_batches(step, *args)

    stock_batches = parity._batches
    with mock.patch.object(parity, "_batches", batches), mock.patch.object(extension, "generic_gemm", noted):
        parity.train_all(layout, [case])
    return seen[before[STEPS - 1] :]


@pytest.mark.parametrize("case", [Case(3), fp8_case(3, "tensorwise"), Case(3, "full")], ids=["fp32", "fp8", "full"])
def test_each_weight_is_added_once_for_each_loop_and_microbatch(run_te, case):
    """And never overwrites the buffer: Transformer Engine would, for a call flagged as a step's first microbatch."""
    added = run_te(accumulated, 1, Layout(), fused(case, "gradient_accumulation_fusion"))
    assert added == [True] * (3 * MICROBATCHES * LAYERS * jobs.WEIGHTS_PER_LAYER)


def seen_by_autograd(layout: Layout, case: Case) -> list[int]:
    """How many gradients of linear layers' weights autograd sees in each step."""
    from plt_megatron.train import megatron_engine
    from tests.distributed import parity

    seen: list[int] = []
    stock = megatron_engine.zero_gradients

    def noted(ddp: Any) -> None:
        if not seen:
            for name, weight in ddp.module.named_parameters():
                if ".linear_" in name and name.endswith(".weight"):
                    weight.register_hook(count)
        seen.append(0)
        stock(ddp)

    def count(gradient: Any) -> None:
        seen[-1] += gradient is not None

    with mock.patch.object(megatron_engine, "zero_gradients", noted):
        parity.train_all(layout, [case])
    return seen


def test_autograd_keeps_no_copy_of_the_gradients_of_loops(run_te):
    """One graph has all loops; overlapped reduction needs to see that a gradient arrives."""
    fusion, weights = "gradient_accumulation_fusion", LAYERS * jobs.WEIGHTS_PER_LAYER * MICROBATCHES
    found = [
        run_te(seen_by_autograd, 1, Layout(), fused(Case(3, overlap=overlap), fusion)) for overlap in (False, True)
    ]
    assert found == [[0] * STEPS, [weights] * STEPS]


def flagged(layout: Layout, case: Case) -> list[Any]:
    """Outcomes as they are, and with the first call of each step flagged as megatron-core's schedule does."""
    from plt_megatron.train import megatron_engine
    from tests.distributed import parity

    right = jobs.train_fresh(layout, [case])
    jobs._forget_fp8_state()
    with mock.patch.object(megatron_engine, "renew_weight_copies", lambda stage: stage.set_is_first_microbatch()):
        return [*right, parity._train(layout, case)]


def test_the_flag_of_a_first_microbatch_would_lose_the_other_loops(run_te):
    """This is what `renew_weight_copies` is for. A plain transformer does not need it."""
    right, wrong = run_te(flagged, 1, Layout(), fused(Case(3), "gradient_accumulation_fusion"))
    name = "gradient norm 0"
    assert abs(wrong.numbers[name] / right.numbers[name] - 1) > 0.1


def test_fp8_with_fused_accumulation_is_fp8_without(run_te):
    """In the first step: bf16 rounds each loop's gradient in one of them, and FP8 makes the most of any difference."""
    cases = [fused(fp8_case(3, "tensorwise"), *names) for names in ((), ("gradient_accumulation_fusion",))]
    plain, other = run_te(jobs.train_fresh, 1, Layout(), cases)
    assert other.numbers["loss 0"] == plain.numbers["loss 0"]
    assert other.numbers["gradient norm 0"] == pytest.approx(plain.numbers["gradient norm 0"], rel=BF16_TOLERANCE)


def test_experts(same):
    experts = {"moe.num_experts": 4, "moe.ffn_hidden_size": 12, "moe.shared_expert_intermediate_size": 8}
    same(Layout(dp=2, ep=2), [Case(2, model=experts)], "gradient_accumulation_fusion")


# ---------------------------------------------------------------- RoPE and cross-entropy


def test_rope(same):
    """Also where queries carry a channel that is not turned: the `hidden` gate's logit."""
    hidden = Case(2, model={"gate_input": "hidden"})
    same(Layout(), [Case(2), Case(3, "full"), hidden], "apply_rope_fusion")


def test_rope_on_ranks_that_share_a_sequence(same):
    same(Layout(cp=2), [Case(2, parallel={"cp_comm_type": "a2a"})], "apply_rope_fusion")


def test_cross_entropy(same):
    """Tokens that do not count, padding of the vocabulary, and its parts on two ranks."""
    same(Layout(), [Case(2)], "cross_entropy_loss_fusion")
    same(Layout(tp=2, sp=True), [Case(2)], "cross_entropy_loss_fusion")


def test_cross_entropy_with_a_z_loss(same):
    """The z-loss changes the gradient of each token's cross-entropy."""
    case = Case(2, training=Z_LOSS)
    same(Layout(), [case], "cross_entropy_loss_fusion")
    same(Layout(tp=2, sp=True), [case], "cross_entropy_loss_fusion")


def test_cross_entropy_of_every_loop(same):
    """In a pipeline the last stage has several in flight."""
    case = Case(3, "full", overlap=True, training=LOSSES)
    same(Layout(pp=2), [case], *OFF)
    same(Layout(tp=2, sp=True), [case], *OFF)


def test_cross_entropy_in_bf16(same):
    same(Layout(), [Case(2, precision="bf16")], "cross_entropy_loss_fusion", tolerance=BF16_TOLERANCE)


# ---------------------------------------------------------------- what a run gets


def choice(backend: str, vocab_size: int = 50, oldest: str | None = None, **parallel: Any) -> str:
    """Say what is fused, or why not."""
    from plt_megatron.config.rules import fusions
    from plt_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
    from plt_megatron.errors import UserError
    from plt_megatron.runtime import kernels

    config = RunConfig(model=make(ModelConfig, {**MODEL, "backend": backend}), parallel=ParallelConfig(**parallel))
    with mock.patch.object(fusions, "OLDEST_CROSS_ENTROPY", oldest or fusions.OLDEST_CROSS_ENTROPY):
        try:
            return str(kernels.choose_fusions(config, backend, vocab_size))
        except UserError as error:
            return str(error)


def attention(**settings: Any) -> str:
    """Say why a run's attention would not be fused, by Transformer Engine's own rules."""
    import torch
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    from plt_megatron.config.schema import RunConfig
    from plt_megatron.errors import UserError
    from plt_megatron.runtime import kernels

    stock = extension.get_fused_attn_backend

    def cudnn(params: Any) -> tuple[int, str]:
        return (-1, "head dims are multiples of 8") if params.head_dim_qk % 8 else stock(params)

    config = make(RunConfig, {"training.precision": "bf16", "model.hidden_size": 64, **settings})
    real = mock.patch.object(utils, "torch", torch)  # the stand-in's attends float32
    with real, mock.patch.object(extension, "get_fused_attn_backend", cudnn):
        try:
            kernels.check_kernels(config)
        except UserError as error:
            return str(error)
    return "fused"


def fp8_attention(recipe: str, *cudnn: int) -> str:
    """`attention` in FP8 on a B200 with this version of cuDNN."""
    from transformer_engine.pytorch import utils as common
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    both = [mock.patch.object(module, "get_cudnn_version", lambda: cudnn) for module in (common, utils)]
    with emulation.card(10), both[0], both[1]:
        fp8 = {"training.fp8.format": "hybrid", "training.fp8.recipe": recipe, "training.fp8.attention": True}
        return attention(**{"model.kv_channels": 128, **fp8})


@pytest.mark.parametrize(
    ("recipe", "too_old", "fits"), [("mxfp8", (9, 20, 9), (9, 22, 0)), ("tensorwise", (9, 13, 9), (9, 14, 0))]
)
def test_fp8_attention_that_this_cudnn_lacks_is_refused(run_te, recipe, too_old, fits):
    """As Transformer Engine 2.20's selector has it; it would end the first step with a traceback."""
    error = run_te(fp8_attention, 1, recipe, *too_old)
    assert "training.fp8.attention" in error and recipe in error and "cuDNN" in error
    assert run_te(fp8_attention, 1, recipe, *fits) == "fused"


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("TP1", Case(2)),
        ("TP1", Case(2, packed=True)),
        ("TP2", jobs.fp8_case(attention=True, kv_channels=128)),
        ("CP2", Case(2, parallel={"cp_comm_type": "p2p", "window_cp_comm_type": "a2a"})),
        ("CP2", Case(2, packed=True, parallel={"cp_comm_type": "a2a", "window_cp_comm_type": "a2a"})),
    ],
    ids=["rows", "documents", "FP8", "divided rows", "divided heads"],
)
def test_what_is_asked_before_a_run_is_the_attention_that_runs(run_te, layout, case):
    arranged = Layout.of(layout)
    assert run_te(jobs.asked_otherwise, arranged.world_size, arranged, jobs.on_te(case)) == {}


@pytest.mark.parametrize("packed", [False, True])
def test_attention_that_would_hold_all_scores_is_refused(run_te, packed):
    """cuDNN and flash-attn have none in fp32, nor for heads of 20 channels; where ranks split rows nothing is left."""
    packed = {"data.reset_at_document_boundaries": packed}
    wide = {"model.kv_channels": 32, **packed}
    assert (
        run_te(attention, 1, **wide)
        == run_te(attention, 1, **wide, **{"model.full_attention": "every_loop"})
        == run_te(attention, 1, **wide, **{"training.deterministic": True})
        == "fused"
    )
    split = {"parallel.context_parallel_size": 2, "parallel.cp_comm_type": "a2a"}
    assert run_te(attention, 1, **wide, **split) == "fused"
    for settings in (
        {"training.precision": "fp32"},
        {"training.precision": "fp32", **split},
        {"model.kv_channels": 20},
    ):
        error = run_te(attention, 1, **{**wide, **settings})
        assert "no fused attention" in error and "model.backend=torch" in error
        assert ("packed documents" in error) == packed["data.reset_at_document_boundaries"]


def test_what_is_on_where_nothing_is_set(run_te):
    everything = "gradient_accumulation_fusion, apply_rope_fusion, cross_entropy_loss_fusion"
    assert run_te(choice, 1, "te") == everything
    assert run_te(choice, 1, "torch") == "none"
    assert run_te(choice, 1, "te", oldest="99.0") == "gradient_accumulation_fusion, apply_rope_fusion"
    # 9 tokens, padded to 8 a rank, leave nothing for the third and fourth.
    assert "cross" not in run_te(choice, 1, "te", vocab_size=9, tensor_model_parallel_size=4)


def test_what_is_asked_for_and_not_possible_is_refused(run_te):
    wanted = {"cross_entropy_loss_fusion": True}
    assert "needs Transformer Engine 99.0" in run_te(choice, 1, "te", oldest="99.0", **wanted)
    error = run_te(choice, 1, "te", vocab_size=9, tensor_model_parallel_size=4, **wanted)
    assert error.startswith("parallel.cross_entropy_loss_fusion with a vocabulary of 9 padded to 4 x 8")
    assert "needs Transformer Engine (model.backend=te)" in run_te(choice, 1, "torch", **wanted)
