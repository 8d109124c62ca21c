"""Proposed layouts: valid, fitting, in order, and a clear answer where there are none."""

from __future__ import annotations

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.predict import search as searching
from plt_megatron.predict.run_estimate import estimate_run
from plt_megatron.predict.search import search
from tests.running import ROOT

RUN = ROOT / "configs/runs/loopcoder_7b.yaml"


@pytest.fixture(scope="module")
def found():
    return search(load_config(RUN), gpu="h100", world_size=64, gpus_per_node=8)


def test_what_is_proposed_is_valid_and_fits(found):
    assert len(found.fitting) > 20 and found.accepted <= found.tried
    for each in found.fitting:
        overrides = each.command_line.split()
        config = load_config(RUN, overrides)
        assert not find_problems(config, world_size=64, check_files=False)
        assert each.estimate.world_size == 64 and each.estimate.fits
        assert each.estimate.peak_memory_bytes < each.estimate.device_memory_bytes
        assert 0 <= sum(share for _, share in each.overheads) < 1


def test_the_best_comes_first_and_every_kind_is_tried(found):
    seconds = [each.estimate.step_seconds for each in found.fitting]
    assert seconds == sorted(seconds)
    layouts = [each.estimate.layout for each in found.fitting]
    for field, values in (
        ("tensor", {2, 4, 8}),
        ("pipeline", {1, 2}),
        ("sequence_parallel", {True, False}),
        ("recompute", {"none", "selective", "full"}),
    ):
        assert values <= {getattr(layout, field) for layout in layouts}, field
    assert all(layout.tensor <= 8 for layout in layouts), "tensor parallelism stays within a node"


def test_the_shipped_layout_is_among_them(found):
    config = load_config(RUN)
    same = [
        each
        for each in found.fitting
        if each.estimate.layout.tensor == config.parallel.tensor_model_parallel_size
        and each.estimate.layout.recompute == "full"
        and each.estimate.layout.micro_batch_size == 1
    ]
    assert same


def test_experts_are_shared_out():
    config = load_config(ROOT / "configs/runs/plt2_moe_1b_7b.yaml", ["training.global_batch_size=16"])
    found = search(config, gpu="h100", world_size=16, gpus_per_node=8)
    layouts = [each.estimate.layout for each in found.fitting]
    assert {1, 2, 8, 16} <= {layout.expert for layout in layouts}
    assert all(layout.sequence_parallel for layout in layouts if layout.tensor > 1)
    by_experts = {each.estimate.layout.expert: each.estimate for each in found.fitting if _plain(each)}
    assert by_experts[8].peak_memory_bytes < by_experts[1].peak_memory_bytes
    assert "expert parallel" in by_experts[8].communication and "expert parallel" not in by_experts[1].communication


def _plain(candidate):
    layout = candidate.estimate.layout
    return (layout.tensor, layout.pipeline, layout.recompute, layout.micro_batch_size) == (1, 1, "full", 1)


def test_long_sequences_are_shared_out():
    config = load_config(RUN, ["data.sequence_length=131072", "data.reset_at_document_boundaries=false"])
    found = search(config, gpu="h100", world_size=64, gpus_per_node=8)
    assert not [each for each in found.fitting if _refused_by_transformer_engine(config, each)]
    contexts = {each.estimate.layout.context for each in found.fitting}
    assert {2, 4, 8, 16} <= contexts and max(contexts) == 32, "4,096 tokens a rank are left"
    assert found.fitting[0].estimate.layout.context > 1


def test_packed_documents_are_exchanged_as_transformer_engine_can():
    """By heads, of which there are eight."""
    config = load_config(ROOT / "configs/runs/plt2_1b.yaml", ["data.sequence_length=32768"])
    config.training.global_batch_size = 16
    found = search(config, gpu="h100", world_size=8, gpus_per_node=8, vocab_size=100278)
    assert {2, 4, 8} <= {each.estimate.layout.context for each in found.fitting}
    assert not [each for each in found.fitting if _refused_by_transformer_engine(config, each)]


def _refused_by_transformer_engine(config, candidate):
    changed, ranks = searching._changed(config, candidate.overrides), candidate.estimate.world_size
    return find_problems(changed, world_size=ranks, check_files=False, have_te=True, capability=(9, 0))


def test_deepspeeds_stages_are_tried():
    config = load_config(RUN, ["deepspeed={}", "parallel.overlap_grad_reduce=false", "training.global_batch_size=16"])
    found = search(config, gpu="h100", world_size=8, gpus_per_node=8)
    layouts = [each.estimate.layout for each in found.fitting]
    ways = {(layout.zero_stage, layout.offload_optimizer, layout.offload_weights) for layout in layouts}
    assert len(ways) == 7 and all(layout.pipeline == layout.context == 1 for layout in layouts)
    best = load_config(RUN, ["deepspeed={}", *found.fitting[0].command_line.split()])
    best.parallel.overlap_grad_reduce = False
    assert not find_problems(best, world_size=8, check_files=False)
    assert not layouts[0].offload_optimizer, "where all fits, nothing is offloaded"


def test_what_is_not_estimated_would_not_fit(monkeypatch):
    config, estimated = load_config(RUN, ["model.backend=torch"]), []
    monkeypatch.setattr(searching, "estimate_run", lambda *args, **kw: estimated.append(1) or estimate_run(*args, **kw))
    found = search(config, gpu="a100-40gb", world_size=16, gpus_per_node=8)
    fitting = [
        overrides
        for overrides in searching._layouts(config, 16, 8)
        if estimate_run(searching._changed(config, overrides), gpu="a100-40gb", world_size=16).fits
    ]
    assert found.accepted == found.tried and len(found.fitting) < len(estimated) < found.accepted
    assert sorted(map(str, fitting)) == sorted(str(each.overrides) for each in found.fitting)


def test_where_nothing_fits_the_nearest_is_named():
    result = search(load_config(RUN), gpu="l4", world_size=1, gpus_per_node=1)
    assert result.fitting == [] and result.accepted > 0
    assert result.nearest is not None and not result.nearest.estimate.fits
    assert result.nearest.estimate.layout.recompute == "full"


def test_tensor_groups_do_not_cross_nodes():
    config = load_config(RUN, ["model.num_attention_heads=24", "training.global_batch_size=96"])
    assert {sizes[0] for sizes in searching._sizes(config, 24, 8)} == {1, 2, 4, 8}
    assert {3, 6} <= {sizes[0] for sizes in searching._sizes(config, 6, 8)}, "all in one node"


def test_settings_that_no_layout_mends_are_named():
    config = load_config(RUN)
    config.parallel.pipeline_model_parallel_size = 0
    with pytest.raises(UserError, match="pipeline_model_parallel_size must be at least 1"):
        search(config, gpu="h100", world_size=8, gpus_per_node=8)


def test_where_nothing_is_valid_the_reason_is_kept():
    config = load_config(RUN, ["model.num_query_groups=7"])
    result = search(config, gpu="h100", world_size=8, gpus_per_node=8)
    assert result.nearest is None and result.accepted == 0 < result.tried
    assert any("num_query_groups 7" in problem for problem in result.problems)
    assert search(load_config(RUN), gpu="h100", world_size=3, gpus_per_node=8).tried == 0
