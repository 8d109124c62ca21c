"""Every layout gives one process's numbers, to 1e-5 relative in float32.

Compared over two optimizer steps: losses, gradient norms, the validation loss of the same weights at other loop
counts in between, the initial weights (bit for bit) and the final ones (relative to a tensor's largest element).

`make test` runs a covering design: every pair of settings occurs, of TP 1, TP 2, TP 2 with sequence parallel x PP 1/2/4
x DP 1/2 x CP 1/2/4, up to 4 processes, x one to three loops x recompute none/selective/full x overlapped gradient
reduction x packed documents x variants of the model that change several things at once. `slow` are the same with up to
8 processes and every variant, all combinations with two loops, and packed documents and every variant in a few layouts
each. The end of the test run prints it all as a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plt_megatron.config.schema import RateFactors
from tests.distributed.cases import (
    BIASES,
    ENDS,
    EXPERTS,
    FACTORS,
    LOOPCODER,
    LOSSES,
    NAIVE,
    STEPS,
    YARN,
    Z_LOSS,
    Case,
    Layout,
    Outcome,
    train_cases,
    train_with_other_sums,
)
from tests.distributed.covering import covering_design, pairs
from tests.distributed.params import layouts, slow
from tests.distributed.parity_checks import TOLERANCE, differences
from tests.reference.gates import GATES

RECOMPUTE = ("none", "selective", "full")
OVERLAP = (False, True)
LAYOUTS = [
    layout
    for (tp, sp), pp, dp, cp in itertools.product([(1, False), (2, False), (2, True)], (1, 2, 4), (1, 2), (1, 2, 4))
    if (layout := Layout(tp, sp, pp, dp, cp)).world_size <= 8
]
Setting = tuple[Layout, *tuple[Any, ...]]  # a layout and what is done in it


def _settings(setting: Setting) -> list[tuple[Any, Any]]:
    layout, *others = setting
    return [
        ("tensor", (layout.tp, layout.sp)),
        ("pipeline", layout.pp),
        ("data", layout.dp),
        ("context", layout.cp),
        *enumerate(others),
    ]


# The model's settings, and `training.loop_loss_weights`.
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla loop": NAIVE,
    "+ CLP": {"share_kv": False, "gated_window": False},
    "+ KV sharing": {"gated_window": False},
    **GATES,
    "LoopCoder-v2": {**LOOPCODER, **LOSSES},
    # With the cases' own std some FFN output is nearly zero in three loops, whose norm amplifies rounding to 9e-5.
    "the paper's dense, keys shifted by channels": {
        "key_shift": "channels",
        "qk_layernorm": True,
        "norm_placement": "pre_ffn_output",
        "init_method_std": 0.06,
        "loop_loss_weights": (0.25, 0.5),
    },
    # With a smaller epsilon the norm of a small output amplifies rounding to 2e-5.
    "norms on outputs": {"norm_placement": "post", "qk_layernorm": True, "layernorm_epsilon": 0.01},
    "qkv bias, untied, E + h, learned key shift": {
        "key_shift": "learned",
        "qkv_bias": True,
        "share_embeddings_and_output_weights": False,
        "cross_loop_parallel": False,
        "input_injection": True,
        "learned_hidden_scale": "model",
        "residual_scaling": "loops_sqrt_layers",
        "gate_activation": "tanh",
        "mup_base_hidden_size": 8,
    },
    "no GQA, window 1, own V, scale per channel, YaRN": {
        "num_query_groups": None,
        "window_size": 1,
        "share_values": False,
        "loop_norm": "rms",
        "learned_hidden_scale": "channel",
        "hidden_scale": 0.075,
        "residual_scaling": "layers",
        "residual_scale": 3.0,
        **YARN,
        "rotary_base": 100.0,
    },
}

PLAIN = "PLT"
EVERYTHING = [
    setting
    for setting in itertools.product(LAYOUTS, (1, 2, 3), RECOMPUTE, OVERLAP, (False, True), (PLAIN, *VARIANTS))
    if setting[1] > 1 or setting[-1] == PLAIN  # one loop has no variants worth the time
]
# On up to four processes, two to a sequence, and of the variants those that change several things at once.
COMBINED = (
    "LoopCoder-v2",
    "the paper's dense, keys shifted by channels",
    "qkv bias, untied, E + h, learned key shift",
    "no GQA, window 1, own V, scale per channel, YaRN",
)
QUICK = [
    setting
    for setting in EVERYTHING
    if setting[0].world_size <= 4 and setting[0].cp <= 2 and setting[-1] in (PLAIN, "vanilla loop", *COMBINED)
]
COVERING, QUICK_COVERING = covering_design(EVERYTHING, _settings), covering_design(QUICK, _settings)


def _case(
    loops: int,
    recompute: str = "none",
    overlap: bool = False,
    packed: bool = False,
    loop_loss_weights: tuple[float, ...] = (),
    **model: Any,
) -> Case:
    training = {"loop_loss_weights": loop_loss_weights[: loops - 1]} if loop_loss_weights else {}
    return Case(loops, recompute, overlap, packed, model, training=training)


# ---------------------------------------------------------------- the matrix


def _designs() -> Iterator[Any]:
    for design, which, marks in ((QUICK_COVERING, "quick", []), (COVERING, "all", [pytest.mark.slow])):
        for layout in sorted({layout for layout, *_ in design}, key=LAYOUTS.index):
            yield pytest.param(design, layout, id=f"{which}, {layout}", marks=marks)


@pytest.mark.parametrize(("design", "layout"), list(_designs()))
def test_every_pair_of_settings(check, design, layout):
    chosen = [how for other, *how in design if other == layout]
    names = [f"{variant} L{loops}{' packed' if packed else ''}" for loops, _, _, packed, variant in chosen]
    check(layout, [_case(*how, **VARIANTS.get(variant, {})) for *how, variant in chosen], "every pair", names)


def test_the_covering_design_has_every_pair():
    assert pairs(COVERING, _settings) == pairs(EVERYTHING, _settings)
    assert pairs(QUICK_COVERING, _settings) == pairs(QUICK, _settings)
    assert len(COVERING) <= 42 and len(QUICK_COVERING) <= 36


# ---------------------------------------------------------------- packed documents


@layouts("", slow="TP2, TP2 SP, PP2, DP2, TP2 SP PP2 DP2, CP4, TP2 SP CP2")
def test_packed_documents(check, layout):
    cases = [
        _case(3, "full", packed=True),
        _case(2, "selective", overlap=True, packed=True, **VARIANTS["LoopCoder-v2"]),
        _case(1, packed=True),
    ]
    check(layout, cases, "packed", ["PLT-3", "LoopCoder-v2", "PLT-1"])


@layouts("TP2 SP PP2", slow="PP2 DP2")
def test_bfloat16_runs_in_layouts_and_is_close(run_distributed, reference, layout):
    case = Case(2, "full", overlap=True, precision="bf16")
    outcome = run_distributed(train_cases, layout.world_size, layout, [case])[0]
    for other in (reference(case), reference(Case(2))):
        wrong = differences(outcome, other, final=False)
        assert max(wrong.values()) < 0.03, wrong


# ---------------------------------------------------------------- stages with unequally many layers

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, HEAD = ({name: value} for name, value in ENDS.items())
UNEVEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "3 + 1": ("PP2", {}, {FIRST: 3}),
    "1 + 3": ("TP2 SP PP2", {}, {LAST: 3}),
    "2 + 1 + 1 + 1": ("PP4", {"num_layers": 5}, {FIRST: 2}),
    "1 + 2 + 2 + 1": ("PP4", {"num_layers": 6}, ENDS),
    "3 + 2 + 2 + 1": ("PP4 DP2", {"num_layers": 8}, {FIRST: 3, LAST: 1}),
    "0 + 1 + 1 + 0": ("PP4", {"num_layers": 2}, ENDS),  # embedding and head alone
    "0 + 3": ("PP2 DP2", {"num_layers": 3}, EMBEDDING),
    "2 + 1, context": ("PP2 CP2", {"num_layers": 3}, HEAD),
}


@pytest.mark.parametrize(("name", "of_each"), [("3 + 1", 1), *(slow(name, 3) for name in UNEVEN)])
def test_uneven_stages(check, name, of_each):
    """Two and three loops, tied and untied; with a naive loop a stage without layers passes on what it gets."""
    layout, model, parallel = UNEVEN[name]
    cases = [
        replace(_case(2, "full", overlap=True, **model), parallel=parallel),
        replace(_case(3, "selective", packed=True, **model, **VARIANTS["LoopCoder-v2"]), parallel=parallel),
        replace(_case(2, **model, **VARIANTS["vanilla loop"]), parallel=parallel),
    ]
    kinds = ("PLT-2", "LoopCoder-v2, 3 loops", "naive")
    check(Layout.of(layout), cases[:of_each], "uneven stages", [f"{name}, {kind}" for kind in kinds[:of_each]])


@pytest.mark.slow
def test_uneven_stages_of_experts_and_with_muon(check):
    experts = replace(_expert_case(2, overlap=True), parallel={FIRST: 3})
    muon = Case(overlap=True, parallel={FIRST: 3}, optimizer={"name": "muon"})
    check(Layout(pp=2, dp=2, ep=2), [experts], "uneven stages", ["experts, 3 + 1"])
    check(Layout(pp=2, dp=2), [muon], "uneven stages", ["Muon, 3 + 1"])
    alone = replace(muon, parallel=ENDS, model={"num_layers": 2})
    check(Layout(pp=4), [alone], "uneven stages", ["Muon, 0 + 1 + 1 + 0"])


# ---------------------------------------------------------------- keys of the previous token


@layouts("TP4", slow="TP4 SP, TP2 SP CP2, CP4, PP2 DP2")
def test_shifted_keys(check, layout):
    """On four tensor-parallel ranks two share each key/value group."""
    cases = [
        _case(3, packed=True, key_shift="heads"),
        _case(2, "selective", packed=True, key_shift="channels", num_query_groups=1),
    ]
    if layout != Layout(tp=4):  # which `test_several_ranks_share_a_key_value_head` does with it
        cases.append(_case(2, "full", overlap=layout.dp > 1, key_shift="learned"))
    names = ["by heads, packed", "by channels, packed, one group", "learned"]
    check(layout, cases, "shifted keys", names[: len(cases)])


# ---------------------------------------------------------------- full attention in the last loop


@layouts("CP2", slow="TP2 SP PP2 DP2, TP2 SP CP2, CP4, PP2 CP2, PP4, TP4")
def test_full_attention_in_the_last_loop(check, layout):
    own = {"share_kv": False, "gated_window": False, "full_attention": "last_loop"}
    cases = [
        _case(3, "full", packed=True, key_shift="heads", **own),
        _case(2, "selective", overlap=layout.dp > 1, loop_loss_weights=(0.5,), cross_loop_parallel=False, **own),
    ]
    check(layout, cases, "full attention in the last loop", ["three loops, packed, keys shifted", "serial"])


# ---------------------------------------------------------------- copies on tensor-parallel ranks


def test_copies_stay_equal_though_each_rank_sums_in_another_order(run_distributed, reference):
    """Else no checkpoint could be saved: norms, the hidden gate, learned shifts. `_gather` compares bit for bit."""
    case = _case(2, gate_input="hidden", key_shift="learned")
    outcome = run_distributed(train_with_other_sums, 2, Layout(tp=2), case)
    assert max(differences(outcome, reference(case)).values()) < TOLERANCE


# ---------------------------------------------------------------- z-loss of the head


@layouts("TP2 SP", slow="TP2 SP PP2, TP2, DP2, PP4, CP2 DP2, TP2 SP CP2")
def test_z_loss(check, reference, layout):
    """Tied, and untied with a vocabulary that is padded by a quarter."""
    untied = {"make_vocab_size_divisible_by": 32, "share_embeddings_and_output_weights": False}
    cases = [Case(2, "full", overlap=True, training=Z_LOSS), Case(3, packed=True, model=untied, training=Z_LOSS)]
    check(layout, cases, "z-loss", ["PLT-2", "PLT-3, packed, untied"])
    with_loss, without = (reference(case.fitted(layout)).numbers for case in (cases[0], _case(2)))
    assert with_loss["loss 0"] == without["loss 0"] and 0 < with_loss["z-loss 0"] and "z-loss 0" not in without
    norms = [numbers["gradient norm 0"] for numbers in (with_loss, without)]
    assert abs(norms[0] - norms[1]) > 100 * TOLERANCE * norms[1]


# ---------------------------------------------------------------- mixture of experts


def _expert_case(
    loops: int, recompute: str = "none", overlap: bool = False, way: str = "alltoall", **model: Any
) -> Case:
    case = _case(loops, recompute, overlap, **EXPERTS, **model)
    return replace(case, parallel={"moe_token_dispatcher_type": way})


@layouts(
    "DP2 EP2",
    slow="TP1, TP2 SP EP2, PP2 DP2 EP2, DP2, PP2, TP2 SP, TP2 SP PP2 EP2, TP2 SP DP2 EP2, TP2 SP DP2 EP4, "
    "TP2 SP PP2 DP2 EP2, CP2 EP2, PP4 DP2 EP2",
)
def test_experts(check, layout):
    """The second has biases too, a shared expert, and a dense first layer."""
    others = {"moe.shared_expert_intermediate_size": 8, "moe.first_k_dense_replace": 1, **BIASES}
    first = _expert_case(3, "full", overlap=True, loop_loss_weights=(0.5, 0.25))
    cases = [first, _expert_case(2, "selective", way="allgather", **others)]
    check(layout, cases, "mixture of experts", ["PLT-3, losses of loops", "PLT-2, biases, dense first"])


@layouts(
    "",
    slow="TP2 SP PP2 EP2, PP2 DP2 EP2, DP2 EP2, CP2 EP2, TP2 SP DP2 EP4, TP2 SP CP2 EP2, TP2 SP PP2 DP2 EP2, PP4 DP2",
)
def test_biases_of_experts(check, reference, layout):
    """In layers 2 to 4, of which a pipeline's first stage has one or none."""
    case = _expert_case(3, "full", overlap=True, **{"moe.first_k_dense_replace": 1}, **BIASES)
    check(layout, [case], "biases of experts", ["PLT-3, dense first"])
    outcome = reference(case)
    moved = [value - outcome.initial[name] for name, value in outcome.final.items() if name.endswith("expert_bias")]
    assert len(moved) == 3 and np.isclose(np.abs(moved), 0.2).any(), "two steps, some of them one way"


