"""The DeepSpeed engine gives the megatron engine's numbers, to 1e-5 relative in float32, at every ZeRO stage.

Compared with the megatron engine on one process over three steps: losses, gradient norms, learning rates, and the
validation loss of the same weights at other loop counts in between. `make test` runs a covering design, in which every
pair of settings occurs; all of TP 1, TP 2, TP 2 with sequence parallelism x DP 1/2 x stage 1/2/3 x loops 1 to 3 x
recompute is `slow`.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from plt_megatron.config.schema import DecayFactors, RateFactors
from tests.distributed.cases import LOSSES, Case, Layout
from tests.distributed.covering import covering_design, pairs
from tests.distributed.deepspeed_jobs import MEGATRON, STEPS, Zero, refuse_steps, train_cases
from tests.distributed.parity_checks import reference_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (the extra `deepspeed`)"
)

TOLERANCE = 1e-5
LAYOUTS = [Layout(tp, sp, 1, dp) for (tp, sp), dp in itertools.product([(1, False), (2, False), (2, True)], (1, 2))]
Setting = tuple[Layout, int, int, str]  # layout, ZeRO stage, loops, recompute
EVERYTHING: list[Setting] = list(itertools.product(LAYOUTS, (1, 2, 3), (1, 2, 3), ("none", "selective", "full")))


def _settings(setting: Setting) -> list[tuple[str, Any]]:
    layout, *how = setting
    axes = ("stage", "loops", "recompute")
    return [("tensor", (layout.tp, layout.sp)), ("data", layout.dp), *zip(axes, how, strict=True)]


COVERING = covering_design(EVERYTHING, _settings)


@pytest.fixture(scope="module")
def reference(run_deepspeed) -> Callable[[Case], dict[str, float]]:
    """A case's numbers from the megatron engine on one process."""
    return reference_of(lambda case: run_deepspeed(train_cases, 1, Layout(), [(case, MEGATRON)])[0])


@pytest.fixture
def check(run_deepspeed, reference, record_property) -> Callable[..., None]:
    """Train the cases in the layout and compare; what was found goes into the table."""

    def check(layout: Layout, cases: list[tuple[Case, Zero]], names: list[str] | None = None) -> None:
        failures = []
        outcomes = run_deepspeed(train_cases, layout.world_size, layout, cases, timeout_s=280)
        for index, ((case, zero), numbers) in enumerate(zip(cases, outcomes, strict=True)):
            wrong = differences(numbers, reference(case))
            worst = max(wrong, key=lambda name: wrong[name] if wrong[name] == wrong[name] else math.inf)
            name = f"L{case.loops}" if names is None else f"{names[index]},"
            record_property("parity", ["DeepSpeed", f"{name} {layout} {zero}", case.recompute, wrong[worst], TOLERANCE])
            if not wrong[worst] <= TOLERANCE:
                failures.append(f"{layout}, {case}, {zero}: {worst} is off by {wrong[worst]:.1e}")
        assert not failures, "\n".join(failures)

    return check


def differences(numbers: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    """Relative differences by name."""
    assert numbers.keys() == expected.keys()
    return {
        name: abs(numbers[name] - value) / abs(value) if value else abs(numbers[name])
        for name, value in expected.items()
    }


def _cases(settings: list[Setting], layout: Layout) -> list[tuple[Case, Zero]]:
    return [(Case(loops, how), Zero(stage)) for chosen, stage, loops, how in settings if chosen == layout]


QUICK = {Layout(dp=2)}  # `make test` runs these, `make test-all` the whole design


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[] if layout in QUICK else pytest.mark.slow)
        for layout in sorted({layout for layout, *_ in COVERING}, key=LAYOUTS.index)
    ],
    ids=str,
)
def test_every_pair_of_settings(check, layout):
    check(layout, _cases(COVERING, layout))


def test_rates_and_decay_by_kind_of_parameter(check):
    factors = (("lr_mult", RateFactors(embedding=0.5, gates=3.0)), ("wd_mult", DecayFactors(norms=1.0, hidden=2.0)))
    check(Layout(dp=2), [(Case(optimizer=factors, model=_model(mup_base_hidden_size=8)), Zero(2))])


@pytest.mark.slow
def test_several_ranks_share_a_key_value_head(check):
    check(Layout(tp=2, sp=True, dp=2), [(Case(3, "full", model=(("num_query_groups", 1),)), Zero(3))])


@pytest.mark.parametrize(
    ("layout", "zero"),
    [(Layout(dp=2), Zero(2)), pytest.param(Layout(tp=2, sp=True, dp=2), Zero(3), marks=pytest.mark.slow)],
    ids=str,
)
def test_learned_key_shift(check, layout, zero):
    """Without a window later loops use neither their keys nor, where those are shared, their values."""
    shared = _model(key_shift="learned", gated_window=False)
    own_values = _model(key_shift="learned", gated_window=False, share_values=False)
    check(layout, [(Case(3, "full", model=model), zero) for model in (shared, own_values)])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(tp=2, sp=True)], ids=str)
def test_the_z_loss_of_the_head(check, reference, layout):
    case = Case(training=(("z_loss_coeff", 0.02),))
    check(layout, [(case, Zero(2)), (case, Zero(3))])
    without = reference(Case())["gradient norm 0"]
    assert abs(reference(case)["gradient norm 0"] - without) > 100 * TOLERANCE * without


