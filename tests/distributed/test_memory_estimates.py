"""Memory on paper against memory measured, to 10 %, for layouts, recomputation and loop counts.

The end of the test run prints the table. How it is measured: memory_jobs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from plt_megatron.config.schema import (
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from plt_megatron.predict.layout import estimate_layout, passes
from plt_megatron.predict.memory import checkpoint_bytes, estimate_memory
from plt_megatron.predict.step import Step
from tests.distributed.cases import ENDS, Layout
from tests.distributed.memory_jobs import allocator_peak, checkpoint_size, measure_all, megatron_schedule
from tests.distributed.params import slow
from tests.settings import make

TOLERANCE = 0.10
VOCAB_SIZE = 500


def run_config(
    words: str = "TP1",
    loops: int = 2,
    recompute: str = "none",
    precision: str = "fp32",
    packed: bool = False,
    zero: int = 0,
    losses: list[float] | None = None,
    stages: dict[str, Any] | None = None,
    **model: Any,
) -> RunConfig:
    """A model of 0.8M parameters, whose activations take about twice what its training state takes, in a layout.

    `zero`: DeepSpeed's stage; 0: megatron-core's engine. `losses`: weights of the earlier loops'. `stages`: settings of
    an uneven pipeline. Further settings are the model's.
    """
    layout = Layout.of(words)
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 352,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "window_size": 16,
        "vocab_size": VOCAB_SIZE,
        "backend": "torch",
    }
    return RunConfig(
        model=make(ModelConfig, {**sizes, "loop_count": loops, **model}),
        data=DataConfig(sequence_length=128, reset_at_document_boundaries=packed),
        training=TrainingConfig(
            micro_batch_size=2,
            global_batch_size=4 * layout.pp * layout.dp,
            train_iters=10,
            precision=precision,  # type: ignore[arg-type]
            loop_loss_weights=losses or [],
        ),
        parallel=ParallelConfig(
            **layout.settings,
            data_parallel_size=layout.dp,
            recompute_granularity=recompute,  # type: ignore[arg-type]
            **(stages or {}),
        ),
        deepspeed=DeepSpeedConfig(zero, config={"zero_optimization": {"reduce_bucket_size": 100_000}})
        if zero
        else None,
    )


EXPERTS = {"moe.num_experts": 4, "moe.ffn_hidden_size": 176}
LAST_LOOP = {"share_kv": False, "gated_window": False, "full_attention": "last_loop"}
ONE_GROUP = {"num_query_groups": 1}
UNEVEN = {"stages": {"num_layers_in_first_pipeline_stage": 3}}
DENSE_FIRST = {**EXPERTS, "moe.first_k_dense_replace": 1, "moe.shared_expert_intermediate_size": 96}
# Layout, and what is run in it.
CASES: list[Any] = [
    (
        "TP1",
        [
            {"recompute": "full"},
            {"precision": "bf16", "gate_input": "hidden", "qk_layernorm": True, "norm_placement": "pre_ffn_output"},
            {"num_layers": 1, "loops": 3, "loop_norm": "rms", "learned_hidden_scale": "channel"},
            {**LAST_LOOP, "loops": 3},
        ],
    ),
    slow(
        "TP1",
        [
            {"loops": 1},
            {},
            {"loops": 3},
            {"recompute": "selective"},
            {"precision": "bf16"},
            {"precision": "bf16", "recompute": "full", "packed": True},
            {"gated_window": False, "share_kv": False, "share_embeddings_and_output_weights": False},
        ],
    ),
    slow(
        "TP1",
        [
            {"loop_span": [1, 3], "loops": 3, "key_shift": "channels"},
            {"key_shift": "learned"},
            {"key_shift": "learned", "gated_window": False, "precision": "bf16", "packed": True},
            {"loop_span": [1, 3], "recompute": "full", "precision": "bf16", "gate_input": "hidden"},
            {"loop_span": [0, 2], "share_kv": False, "gated_window": False},
            {"share_values": False, "loops": 3},
            {"share_values": False, "gated_window": False, "loops": 3},
            {"share_values": False, "recompute": "full", "precision": "bf16"},
            {"cross_loop_parallel": False, "loop_order": "layer", "loops": 3},
            {"cross_loop_parallel": False, "loop_order": "layer", "loop_span": [1, 4], "recompute": "full"},
        ],
    ),
    slow(
        "TP1",
        [
            LAST_LOOP,
            {**LAST_LOOP, "recompute": "selective", "precision": "bf16", "loops": 3},
            {**LAST_LOOP, "recompute": "full", "packed": True},
            {**LAST_LOOP, "loop_span": [1, 3], "key_shift": "heads"},
        ],
    ),
    slow("CP2", [{**LAST_LOOP, "loops": 3}]),
    slow("PP2", [{**LAST_LOOP, "loops": 3}]),
    slow("TP2", [{}]),
    slow("TP2 SP", [{}]),
    slow("TP2 SP", [{"recompute": "full", "loops": 3}]),
    slow("TP2 SP", [ONE_GROUP, {**ONE_GROUP, "recompute": "full", "precision": "bf16"}]),
    slow("TP4 SP", [{}, {"share_kv": False, "gated_window": False}]),
    slow("PP2", [{}, {"loops": 3, "recompute": "full"}]),
    slow("PP2", [{"loops": 1}]),
    slow("PP2", [{"losses": [0.5]}, {"losses": [0.5, 0.5], "loops": 3, "recompute": "full"}]),
    slow("PP4", [{"losses": [0.5], "precision": "bf16"}]),
    slow("DP2", [{"zero": 2, "losses": [0.5]}]),
    slow("PP2", [UNEVEN, {**UNEVEN, "recompute": "full"}]),
    slow("PP4", [{"stages": ENDS, "num_layers": 2}]),
    slow("DP2", [{"precision": "bf16"}]),
    ("DP2", [{"zero": 1, "precision": "bf16"}]),
    slow("DP2", [{"zero": 2, "recompute": "full", "precision": "bf16"}]),
    slow("DP2", [{"zero": 3}]),
    slow("DP2", [{"zero": 3, "precision": "bf16"}]),
    ("CP2", [{"precision": "bf16", "recompute": "selective"}]),
    slow("CP2", [{}]),
    slow("TP2 SP PP2", [{}]),
    ("TP1", [EXPERTS]),
    slow("TP1", [{**EXPERTS, "loops": 3, "recompute": "full"}, {**EXPERTS, "precision": "bf16"}]),
    slow("DP2 EP2", [EXPERTS]),
    slow("TP1", [DENSE_FIRST, {**DENSE_FIRST, "recompute": "full", "loops": 3}]),
    slow("PP2", [{**DENSE_FIRST, "moe.first_k_dense_replace": 2}]),
]


def name_of(changes: dict[str, Any]) -> str:
    """Name a case, as in `L2 full bf16`."""
    words = [f"L{changes.get('loops', 2)}", changes.get("recompute", "none"), changes.get("precision", "fp32")]
    words += [f"ZeRO {changes.get('zero')}"] * ("zero" in changes)
    model = set(changes) - {"loops", "recompute", "precision", "packed", "losses", "zero", "stages", *EXPERTS}
    words += ["experts"] * ("moe.num_experts" in changes) + ["losses"] * ("losses" in changes)
    return " ".join(words + ["packed"] * changes.get("packed", False) + ["model variant"] * bool(model))


@pytest.mark.parametrize(
    ("layout", "cases"), CASES, ids=lambda value: value if isinstance(value, str) else "; ".join(map(name_of, value))
)
def test_memory_is_within_a_tenth_of_what_is_measured(request, record_property, layout, cases):
    deepspeed = any("zero" in changes for changes in cases)
    run_distributed = request.getfixturevalue("run_deepspeed" if deepspeed else "run_distributed")
    configs = [run_config(layout, **changes) for changes in cases]
    sizes = estimate_layout(configs[0], on_cpu=True)
    by_rank = run_distributed(measure_all, sizes.world_size, configs, VOCAB_SIZE, all_ranks=True)
    wrong = []
    for index, (config, changes) in enumerate(zip(configs, cases, strict=True)):
        for estimate in estimate_memory(Step.of(config, estimate_layout(config, on_cpu=True), VOCAB_SIZE)):
            ranks = (measured[index] for measured in by_rank)
            worst = max(rank.peak for rank in ranks if rank.stage == estimate.stage)
            row = f"{sizes}, {name_of(changes)}" + (f", stage {estimate.stage}" if sizes.pipeline > 1 else "")
            record_property("memory", [row, worst, estimate.total_bytes])
            if abs(estimate.total_bytes / worst - 1) > TOLERANCE:
                wrong.append(f"{row}: estimated {estimate.total_bytes:,}, measured {worst:,} ({estimate})")
    assert not wrong, "\n".join(wrong)


def test_two_ways_to_measure_agree(run_distributed):
    """Storages counted operation by operation, and every allocation of torch's CPU allocator."""
    config = run_config(precision="bf16")
    counted = run_distributed(measure_all, 1, [config], VOCAB_SIZE, True)[0]
    allocated = run_distributed(allocator_peak, 1, config, VOCAB_SIZE)
    assert counted.peak == pytest.approx(allocated, rel=0.01)
    assert counted.between_steps > 10e6 > 1e5 > counted.released, "releases are seen"


