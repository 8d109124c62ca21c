"""What can be computed in FP8 on which card: each rule by what it says, and what `auto` means."""

from __future__ import annotations

import pytest
from test_validation import change, good

from plt_megatron.config.rules import fp8 as fp8_rules
from plt_megatron.config.rules.fp8 import ADA, BLACKWELL, HOPPER
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import find_problems

AMPERE, CONSUMER = (8, 0), (12, 0)


def fp8(**settings: object) -> RunConfig:
    return change(good(), **{"training__fp8__format": "hybrid", "model__backend": "te", **settings})


def problems(capability: tuple[int, int] | None = None, **settings: object) -> list[str]:
    return find_problems(fp8(**settings), check_files=False, capability=capability)


ATTENTION = {"training__fp8__attention": True, "model__kv_channels": 128}


@pytest.mark.parametrize(
    ("capability", "settings", "recipe"),
    [
        (ADA, {}, "tensorwise"),
        (HOPPER, {}, "tensorwise"),
        (HOPPER, ATTENTION, "delayed"),
        (BLACKWELL, {}, "mxfp8"),
        ((10, 3), ATTENTION, "mxfp8"),
        (CONSUMER, {}, "tensorwise"),
        (HOPPER, {"training__fp8__recipe": "blockwise"}, "blockwise"),
        (BLACKWELL, {"training__fp8__recipe": "delayed"}, "delayed"),
    ],
)
def test_the_recipe_follows_from_the_card(capability, settings, recipe):
    choice = fp8_rules.choose(fp8(**settings), capability)
    assert choice is not None and choice.recipe == recipe
    assert problems(capability, **settings) == []


def test_nothing_is_chosen_without_fp8():
    assert fp8_rules.choose(good(), HOPPER) is None
    assert list(fp8_rules.find_problems(good(), AMPERE)) == []


def test_the_choice_in_words():
    choice = fp8_rules.choose(fp8(**ATTENTION), HOPPER)
    assert choice is not None
    words = "linear layers in FP8 (hybrid, recipe delayed), global attention in FP8, window in BF16"
    assert fp8_rules.in_words(choice) == words


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__backend": "torch"}, "training.fp8 needs Transformer Engine: set model.backend=te"),
        ({"training__precision": "fp32"}, "FP8 kernels read and write bf16"),
        ({"training__fp8__recipe": "blockwise", **ATTENTION}, "recipe blockwise: no card has a kernel"),
        (
            {"training__fp8__recipe": "delayed", "parallel__recompute_granularity": "full"},
            "core_attn alone is possible); set training.fp8.recipe=tensorwise",
        ),
        (
            {**ATTENTION, "parallel__recompute_granularity": "selective"},
            "attention would be recomputed in BF16; set parallel.recompute_granularity=none",
        ),
        ({"data__reset_at_document_boundaries": True, **ATTENTION}, "no kernel for packed documents"),
        (
            {"parallel__context_parallel_size": 2, "parallel__cp_comm_type": "all_gather", **ATTENTION},
            "cp_comm_type all_gather: use p2p or a2a",
        ),
        ({"model__ffn_hidden_size": 392}, "model.ffn_hidden_size / tensor 1 is 392, must be a multiple of 16"),
        ({"data__sequence_length": 1028}, "tokens of a microbatch on one rank is 1028, must be a multiple of 8"),
        ({"training__fp8__recipe": "mxfp8", "model__hidden_size": 144}, "model.hidden_size is 144, must be a multiple"),
    ],
)
def test_what_no_card_does_is_refused_without_knowing_the_card(settings, expected):
    found = problems(**settings)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(
    ("capability", "settings", "expected"),
    [
        (AMPERE, {}, "sm80 has no FP8 units"),
        (HOPPER, {"training__fp8__recipe": "mxfp8"}, "mxfp8 needs Blackwell (sm100), sm90 has no kernel"),
        (CONSUMER, {"training__fp8__recipe": "mxfp8"}, "mxfp8 needs Blackwell (sm100), sm120 has no kernel"),
        (ADA, {"training__fp8__recipe": "blockwise"}, "blockwise needs Hopper or newer, sm89"),
        (ADA, ATTENTION, "training.fp8.attention in training has no kernel on sm89"),
        (CONSUMER, ATTENTION, "training.fp8.attention in training has no kernel on sm120"),
        (
            HOPPER,
            {**ATTENTION, "training__fp8__recipe": "tensorwise"},
            "recipe tensorwise needs Blackwell; on sm90 use delayed",
        ),
        (
            BLACKWELL,
            {**ATTENTION, "training__fp8__recipe": "tensorwise", "parallel__recompute_granularity": "full"},
            "a loop would be recomputed with another loop's scales; use mxfp8",
        ),
        (
            HOPPER,
            {**ATTENTION, "model__kv_channels": 64},
            "on sm90 needs a head dimension of 128, but model.kv_channels is 64",
        ),
    ],
)
def test_what_a_card_does_not_is_refused_by_name(capability, settings, expected):
    found = problems(capability, **settings)
    assert any(expected in line for line in found), found
    assert all(len(line.splitlines()) == 1 for line in found)


def test_sequence_and_context_parallel_ranks_share_the_tokens():
    layout = {"parallel__context_parallel_size": 2, "data__sequence_length": 24}
    assert any("one rank is 12" in line for line in problems(**layout))
    assert problems(**layout, training__micro_batch_size=2) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"training__fp8__recipe": "tensorwise", "parallel__recompute_granularity": "full"},
        {"training__fp8__recipe": "delayed", "parallel__recompute_granularity": "full", "model__loop_count": 1},
        {"training__fp8__recipe": "delayed", "parallel__recompute_granularity": "selective"},
    ],
    ids=str,
)
def test_recomputation_in_fp8_where_it_computes_the_same(settings):
    assert problems(HOPPER, **settings) == []


def test_recipe_auto_is_delayed_where_hopper_computes_attention_in_fp8():
    lines = problems(HOPPER, **ATTENTION, parallel__recompute_granularity="full")
    assert len(lines) == 1 and "another loop's scales" in lines[0]