@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        (Layout(dp=2), [("none", {}, Zero(2)), ("full", {"loop_norm": "final"}, Zero(3))]),
        pytest.param(
            Layout(tp=2, sp=True),
            [("selective", {}, Zero(1)), ("full", {"share_embeddings_and_output_weights": False}, Zero(3))],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Layout(tp=2, dp=2),
            [("full", {}, Zero(3, "cpu", "cpu")), ("none", {}, Zero(2, "cpu"))],
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_losses_of_every_loop(check, reference, layout, cases):
    check(layout, [(Case(3, how, training=LOSSES, model=_model(**model)), zero) for how, model, zero in cases])
    without = reference(Case(3))["gradient norm 0"]
    assert abs(reference(Case(3, training=LOSSES))["gradient norm 0"] - without) > 100 * TOLERANCE * without


def test_the_covering_design_has_every_pair():
    assert pairs(COVERING, _settings) == pairs(EVERYTHING, _settings)
    assert len(COVERING) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_combination(check, layout, stage):
    check(layout, _cases([setting for setting in EVERYTHING if setting[1] == stage], layout))


def _model(**model: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(model.items()))


LOOPCODER = _model(
    window_size=4,
    gate_input="hidden",
    gate_side="global",
    loop_norm="final",
    embedding_scale=0.707,
    hidden_scale=0.053,
    share_embeddings_and_output_weights=False,
)


# A small bucket: several reductions are made. A small persistence threshold: no parameter stays whole.
SMALL_BUCKET = (("reduce_bucket_size", 2000),)
NOTHING_STAYS = (("stage3_param_persistence_threshold", 0), ("stage3_prefetch_bucket_size", 100))


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [(Case(2, "full"), Zero(3, "cpu", "cpu", raw=SMALL_BUCKET)), (Case(2), Zero(3, raw=NOTHING_STAYS))],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                (Case(2, "full"), Zero(1, "cpu")),
                (Case(3), Zero(2, "cpu", raw=SMALL_BUCKET)),
                (Case(2), Zero(3, "cpu")),
            ],
            marks=pytest.mark.slow,
        ),
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
        Case(2, "selective", packed=True, model=(*LOOPCODER, ("learned_hidden_scale", "model"))),
        Zero(3),
    ),
    "+ KV sharing, QK norms, scales": (
        Case(
            3,
            "full",
            model=_model(
                gated_window=False,
                qk_layernorm=True,
                loop_norm="rms",
                learned_hidden_scale="channel",
                residual_scaling="layers",
            ),
        ),
        Zero(2),
    ),
    "post-norm": (
        Case(2, "full", model=_model(norm_placement="post", qk_layernorm=True, qkv_bias=True, layernorm_epsilon=1e-2)),
        Zero(2),
    ),
    "steps of one loop of gates that read the residual stream": (
        Case(2, "full", model=_model(gate_input="hidden"), step_loops=(2, 1, 2)),
        Zero(1),
    ),
    "recomputed FFN": (Case(3, "selective", parallel=(("recompute_modules", ["mlp"]),)), Zero(3)),
    "recomputed attention and FFN": (
        Case(3, "selective", parallel=(("recompute_modules", ["core_attn", "mlp"]),)),
        Zero(2),
    ),
}


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        pytest.param(
            Layout(tp=2, sp=True), ["LoopCoder-v2, learned scale, packed", "post-norm"], marks=pytest.mark.slow
        ),
        pytest.param(Layout(tp=2, sp=True), ["LoopCoder-v2", "+ KV sharing, QK norms, scales"], marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, sp=True), list(VARIANTS)[-3:], marks=pytest.mark.slow),
        (Layout(dp=2), list(VARIANTS)[-3:]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else str(value),
)
def test_variants_and_packed_documents(check, layout, names):
    check(layout, [VARIANTS[name] for name in names], names)


@pytest.mark.slow
def test_bfloat16_is_close(run_deepspeed, reference):
    case = Case(2, "full", precision="bf16")
    for numbers in run_deepspeed(train_cases, 2, Layout(dp=2), [(case, Zero(stage)) for stage in (1, 3)]):
        wrong = differences(numbers, reference(case))
        assert max(wrong.values()) < 0.03, wrong


@pytest.mark.parametrize("stages", [[3], pytest.param([1, 2], marks=pytest.mark.slow)])
def test_a_step_that_is_refused_changes_nothing(run_deepspeed, stages):
    """Nor does one whose loss is no number; and each step is judged once, with the numbers that are reported."""
    megatron, *others = run_deepspeed(refuse_steps, 2, Layout(dp=2), [0, *stages])
    for seen, asked in others:
        assert [updated for updated, *_ in seen] == [True, False, False, True]
        assert [same for *_, same in seen] == [False, True, True, False]
        assert len(asked) == 4 and not math.isfinite(asked[2][1])
        for (_, loss, norm, _), judged in zip(seen, asked, strict=True):
            assert judged == pytest.approx((loss, norm), rel=1e-12, nan_ok=True)
        for step in (0, 1, 3):
            assert seen[step][1:3] == pytest.approx(megatron[0][step][1:3], rel=TOLERANCE)


def test_the_comparison_would_notice_a_lost_loop(reference):
    """One loop less, or another model, is seen in every step."""
    base = reference(Case(3))
    for other in (reference(Case(2)), reference(Case(3, model=_model(gated_window=False)))):
        wrong = {name: abs(base[f"gradient norm {name}"] / other[f"gradient norm {name}"] - 1) for name in range(STEPS)}
        assert min(wrong.values()) > 100 * TOLERANCE
