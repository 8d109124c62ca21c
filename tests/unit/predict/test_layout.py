"""Layouts as words: what reports print is what --layout reads."""

from __future__ import annotations

import dataclasses

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.errors import UserError
from plt_megatron.predict.layout import Layout, estimate_layout, layout_overrides
from plt_megatron.predict.search import search

RUN = "configs/runs/loopcoder_7b.yaml"
NO_OVERLAP = "parallel.overlap_grad_reduce=false"  # DeepSpeed has none


LONG = pytest.param(["data.sequence_length=32768"], marks=pytest.mark.slow)


@pytest.mark.parametrize("overrides", [[], ["deepspeed={}", NO_OVERLAP], LONG], ids=str)
def test_every_layout_reads_as_it_is_printed(overrides):
    overrides = [*overrides, "training.global_batch_size=16"]  # few micro batches
    found = search(load_config(RUN, overrides), gpu="h200", world_size=16, gpus_per_node=8)
    assert len(found.fitting) > 20
    for each in found.fitting[:: len(found.fitting) // 20]:
        layout = each.estimate.layout
        text = f"{layout} MB{layout.micro_batch_size} {layout.recompute}"
        again = estimate_layout(load_config(RUN, [*overrides, *layout_overrides(text)]), 16)
        assert again == layout, text


def test_words_in_any_order_and_case():
    assert layout_overrides("sp, tp2,full") == [
        "parallel.sequence_parallel=true",
        "parallel.tensor_model_parallel_size=2",
        "parallel.recompute_granularity=full",
        "parallel.pipeline_model_parallel_size=1",
        "parallel.context_parallel_size=1",
    ]
    deepspeed = layout_overrides("TP1 ZeRO3 offload")
    assert {"deepspeed.zero_stage=3", "deepspeed.offload_optimizer=cpu"} <= set(deepspeed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TP2 XP4", "XP4 is not known"),
        ("TP", "TP is not known"),
        ("TP2x", "TP2X is not known"),
        ("TP2 TP4", "TP4 sets parallel.tensor_model_parallel_size a second time"),
        ("SP SP", "SP sets parallel.sequence_parallel a second time"),
        ("none full", "FULL sets parallel.recompute_granularity a second time"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message):
        layout_overrides(text)


def test_what_is_printed():
    layout = Layout(tensor=2, sequence_parallel=True, pipeline=4, context=2, data=8)
    assert str(layout) == "TP2 SP PP4 CP2 DP8" and layout.world_size == 128 and layout.shards == 16
    offloaded = dataclasses.replace(layout, pipeline=1, context=1, deepspeed=True, zero_stage=3, offload_optimizer=True)
    assert str(offloaded) == "TP2 SP PP1 DP8 ZeRO3 offload"
