"""Recomputation of parts of a layer and FP8 in some layers, both chosen by name, with loops."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.cases import Case, Layout, train_cases
from tests.distributed.parity_checks import TOLERANCE, differences
from tests.te import te_jobs as jobs
from tests.te.te_jobs import fp8_case, on_te

LAYERS = 4


def recomputing(case: Case, *modules: str) -> Case:
    return replace(case, recompute="selective", parallel={**case.parallel, "recompute_modules": modules})


def test_a_recomputed_mlp_gives_the_same_numbers(run_te):
    cases = [on_te(Case(3)), recomputing(on_te(Case(3)), "mlp"), recomputing(on_te(Case(3)), "core_attn", "mlp")]
    plain, *others = run_te(train_cases, 1, Layout(), cases)
    for other in others:
        assert max(differences(other, plain).values()) <= TOLERANCE


def test_a_recomputed_shared_expert_gives_the_same_numbers(run_te):
    model = {"moe.num_experts": 4, "moe.ffn_hidden_size": 12, "moe.shared_expert_intermediate_size": 8}
    case = on_te(Case(2, model=model))
    plain, other = run_te(train_cases, 1, Layout(), [case, recomputing(case, "shared_experts")])
    assert max(differences(other, plain).values()) <= TOLERANCE


def test_a_recomputed_mlp_in_fp8_gives_the_same_gradient(same_gradient):
    """With scales of the tensors themselves; with delayed scaling it is refused (`config/rules/fp8.py`)."""
    plain = fp8_case(3, "tensorwise")
    same_gradient(plain, recomputing(plain, "mlp"))


def with_ends(loops: int, start: int, end: int) -> Case:
    case = fp8_case(loops, "tensorwise")
    ends = {"fp8.num_layers_at_start_in_bf16": start, "fp8.num_layers_at_end_in_bf16": end}
    return replace(case, training={**case.training, **ends})


@pytest.mark.parametrize(
    ("layout", "loops", "start", "end"), [(Layout(), 2, 1, 1), (Layout(), 1, 0, 2), (Layout(pp=2), 3, 1, 0)], ids=str
)
def test_layers_at_the_ends_are_in_bf16_in_every_loop(run_te, layout, loops, start, end):
    """Nothing of them is quantized, in any loop, and everything of the others is. In a pipeline: the first stage's."""
    calls, _ = run_te(jobs.count, layout.world_size, layout, with_ends(loops, start, end))
    own = range(LAYERS // layout.pp)
    expected = {layer for layer in own if start <= layer < LAYERS - end}
    for call in calls:
        quantized = {int(name.split(".")[2]) for name in call.weights}
        assert quantized == expected
        assert len(call.weights) == jobs.WEIGHTS_PER_LAYER * len(expected) and set(call.weights.values()) == {1}


def test_all_layers_but_one_in_bf16_are_close_to_bf16(run_te):
    """And the one is not."""
    plain, ends = run_te(jobs.train_fresh, 1, Layout(), [fp8_case(2, None), with_ends(2, 1, 2)])
    off = {name: abs(ends.numbers[name] / value - 1) for name, value in plain.numbers.items()}
    assert 0 < max(off.values()) < 0.05
