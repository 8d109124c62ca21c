"""Features that came after the parity matrix, in pairs: each with each other one, in small layouts.

Topologies (layers that run once, loops by layer, uneven stages, a head as a stage), YaRN, z-loss, Muon, rates by kind,
loops that change from step to step, experts with a loss or with biases after a dense layer, packed documents and
recomputation. A layout gives one process's numbers.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.distributed.cases import BIASES, ENDS, EXPERTS, FACTORS, YARN, Z_LOSS, Case, Layout
from tests.distributed.covering import covering_design, pairs

FOUR = {"num_layers": 4}
TOPOLOGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the model, and of the layout
    "even": (FOUR, {}),
    "span": ({**FOUR, "loop_span": [1, 3]}, {}),
    "by layer": ({**FOUR, "loop_order": "layer", "cross_loop_parallel": False}, {}),
    "by layer in a span": ({**FOUR, "loop_order": "layer", "cross_loop_parallel": False, "loop_span": [0, 2]}, {}),
    "uneven": (FOUR, {"num_layers_in_first_pipeline_stage": 1}),
    "ends": ({"num_layers": 2}, ENDS),
}
LAYOUTS = [Layout.of(words) for words in ("DP2", "TP2 SP", "CP2", "PP2", "TP2 SP PP2", "PP4")]
FFNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": EXPERTS,
    "biases": {**EXPERTS, **BIASES, "moe.router_load_balancing_type": "none", "moe.first_k_dense_replace": 1},
}
Setting = tuple[Layout, str, bool, bool, str, bool, bool, str, bool, str]


def _allowed(setting: Setting) -> bool:
    layout, topology, *_ = setting
    if topology == "ends":  # a stage each for embedding and head
        return layout.pp == 4
    if topology == "even":
        return layout.pp < 4  # four layers of one stage each are the matrix's
    return layout.pp == (2 if topology == "uneven" else 1)


EVERYTHING = [
    setting
    for setting in itertools.product(
        LAYOUTS,
        TOPOLOGIES,
        *[(False, True)] * 2,
        ("adam", "muon"),
        *[(False, True)] * 2,
        FFNS,
        (False, True),
        ("none", "selective", "full"),
    )
    if _allowed(setting)
]


def _described(setting: Setting) -> list[tuple[Any, Any]]:
    return list(enumerate(setting))


COVERING: list[Setting] = covering_design(EVERYTHING, _described)


def _case(setting: Setting) -> Case:
    layout, topology, yarn, z_loss, optimizer, factors, changing, ffn, packed, recompute = setting
    model, parallel = TOPOLOGIES[topology]
    model = {**model, **(YARN if yarn else {}), **FFNS[ffn], "init_method_std": 0.06}
    return Case(
        loops=3 if layout.pp == 1 else 2,
        recompute=recompute,
        packed=packed,
        model=model,
        parallel=parallel,
        training=Z_LOSS if z_loss else {},
        optimizer={"name": optimizer, **(FACTORS if factors else {})},
        step_loops=(1, 2, 1, 2) if changing else (),
    )


def test_every_pair_is_covered():
    assert pairs(COVERING, _described) == pairs(EVERYTHING, _described) and len(COVERING) < 50


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pairs_of_features_give_one_processs_numbers(check, layout):
    cases = [_case(setting) for setting in COVERING if setting[0] == layout]
    check(layout, cases, "pairs of features", [f"pair {number}" for number in range(len(cases))], timeout_s=500)
