"""The DeepSpeed engine gives the megatron engine's numbers, to 1e-5 relative in float32, at every ZeRO stage.

Compared with the megatron engine on one process over three steps: losses, gradient norms, learning rates, and the
validation loss of the same weights at other loop counts in between. `make test` runs a covering design, in which every
pair of settings occurs; all of TP 1, TP 2, TP 2 with sequence parallelism x DP 1/2 x stage 1/2/3 x loops 1 to 3 x
recompute is `slow`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from plt_megatron.config.schema import DecayFactors, RateFactors
from tests.distributed.cases import LOOPCODER, LOSSES, Z_LOSS, Case, Layout, Outcome
from tests.distributed.covering import covering_design, pairs
from tests.distributed.deepspeed_jobs import MEGATRON, STEPS, Zero, refuse_steps, train_cases
from tests.distributed.params import layouts, slow
from tests.distributed.parity_checks import TOLERANCE, compare, differences, reference_of

LAYOUTS = [Layout(tp, sp, 1, dp) for (tp, sp), dp in itertools.product([(1, False), (2, False), (2, True)], (1, 2))]
Setting = tuple[Layout, int, int, str]  # layout, ZeRO stage, loops, recompute
EVERYTHING: list[Setting] = list(itertools.product(LAYOUTS, (1, 2, 3), (1, 2, 3), ("none", "selective", "full")))


def _settings(setting: Setting) -> list[tuple[str, Any]]:
    layout, *how = setting
    axes = ("stage", "loops", "recompute")
    return [("tensor", (layout.tp, layout.sp)), ("data", layout.dp), *zip(axes, how, strict=True)]


COVERING = covering_design(EVERYTHING, _settings)


@pytest.fixture(scope="module")
def reference(run_deepspeed) -> Callable[[Case], Outcome]:
    """A case's outcome from the megatron engine on one process."""
    return reference_of(lambda case: run_deepspeed(train_cases, 1, Layout(), [(case, MEGATRON)])[0])


@pytest.fixture
def check(run_deepspeed, reference, record_property) -> Callable[..., None]:
    """Train the cases in the layout and compare; what was found goes into the table."""

    def check(layout: Layout, cases: list[tuple[Case, Zero]], names: list[str] | None = None) -> None:
        outcomes = run_deepspeed(train_cases, layout.world_size, layout, cases, timeout_s=280)
        names = [f"{name}," for name in names] if names else [f"L{case.loops}" for case, _ in cases]
        rows = [f"{name} {layout} {zero}" for name, (_, zero) in zip(names, cases, strict=True)]
        compare(record_property, "DeepSpeed", [case for case, _ in cases], outcomes, reference, rows)

    return check


def _cases(settings: list[Setting], layout: Layout) -> list[tuple[Case, Zero]]:
    return [(Case(loops, how), Zero(stage)) for chosen, stage, loops, how in settings if chosen == layout]


QUICK = {Layout(dp=2)}  # `make test` runs these, `make test-all` the whole design


@pytest.mark.parametrize(
    "layout",
    [layout if layout in QUICK else slow(layout) for layout in sorted({how[0] for how in COVERING}, key=LAYOUTS.index)],
    ids=str,
)
def test_every_pair_of_settings(check, layout):
    check(layout, _cases(COVERING, layout))


def test_rates_and_decay_by_kind_of_parameter(check):
    factors = {"lr_mult": RateFactors(embedding=0.5, gates=3.0), "wd_mult": DecayFactors(norms=1.0, hidden=2.0)}
    check(Layout(dp=2), [(Case(optimizer=factors, model={"mup_base_hidden_size": 8}), Zero(2))])


@pytest.mark.slow
def test_several_ranks_share_a_key_value_head(check):
    check(Layout(tp=2, sp=True, dp=2), [(Case(3, "full", model={"num_query_groups": 1}), Zero(3))])


@pytest.mark.parametrize(("layout", "zero"), [("DP2", Zero(2)), slow("TP2 SP DP2", Zero(3))], ids=str)
def test_learned_key_shift(check, layout, zero):
    """Without a window later loops use neither their keys nor, where those are shared, their values."""
    shared = {"key_shift": "learned", "gated_window": False}
    own_values = {**shared, "share_values": False}
    check(Layout.of(layout), [(Case(3, "full", model=model), zero) for model in (shared, own_values)])


@layouts("", slow="DP2, TP2 SP")
def test_the_z_loss_of_the_head(check, reference, layout):
    case = Case(training=Z_LOSS)
    check(layout, [(case, Zero(2)), (case, Zero(3))])
    norms = [reference(each).numbers["gradient norm 0"] for each in (case, Case())]
    assert abs(norms[0] - norms[1]) > 100 * TOLERANCE * norms[1]


@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        ("DP2", [("none", {}, Zero(2)), ("full", {"loop_norm": "final"}, Zero(3))]),
        slow("TP2 SP", [("selective", {}, Zero(1)), ("full", {"share_embeddings_and_output_weights": False}, Zero(3))]),
        slow("TP2 DP2", [("full", {}, Zero(3, "cpu", "cpu")), ("none", {}, Zero(2, "cpu"))]),
    ],
    ids=str,
)
def test_losses_of_every_loop(check, reference, layout, cases):
    check(Layout.of(layout), [(Case(3, how, training=LOSSES, model=model), zero) for how, model, zero in cases])
    off = differences(reference(Case(3, training=LOSSES)), reference(Case(3)))
    assert off["gradient norm 0"] > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "zeros", "recompute"),
    [
        ("DP2", [Zero(1), Zero(3)], "none"),
        ("DP2", [Zero(2, "cpu")], "none"),
        ("TP2 SP DP2", [Zero(2), Zero(3, "cpu", "cpu")], "full"),
        ("DP2", [Zero(1, "cpu"), Zero(3)], "selective"),
    ],
    ids=str,
)
def test_steps_of_changing_loop_counts(check, layout, zeros, recompute):
    case = Case(3, recompute, step_loops=(2, 1, 3, 1, 2), training=LOSSES)
    check(Layout.of(layout), [(case, zero) for zero in zeros])