@layouts("", slow="PP2 DP2 EP2, TP2 SP DP2 EP2, CP2 EP2, PP4 DP2 EP2, DP2")
def test_dense_layers_before_experts(check, layout):
    """Half of the layers: a pipeline's first stages have no experts. Recomputed dense FFNs, and uneven stages."""
    half = {"moe.first_k_dense_replace": 2, "moe.shared_expert_intermediate_size": 8}
    cases = [_expert_case(3, "full", overlap=True, **half), _expert_case(2, "selective", **half)]
    uneven = {FIRST: 3} if layout.pp == 2 else {}
    cases[1] = replace(cases[1], parallel={"recompute_modules": ["core_attn", "mlp"], **uneven})
    check(layout, cases, "dense layers before experts", ["PLT-3", "PLT-2"])


@pytest.mark.slow
def test_dense_layers_before_experts_with_muon_and_in_a_prelude(check):
    half = {"moe.first_k_dense_replace": 2, **BIASES}
    # With the cases' own coefficient even one process's second norm moves by 8e-5 with the size of microbatches.
    muon = _expert_case(2, overlap=True, **half)
    muon = replace(muon, model={**muon.model, "moe.aux_loss_coeff": 0.04}, optimizer={"name": "muon"})
    span = _expert_case(3, **half, loop_span=(2, 4))
    check(Layout(dp=2, ep=2), [muon, span], "dense layers before experts", ["PLT-2, Muon", "PLT-3, prelude"])