def test_what_is_held_between_steps_is_arithmetic(run_distributed):
    """Weights, main weights, gradients and moments of 0.77M parameters in bf16: 18 bytes each."""
    config = run_config(precision="bf16")
    (estimate,) = estimate_memory(Step.of(config, estimate_layout(config, on_cpu=True), VOCAB_SIZE))
    measured = run_distributed(measure_all, 1, [config], VOCAB_SIZE)[0]
    state = sum(estimate.components[name] for name in ("weights", "main weights", "gradients", "optimizer state"))
    assert state == pytest.approx(measured.between_steps, rel=0.01)


def test_a_checkpoint_is_as_large_as_estimated(run_distributed, tmp_path):
    for precision in ("fp32", "bf16"):
        config = run_config(precision=precision, hidden_size=256)
        size = run_distributed(checkpoint_size, 1, config, VOCAB_SIZE, str(tmp_path / precision))
        assert checkpoint_bytes(config, VOCAB_SIZE) == pytest.approx(size, rel=0.03), precision


@pytest.mark.parametrize(("pipeline", "loops", "microbatches"), [(2, 2, 4), (4, 2, 4), (4, 3, 8), (2, 4, 6)])
def test_the_schedule_is_megatrons(run_distributed, pipeline, loops, microbatches):
    """The order of forward passes and the passes before the first backward, against megatron-core's functions."""
    order, warmups = run_distributed(megatron_schedule, 1, pipeline, loops, microbatches)
    for stage, warmup in zip(range(pipeline), warmups, strict=True):
        ours = passes(pipeline, stage, loops, microbatches)
        assert [(each.microbatch, each.loop - 1) for each in ours if not each.backward] == order
        assert len(list(_until_backward(ours))) == min(warmup + 1, loops * microbatches)
        done = {(each.microbatch, each.loop) for each in ours if each.backward}
        assert len(done) == loops * microbatches == len(ours) / 2


def _until_backward(ours: list[Any]) -> Iterator[Any]:
    for each in ours:
        if each.backward:
            return
        yield each