def test_the_covering_design_has_every_pair():
    assert pairs(COVERING, _settings) == pairs(EVERYTHING, _settings)
    assert len(COVERING) <= 12


# A small bucket: several reductions are made. A small persistence threshold: no parameter stays whole.
SMALL_BUCKET = (("reduce_bucket_size", 2000),)
NOTHING_STAYS = (("stage3_param_persistence_threshold", 0), ("stage3_prefetch_bucket_size", 100))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        [(Case(2, "full"), Zero(3, "cpu", "cpu", raw=SMALL_BUCKET)), (Case(2), Zero(3, raw=NOTHING_STAYS))],
        [(Case(2, "full"), Zero(1, "cpu")), (Case(3), Zero(2, "cpu", raw=SMALL_BUCKET)), (Case(2), Zero(3, "cpu"))],
    ],
    ids=["everything", "states"],
)
def test_offloaded_states_and_parameters(check, cases):
    check(Layout(dp=2), cases)


# Those whose gradients come in other numbers of parts: gates that read the residual stream, keys that only the first
# loop uses, norms over all heads.
VARIANTS = {
    "LoopCoder-v2": (Case(2, "full", model=LOOPCODER), Zero(2)),
    "LoopCoder-v2, learned scale, packed": (
        Case(2, "selective", packed=True, model={**LOOPCODER, "learned_hidden_scale": "model"}),
        Zero(3),
    ),
    "+ KV sharing, QK norms, scales": (
        Case(
            3,
            "full",
            model={
                "gated_window": False,
                "qk_layernorm": True,
                "loop_norm": "rms",
                "learned_hidden_scale": "channel",
                "residual_scaling": "layers",
            },
        ),
        Zero(2),
    ),
    "post-norm": (
        Case(
            2,
            "full",
            model={"norm_placement": "post", "qk_layernorm": True, "qkv_bias": True, "layernorm_epsilon": 1e-2},
        ),
        Zero(2),
    ),
    "steps of one loop of gates that read the residual stream": (
        Case(2, "full", model={"gate_input": "hidden"}, step_loops=(2, 1, 2)),
        Zero(1),
    ),
    "recomputed FFN": (Case(3, "selective", parallel={"recompute_modules": ["mlp"]}), Zero(3)),
    "recomputed attention and FFN": (
        Case(3, "selective", parallel={"recompute_modules": ["core_attn", "mlp"]}),
        Zero(2),
    ),
}


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        slow("TP2 SP", ["LoopCoder-v2, learned scale, packed", "post-norm"]),
        slow("TP2 SP", ["LoopCoder-v2", "+ KV sharing, QK norms, scales"]),
        slow("TP2 SP", list(VARIANTS)[-3:]),
        ("DP2", list(VARIANTS)[-3:]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else value,
)
def test_variants_and_packed_documents(check, layout, names):
    check(Layout.of(layout), [VARIANTS[name] for name in names], names)


@pytest.mark.slow
def test_bfloat16_is_close(run_deepspeed, reference):
    case = Case(2, "full", precision="bf16")
    for outcome in run_deepspeed(train_cases, 2, Layout(dp=2), [(case, Zero(stage)) for stage in (1, 3)]):
        wrong = differences(outcome, reference(case))
        assert max(wrong.values()) < 0.03, wrong


@pytest.mark.parametrize("stages", [[3], slow([1, 2])])
def test_a_step_that_is_refused_changes_nothing(run_deepspeed, stages):
    """Nor does one whose loss is no number; and each step is judged once, with the numbers that are reported."""
    megatron, *others = run_deepspeed(refuse_steps, 2, Layout(dp=2), [MEGATRON, *map(Zero, stages)])
    for seen, asked in others:
        assert [updated for updated, *_ in seen] == [True, False, False, True]
        assert [same for *_, same in seen] == [False, True, True, False]
        assert len(asked) == 4 and not math.isfinite(asked[2][1])
        for (_, loss, norm, _), judged in zip(seen, asked, strict=True):
            assert judged == pytest.approx((loss, norm), rel=1e-12, nan_ok=True)
        for step in (0, 1, 3):
            assert seen[step][1:3] == pytest.approx(megatron[0][step][1:3], rel=TOLERANCE)


def test_gradients_that_were_refused_are_not_added_to_the_next_steps(run_deepspeed):
    """DeepSpeed accumulates in fp32 for an optimizer on the CPU, and keeps what it has of a step that it leaves out."""
    zeros = [Zero(1), Zero(1, "cpu"), Zero(2, "cpu"), Zero(3, "cpu", "cpu")]
    stays, *others = run_deepspeed(refuse_steps, 2, Layout(dp=2), zeros, "bf16")
    for seen, _ in others:
        assert [updated for updated, *_ in seen] == [True, False, False, True]
        for step in (0, 1, 3):
            assert seen[step][1:3] == pytest.approx(stays[0][step][1:3], rel=1e-3)


def test_the_comparison_would_notice_a_lost_loop(reference):
    """One loop less, or another model, is seen in every step."""
    norms = [f"gradient norm {step}" for step in range(STEPS)]
    base = reference(Case(3)).numbers
    for case in (Case(2), Case(3, model={"gated_window": False})):
        other = reference(case).numbers
        assert min(abs(base[name] / other[name] - 1) for name in norms) > 100 * TOLERANCE
