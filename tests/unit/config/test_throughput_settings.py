"""Megatron-LM's throughput switches: what is refused, by name and with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from plt_megatron.config import derived
from plt_megatron.config.fields import REFUSED
from plt_megatron.config.loader import load_config
from plt_megatron.config.rules import fp8 as fp8_rules
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError

RUN = "configs/runs/plt2_1b.yaml"
TE_FP8 = ["model.backend=te", "training.fp8.format=hybrid", "training.fp8.recipe=tensorwise"]
ENDS = ["training.fp8.num_layers_at_start_in_bf16=1", "training.fp8.num_layers_at_end_in_bf16=1"]


def problems(*settings: str, **kwargs: Any) -> str:
    config = load_config(RUN, ["parallel.overlap_grad_reduce=false", *settings])
    return "\n".join(find_problems(config, check_files=False, have_te=True, **kwargs))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["model.backend=torch", "parallel.gradient_accumulation_fusion=true"],
            "parallel.gradient_accumulation_fusion needs Transformer Engine (model.backend=te)",
        ),
        (
            ["data.reset_at_document_boundaries=true", "parallel.apply_rope_fusion=true"],
            "parallel.apply_rope_fusion with data.reset_at_document_boundaries",
        ),
        (
            ["deepspeed={}", "parallel.cross_entropy_loss_fusion=true"],
            "parallel.cross_entropy_loss_fusion is not verified with deepspeed",
        ),
        (
            ["training.deterministic=true", "parallel.cross_entropy_loss_fusion=true"],
            "parallel.cross_entropy_loss_fusion with training.deterministic",
        ),
        (
            ["deepspeed={}", "parallel.overlap_param_gather=true"],
            "parallel.overlap_param_gather is not verified with deepspeed",
        ),
        (
            ["parallel.overlap_param_gather=true"],
            "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true",
        ),
        (
            [
                "parallel.overlap_grad_reduce=true",
                "parallel.overlap_param_gather=true",
                "model.fused_gated_window=true",
            ],
            "parallel.overlap_param_gather with model.fused_gated_window",
        ),
        (
            ["parallel.recompute_granularity=selective", "parallel.recompute_modules=[shared_experts]"],
            "parallel.recompute_modules shared_experts: it needs model.moe.shared_expert_intermediate_size",
        ),
        (
            ["parallel.recompute_granularity=selective", "parallel.recompute_modules=[mlp,mlp]"],
            "parallel.recompute_modules ['mlp', 'mlp'] names something twice",
        ),
        (
            [*TE_FP8, "training.fp8.recipe=delayed", "parallel.recompute_granularity=selective"]
            + ["parallel.recompute_modules=[mlp]"],
            "a loop would be recomputed with another loop's scales",
        ),
        (
            [*TE_FP8, "training.fp8.recipe=delayed", "training.fp8.num_layers_at_start_in_bf16=1"],
            "training.fp8.recipe delayed with training.fp8.num_layers_at_start_in_bf16",
        ),
        (
            [*TE_FP8, "training.fp8.num_layers_at_end_in_bf16=17"],
            "training.fp8.num_layers_at_end_in_bf16 17 is more than the 16 layers",
        ),
        (
            [*TE_FP8, "training.fp8.num_layers_at_start_in_bf16=8", "training.fp8.num_layers_at_end_in_bf16=8"],
            "training.fp8.num_layers_at_end_in_bf16 8: none of 16 layers is left in FP8",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(settings, expected):
    assert expected in problems(*settings)


def test_what_fits_is_not():
    fusions = ["parallel.apply_rope_fusion=true", "data.reset_at_document_boundaries=false"]
    assert problems(*TE_FP8, *ENDS, *fusions) == ""
    modules = ["parallel.recompute_granularity=selective", "parallel.recompute_modules=[core_attn,mlp]"]
    assert problems(*TE_FP8, *modules) == ""
    assert problems("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true") == ""


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_settings_of_megatron_lm_that_are_none_here_say_why(name):
    with pytest.raises(UserError, match=f"parallel.{name} is not supported: .*; leave it out"):
        load_config(RUN, [f"parallel.{name}=true"])


def test_gathering_overlaps_where_the_reduction_does():
    config = RunConfig()
    assert not derived.overlap_param_gather(config)
    config.parallel.overlap_grad_reduce = True
    assert derived.overlap_param_gather(config)
    config.parallel.overlap_param_gather = False
    assert not derived.overlap_param_gather(config)


def test_the_choice_of_fp8_names_the_layers_that_are_not():
    config = load_config(RUN, [*TE_FP8, *ENDS])
    choice = fp8_rules.choose(config, (9, 0))
    assert choice is not None and fp8_rules.in_words(choice).endswith("the first 1 and last 1 layers in BF16")