@pytest.mark.slow
def test_biases_of_experts_with_all_gathering_and_a_shared_one(check):
    case = _expert_case(2, way="allgather", **BIASES, **{"moe.shared_expert_intermediate_size": 8})
    check(Layout(tp=2, sp=True, dp=2, ep=4), [case], "biases of experts", ["PLT-2, shared expert"])


@pytest.mark.slow
def test_biases_act_from_the_second_step_on(reference):
    case, slower = (_expert_case(2, **{**BIASES, "moe.router_bias_update_rate": rate}) for rate in (0.1, 1e-6))
    for name, differs in (("loss 0", False), ("loss 1", True)):
        one, other = (reference(each).numbers[name] for each in (case, slower))
        assert (abs(one - other) > 10 * TOLERANCE * one) is differs, name


@layouts("TP2 SP", slow="TP4, TP4 SP, TP2 PP2, TP2 SP CP2 DP2")
def test_several_ranks_share_a_key_value_head(check, layout):
    one_head, half = {"num_query_groups": 1}, {"num_query_groups": layout.tp // 2}
    cases = [
        _case(3, "full", packed=True, **half, qk_layernorm=True, qkv_bias=True, key_shift="learned"),
        _case(2, "selective", overlap=True, **one_head, gate_input="hidden"),
        _case(2, "full", **half, **VARIANTS["norms on outputs"]),
    ]
    names = ["PLT-3, learned key shift", "PLT-2, hidden gate", "norms on outputs"]
    check(layout, cases, "ranks that share a key/value head", names)


# ---------------------------------------------------------------- what only pipelines have

MUP = {"mup_base_hidden_size": 8}


@layouts("PP2", slow="TP2 SP PP2, PP2 DP2, PP4, PP2 CP2")
def test_the_last_stages_copy_of_the_embedding_has_its_factors(check, layout):
    """With every optimizer, muP's rates and moving biases; untied, the last stage has a head of its own."""
    head = {**FACTORS, "lr_mult": RateFactors(embedding=4.0, head=0.25)}
    biases = replace(_expert_case(2, **BIASES), optimizer=FACTORS)
    cases = [
        Case(overlap=True, model=MUP, optimizer={**FACTORS, "name": "muon"}),
        Case(optimizer=FACTORS, step_loops=(1, 2)),
        Case(optimizer={**FACTORS, "name": "sgd", "lr": 0.05}),
        Case(model={**MUP, "share_embeddings_and_output_weights": False}, optimizer=head),
        *([biases] if layout.tp == 1 or layout.sp else []),
    ]
    names = ["Muon, muP", "AdamW, loops change", "SGD", "AdamW, muP, untied", "AdamW, experts"]
    check(layout, cases, "factors of the embedding", names[: len(cases)])


def test_factors_change_the_numbers(reference):
    wrong = differences(reference(Case(optimizer=FACTORS)), reference(Case()))
    assert wrong["embedding.word_embeddings.weight"] > 100 * TOLERANCE
    assert wrong["loss 0"] == 0 and wrong["loss 1"] > 5 * TOLERANCE


@layouts("PP2", slow="TP2 SP PP2")
def test_keys_of_later_loops_that_nothing_reads(check, layout):
    """Without a window, a later loop's stage computes and norms keys, and attends to the first loop's."""
    sharing = {"gated_window": False, "qk_layernorm": True}
    cases = [
        _case(3, "selective", overlap=True, **sharing),
        _case(2, "selective", overlap=True, packed=True, **sharing, share_values=False, qkv_bias=True),
    ]
    check(layout, cases, "keys that nothing reads", ["PLT-3", "PLT-2, own V"])


@pytest.mark.parametrize("coefficient", ["moe.aux_loss_coeff", "moe.z_loss_coeff"])
def test_auxiliary_losses_act_on_gradients(reference, coefficient):
    with_loss, without = reference(_expert_case(2)), reference(_case(2, **{**EXPERTS, coefficient: 0.0}))
    assert with_loss.numbers["loss 0"] == without.numbers["loss 0"]
    norms = [outcome.numbers["gradient norm 0"] for outcome in (with_loss, without)]
    assert abs(norms[0] - norms[1]) > 100 * TOLERANCE * norms[1]


# ---------------------------------------------------------------- the comparison would notice


def assert_numbers_differ(one: Outcome, other: Outcome) -> None:
    """In each step's gradient norm by a hundred times what is tolerated, and in the losses."""
    wrong = differences(one, other, final=False)
    norms, losses = ([wrong[f"{kind} {step}"] for step in range(STEPS)] for kind in ("gradient norm", "loss"))
    assert min(norms) > 100 * TOLERANCE and max(losses) > 10 * TOLERANCE, wrong


def test_gates_are_random_and_matter(reference):
    random = reference(_case(2))
    gates = {name: value for name, value in random.initial.items() if ".plt_gate." in name}
    assert len(gates) == 8  # weight and bias of four layers
    assert all(np.std(value) > 0.3 for value in gates.values())
    assert all(np.abs(random.final[name] - value).max() > 1e-4 for name, value in gates.items()), "they learn"
    assert_numbers_differ(reference(Case(2, zero_gates=True)), random)


CHANGES = {"window 4": {"window_size": 4}, "YaRN": YARN, **VARIANTS}
SLOW_CHANGES = CHANGES.keys() - {"window 4", "YaRN", *(variant for *_, variant in QUICK)}


@pytest.mark.parametrize(
    "changed",
    [(slow if name in SLOW_CHANGES else pytest.param)(settings, id=name) for name, settings in CHANGES.items()],
)
def test_each_switch_changes_the_numbers(reference, changed):
    assert_numbers_differ(reference(_case(2, **changed)), reference(_case(2)))


def test_packing_and_loop_counts_change_the_numbers(reference):
    base, packed = reference(_case(3)).numbers, reference(_case(3, packed=True)).numbers
    assert abs(base["loss 0"] - packed["loss 0"]) > 100 * TOLERANCE
    validation = [value for name, value in base.items() if name.startswith("validation")]
    assert len(validation) == 3
    assert min(abs(one - other) for one, other in itertools.combinations(validation, 2)) > 100 * TOLERANCE
