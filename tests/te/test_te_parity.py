"""PLT on Transformer Engine's layers gives the numbers of PLT on plain torch's: float32, 1e-5, gradients included.

Compared over three optimizer steps as in tests/distributed/test_parity.py: losses, gradient norms, validation losses
at other loop counts and final weights. The reference is one process on the torch spec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.cases import EXPERTS, LOOPCODER, NAIVE, STEPS, Case, Layout, train_cases
from tests.distributed.params import layouts
from tests.distributed.parity_checks import TOLERANCE, compare, differences, reference_of
from tests.te.te_jobs import on_te

LOOPS = [Case(1), Case(2), Case(3)]
A2A = {"cp_comm_type": "a2a", "window_cp_comm_type": "a2a"}
ALL_GATHER = {"cp_comm_type": "all_gather", "window_cp_comm_type": "all_gather"}
P2P = {**A2A, "cp_comm_type": "p2p"}
LAST_LOOP = {**NAIVE, "cross_loop_parallel": True, "full_attention": "last_loop"}
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla loop": NAIVE,
    "LoopCoder-v2": LOOPCODER,
    "the paper's dense, keys shifted by channels": {
        "key_shift": "channels",
        "qk_layernorm": True,
        "norm_placement": "pre_ffn_output",
    },
    "norms on outputs": {"norm_placement": "post", "qk_layernorm": True},
    "qkv bias, untied, learned key shift": {
        "key_shift": "learned",
        "qkv_bias": True,
        "share_embeddings_and_output_weights": False,
    },
    "no GQA, window 1": {"num_query_groups": None, "window_size": 1},
    "window above the length": {"window_size": 20},
    "full attention in the last loop": LAST_LOOP,
    "own V": {"share_values": False, "gate_input": "hidden"},
    "prelude and coda": {"loop_span": (1, 3), "gate_input": "hidden"},
}


@pytest.fixture(scope="module")
def reference(run_te) -> Callable[[Case], Any]:
    """A case's outcome on one process and the torch spec."""
    return reference_of(lambda case: run_te(train_cases, 1, Layout(), [case])[0])


@pytest.fixture
def check(run_te, reference, record_property) -> Callable[..., None]:
    """Train cases on the te spec in a layout and compare."""

    def check(layout: Layout, cases: list[Case], names: list[str] | None = None) -> None:
        outcomes = run_te(train_cases, layout.world_size, layout, [on_te(case) for case in cases], timeout_s=240)
        names = names or [f"L{case.loops}" for case in cases]
        how = [f" {case.parallel['cp_comm_type']}" if case.parallel else "" for case in cases]
        rows = [f"{name}, {layout}{way}" for name, way in zip(names, how, strict=True)]
        compare(record_property, "Transformer Engine's layers", cases, outcomes, reference, rows)

    return check


@layouts("TP1, TP2, TP2 SP, PP2, TP2 SP PP2")
def test_every_loop_count(check, layout):
    check(layout, LOOPS)


@pytest.mark.parametrize("how", [A2A, ALL_GATHER, P2P], ids=["a2a", "all_gather", "p2p"])
def test_context_parallelism(check, how):
    cases = [*(Case(loops, parallel=how) for loops in (1, 2, 3)), Case(3, parallel=how, model=LAST_LOOP)]
    check(Layout(cp=2), cases, ["L1", "L2", "L3", "L3, full attention in the last"])


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_packed_documents_under_context_parallelism(check, loops):
    check(Layout(cp=2), [Case(loops, packed=True, parallel=A2A)])


def test_packed_documents_under_context_parallelism_in_every_way(check):
    recomputed = [Case(3, how, packed=True, parallel=A2A) for how in ("selective", "full")]
    models = ("vanilla loop", "LoopCoder-v2", "own V", "prelude and coda")
    variants = [Case(2, packed=True, parallel=A2A, model=VARIANTS[name]) for name in models]
    check(Layout(cp=2, dp=2), recomputed + variants)
    wide = {"num_query_groups": 4}
    check(Layout(tp=2, sp=True, cp=2), [Case(2, "full", packed=True, parallel=A2A, model=wide)])
    check(Layout(cp=4), [Case(2, packed=True, parallel=A2A, model=wide)])
    check(Layout(pp=2, cp=2), [Case(3, packed=True, parallel=A2A)])


def test_context_and_sequence_parallelism(check):
    check(Layout(tp=2, sp=True, cp=2), [Case(2, "full", parallel=ALL_GATHER)])


def test_several_ranks_share_a_key_value_head(check):
    model = {"num_query_groups": 1}
    check(Layout(tp=2, sp=True), [Case(2, model=model), Case(3, "full", packed=True, model=model)])


def test_recomputation(check):
    check(Layout(), [Case(3, "selective"), Case(3, "full")])
    check(Layout(pp=2), [Case(2, "full", overlap=True)])


def test_variants(check):
    check(Layout(), [Case(2, model=model) for model in VARIANTS.values()], list(VARIANTS))


def test_packed_documents(check):
    check(Layout(), [Case(2, packed=True), Case(3, "full", packed=True)], ["packed", "packed"])
    check(Layout(tp=2, sp=True), [Case(2, packed=True)], ["packed"])


@layouts("TP1, DP2 EP2, TP2 SP EP2")
def test_experts_as_one_grouped_product(check, layout):
    """The reference has them one after another."""
    shared = {
        **EXPERTS,
        "moe.shared_expert_intermediate_size": 8,
        "moe.first_k_dense_replace": 1,
        "moe.router_score_function": "sigmoid",
        "moe.router_bias_update_rate": 1e-3,
    }
    cases = [Case(2, model=EXPERTS), Case(3, "full", model=EXPERTS), Case(2, "selective", model=shared)]
    check(layout, cases, ["experts", "experts, recomputed", "experts and a shared one"])


def test_the_comparison_would_notice_another_window(reference):
    """The reference itself moves by more than is tolerated."""
    one, other = reference(Case(2)), reference(Case(2, model={"window_size": 4}))
    assert min(differences(one, other)[f"gradient norm {step}"] for step in range(STEPS)) > 100 * TOLERANCE
