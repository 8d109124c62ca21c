"""A whole run on paper: traffic and state by hand, and how figures move with the layout."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import (
    BatchStage,
    DataConfig,
    DeepSpeedConfig,
    LoopStage,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from plt_megatron.errors import UserError
from plt_megatron.predict.held import Held, count_rank_parameters
from plt_megatron.predict.layout import bubble_fraction, enough_microbatches, estimate_layout, passes
from plt_megatron.predict.memory import persistent_bytes
from plt_megatron.predict.parameters import Weights, count_parameters
from plt_megatron.predict.run_estimate import estimate_run
from tests.running import ROOT
from tests.settings import changed, make

MODEL = ModelConfig(
    num_layers=8, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8, num_query_groups=4,
    vocab_size=1000, loop_count=2, window_size=32,
)  # fmt: skip


def run(model=None, training=None, **parallel) -> RunConfig:
    return RunConfig(
        model=changed(MODEL, model or {}),
        data=DataConfig(sequence_length=256),
        training=make(
            TrainingConfig, {"micro_batch_size": 1, "global_batch_size": 32, "train_iters": 7, **(training or {})}
        ),
        parallel=ParallelConfig(**parallel),
    )


def stage_peaks(config, **arguments):
    return [stage.total_bytes for stage in estimate_run(config, **arguments).memory]


# What is arithmetic.


def test_sizes_of_the_whole_run():
    estimate = estimate_run(run(), world_size=4)
    assert estimate.tokens == 7 * 32 * 256 and estimate.world_size == 4
    assert estimate.parameters_total == estimate.parameters_active == count_parameters(MODEL).total
    assert estimate.parameters_embedding == 1024 * 512
    assert estimate.total_flops == estimate.flops_per_token * estimate.tokens
    assert estimate.checkpoint_bytes == 14 * estimate.parameters_total
    assert estimate.total_seconds == pytest.approx(7 * estimate.step_seconds)
    assert estimate.gpu_hours == pytest.approx(4 * estimate.total_seconds / 3600)
    assert estimate.layout.data == 4 and estimate.layout.microbatches == 8


LOOPS = [LoopStage(3 / 7, 1), LoopStage(loop_count=2)]
BATCHES = {"batch_schedule": [BatchStage(3 * 32 * 256, 32)], "global_batch_size": 96}


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2}], ids=str)
@pytest.mark.parametrize(
    ("whole", "first", "second", "tolerance"),
    [
        # Two loops' gates are reduced in all steps.
        (({}, {"loop_schedule": LOOPS}), ({"loop_count": 1}, {}), ({}, {}), 2e-3),
        (({}, BATCHES), ({}, {"global_batch_size": 32}), ({}, {"global_batch_size": 96}), 1e-6),
    ],
    ids=["loops", "batches"],
)
def test_a_run_of_two_stages_costs_what_each_of_them_costs(whole, first, second, tolerance, layout):
    """Of seven steps three are the first stage's. Memory is the larger one's."""
    both, one, two = (
        estimate_run(run(model, training, **layout), world_size=8) for model, training in (whole, first, second)
    )
    costs = ["tokens", "flops_per_token", "total_flops", "step_seconds", "total_seconds", "gpu_hours"]
    for name in (*costs, "bubble_fraction"):
        expected = (3 * getattr(one, name) + 4 * getattr(two, name)) / 7
        assert getattr(both, name) == pytest.approx(expected, rel=tolerance), name
    sent = {name: (3 * amount + 4 * two.communication[name]) / 7 for name, amount in one.communication.items()}
    assert both.communication == pytest.approx(sent, rel=tolerance)
    assert both.peak_memory_bytes == two.peak_memory_bytes >= one.peak_memory_bytes
    assert both.parameters_total == two.parameters_total


def test_gates_are_trained_in_a_schedule_that_has_steps_without_them():
    whole = {"train_iters": 10, "trainable": ["plt_gate"]}
    halves = estimate_run(run(training={**whole, "loop_schedule": [LoopStage(0.5, loop_count=1)]}))
    looped = estimate_run(run(training=whole))
    assert 0 < halves.step_seconds < looped.step_seconds and halves.checkpoint_bytes == looped.checkpoint_bytes
    with pytest.raises(UserError, match="'plt_gate' matches no parameter"):
        estimate_run(run({"loop_count": 1}, whole))


def test_a_loss_on_another_loop_is_another_output_layer():
    plain, both = (
        estimate_run(run(training={"loop_loss_weights": weights}), gpu="h100", world_size=1) for weights in ([], [0.5])
    )
    assert both.flops.output == 2 * plain.flops.output and both.flops.looped == pytest.approx(plain.flops.looped)
    softmax = 256 * 1024 * 4  # probabilities of a microbatch's tokens, in fp32
    assert both.peak_memory_bytes - plain.peak_memory_bytes == pytest.approx(softmax, rel=0.6)
    assert both.step_seconds > plain.step_seconds


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gate", ["query", "hidden"])
def test_ranks_together_hold_the_model(tied, gate):
    """Slices add up; what is whole on every tensor-parallel rank, and a tied embedding's copy, comes on top."""
    model = dataclasses.replace(MODEL, share_embeddings_and_output_weights=tied, gate_input=gate)
    whole = count_parameters(model)
    one = count_rank_parameters(Weights(model, 1024), ParallelLayout())
    assert one.total == whole.total
    stages = [count_rank_parameters(Weights(model, 1024), ParallelLayout(pipeline=4), stage) for stage in range(4)]
    copy = whole.embedding if tied else 0
    assert sum(stage.total for stage in stages) == whole.total + copy
    halves = 2 * count_rank_parameters(Weights(model, 1024), ParallelLayout(tensor=2)).total
    replicated = whole.norms + whole.final_norm + (whole.gates if gate == "hidden" else 0)
    assert halves == whole.total + replicated


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "bf16", 2 + 4 + 4 + 8),
        (1, "bf16", 2 + 4 + (4 + 8) / 8),
        (2, "bf16", 2 + (4 + 4 + 8) / 8),
        (3, "bf16", (2 + 4 + 4 + 8) / 8 + 2),  # weights are whole while they are used
        (1, "fp32", 4 + 4 + 8 / 8),
    ],
)
def test_zero_stages_per_parameter(stage, precision, expected):
    layout = dataclasses.replace(estimate_layout(run(), 8), zero_stage=stage)
    config, eight = RunConfig(training=TrainingConfig(precision=precision)), Held(8_000_000, layout.shards)
    held = persistent_bytes(eight, config, layout)
    assert sum(held.values()) == 8_000_000 * expected
    offloaded = persistent_bytes(eight, config, dataclasses.replace(layout, offload_optimizer=True))
    assert offloaded["optimizer state"] == offloaded["main weights"] == 0
    assert offloaded["gradients"] == (held["gradients"] if stage < 2 else 0), "they go along from stage 2 on"


def test_a_moving_average_costs_a_share_of_fp32_and_as_much_on_disk():
    plain, averaged = run(), run(training={"ema_decay": 0.999})
    layout = estimate_layout(plain, 4)
    held = persistent_bytes(Held(8_000_000, 4), averaged, layout)
    assert held.pop("weight average") == 8_000_000 * 4 / 4
    without = persistent_bytes(Held(8_000_000, 4), plain, layout)
    assert without.pop("weight average") == 0 and without == held
    assert estimate_run(averaged, world_size=4).checkpoint_bytes == 18 * count_parameters(MODEL).total
    more = stage_peaks(averaged, world_size=4)[0] - stage_peaks(plain, world_size=4)[0]
    assert more == pytest.approx(count_parameters(MODEL).total, rel=0.01)


def test_traffic_by_hand():
    row = 256 * 512 * 2  # one microbatch's hidden states in bf16
    tensor = estimate_run(run(tensor_model_parallel_size=2)).communication
    # 32 microbatches, 2 loops, 8 layers: 4 all-reduces of a whole tensor on 2 ranks; then the embedding and the head,
    # and three fp32 numbers of each token for the cross-entropy.
    head = 4 * row / 2 + 3 * 256 * 4
    assert tensor["tensor parallel"] == 32 * (2 * 8 * 4 * 2 * row / 2 + head)
    assert estimate_run(run(pipeline_model_parallel_size=2)).communication["pipeline"] == 32 * 3 * row
    assert estimate_run(run(pipeline_model_parallel_size=4)).communication["pipeline"] == 32 * 2 * 2 * row
    data = estimate_run(run(), world_size=4).communication
    parameters = count_parameters(MODEL).total
    assert data == {"gradient reduction": 3 / 4 * 4 * parameters, "weight gathering": 3 / 4 * 2 * parameters}
    assert estimate_run(run()).communication == {}


def test_deepspeeds_memory_and_traffic():
    """Its fp32 main weights and buckets, the limit of whole weights, and what its stages send."""
    parameters = count_parameters(MODEL).total
    estimates = {}
    for stage in (1, 2, 3):
        added = {"zero_optimization": {"reduce_bucket_size": 5e5, "stage3_max_live_parameters": 1e6}}
        config = dataclasses.replace(run(), deepspeed=DeepSpeedConfig(stage, config=added))
        estimates[stage] = estimate_run(config, world_size=4)
        components = estimates[stage].memory[0].components
        assert components["DeepSpeed's buckets"] == 4 * 500_000
        assert components["gathered weights"] == (2 * 1_000_000 if stage == 3 else 0)
    once = {"gradient reduction": 3 / 4 * 4 * parameters, "weight gathering": 3 / 4 * 2 * parameters}
    micro_batches, loops = 8, 2
    assert estimates[1].communication == once
    assert estimates[2].communication == once | {"gradient reduction": micro_batches * once["gradient reduction"]}
    assert estimates[3].communication["weight gathering"] == 2 * micro_batches * loops * once["weight gathering"]
    times = [estimates[stage].step_seconds for stage in (1, 2, 3)]
    assert times == sorted(times)
    in_fp32 = dataclasses.replace(run(training={"precision": "fp32"}), deepspeed=DeepSpeedConfig())
    assert estimate_run(in_fp32).memory[0].components["main weights"] == 4 * parameters


def test_offloading_takes_time_for_memory():
    plain, optimizer, weights = (
        estimate_run(dataclasses.replace(run(), deepspeed=DeepSpeedConfig(3, *offload)), world_size=4)
        for offload in (("none", "none"), ("cpu", "none"), ("cpu", "cpu"))
    )
    owned = count_parameters(MODEL).total // 4
    assert "host transfers" not in plain.communication
    assert optimizer.communication["host transfers"] == (4 + 2) * owned
    assert weights.communication["host transfers"] == (4 + 2) * owned + 2 * (2 * 2 * 8) * owned
    assert plain.step_seconds < optimizer.step_seconds < weights.step_seconds
    assert plain.peak_memory_bytes > optimizer.peak_memory_bytes > weights.peak_memory_bytes


@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize("window_kind", ["all_gather", "a2a"])
def test_context_parallel_traffic_of_each_exchange(kind, window_kind):
    """Two loops of eight layers on two ranks of Transformer Engine, the later with a window beside full attention."""
    config = run(context_parallel_size=2, cp_comm_type=kind, window_cp_comm_type=window_kind)
    head = 128 * 64 * 2  # bytes of one head in a rank's rows
    of_kind = {"a2a": 2 * (8 + 4 + 4 + 8) / 2 * head, "p2p": 3 * (4 + 4) * head, "all_gather": 3 * (4 + 4) * head}
    sent = estimate_run(config, world_size=2).communication["context parallel"]
    assert sent == 32 * 8 * (2 * of_kind[kind] + of_kind[window_kind])


def test_a_pipeline_runs_at_its_slowest_stages_pace():
    """Of layers alone one of 5 is 5/4 as slow as one of 4; the last stage has the head, too."""
    small = {"vocab_size": 8, "make_vocab_size_divisible_by": 8}  # its head is nothing
    even, uneven = (
        estimate_run(run(small, pipeline_model_parallel_size=2, **stages), gpu="h100")
        for stages in ({}, {"num_layers_in_first_pipeline_stage": 5})
    )
    for part in ("matmul", "attention", "memory_bound", "bubble"):
        assert getattr(uneven.times, part) / getattr(even.times, part) == pytest.approx(5 / 4, rel=0.02), part
    assert uneven.flops == even.flops and uneven.bubble_fraction == even.bubble_fraction
    large = {"vocab_size": 250_000, "num_layers": 10}
    even, uneven = (
        estimate_run(run(large, pipeline_model_parallel_size=2, **stages), gpu="h100")
        for stages in ({}, {"num_layers_in_first_pipeline_stage": 8})
    )
    assert uneven.step_seconds < even.step_seconds, "the head is worth several layers"


def test_a_stage_without_layers_has_the_embedding_or_the_head():
    ends = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    estimate = estimate_run(run({"num_layers": 2}, pipeline_model_parallel_size=4, **ends))
    held = [stage.components["weights"] for stage in estimate.memory]
    assert held[0] == 2 * 1024 * 512 and held[3] == 2 * (1024 * 512 + 512) and held[1] == held[2] > 0
    activations = [stage.components["activations"] for stage in estimate.memory]
    assert activations[0] < activations[1] > activations[3]


def test_bubble():
    assert bubble_fraction(4, 2, 8) == 3 / 16
    assert estimate_run(run(pipeline_model_parallel_size=4)).bubble_fraction == 3 / (2 * 32)
    assert estimate_run(run(model={"loop_count": 1}, pipeline_model_parallel_size=4)).bubble_fraction == 3 / 32
    assert estimate_run(run()).bubble_fraction == 0


@pytest.mark.parametrize(("pipeline", "loops"), list(itertools.product((1, 2, 4), (1, 2, 3))))
def test_passes_come_once_each_and_in_a_possible_order(pipeline, loops):
    for stage in range(pipeline):
        seen: set[tuple[int, int, bool]] = set()
        for each in passes(pipeline, stage, loops, 8):
            key = (each.microbatch, each.loop, each.backward)
            assert key not in seen
            if each.backward:
                assert (each.microbatch, each.loop, False) in seen
                assert each.loop in (0, loops) or (each.microbatch, each.loop + 1, True) in seen
            seen.add(key)
        assert len(seen) == 2 * 8 * (1 if pipeline == 1 else loops)


def test_few_microbatches_show_the_peak_of_many():
    for pipeline, loops in itertools.product((2, 4), (1, 2, 3)):
        for stage in range(pipeline):
            peaks = []
            for count in (enough_microbatches(pipeline, 64), 64):
                live = peak = 0
                for each in passes(pipeline, stage, loops, count):
                    live += -1 if each.backward else 1
                    peak = max(peak, live)
                peaks.append(peak)
            assert peaks[0] == peaks[1]


def test_few_microbatches_show_the_memory_of_many(monkeypatch):
    config = run(training={"global_batch_size": 64}, pipeline_model_parallel_size=4)
    few = stage_peaks(config)
    monkeypatch.setattr("plt_megatron.predict.memory.enough_microbatches", lambda pipeline, microbatches: microbatches)
    assert stage_peaks(config) == few


# How figures move.


@pytest.mark.parametrize("backend", ["torch", "te"])
def test_recomputation_saves_memory_and_costs_time(backend):
    settings = [run({"backend": backend}, recompute_granularity=kind) for kind in ("none", "selective", "full")]
    kinds = [estimate_run(each) for each in settings]
    none, selective, full = (each.peak_memory_bytes for each in kinds)
    assert none > full < selective
    # So small a model's attention keeps no more with Transformer Engine than what it is recomputed from.
    assert (none > selective) == (backend == "torch"), (none, selective)
    assert kinds[0].step_seconds < kinds[1].step_seconds < kinds[2].step_seconds


@pytest.mark.parametrize("length", [256, 65536])
def test_a_recomputed_ffn_costs_a_third_of_its_products(length):
    """However much of the FLOPs attention takes."""
    config = run(recompute_granularity="selective", recompute_modules=["mlp"])
    estimate = estimate_run(dataclasses.replace(config, data=DataConfig(sequence_length=length)))
    products = estimate.flops.matmuls
    assert estimate.times.recompute / estimate.times.matmul == pytest.approx(estimate.flops.ffn / products / 3)


def test_parallel_sizes_divide_memory_and_time():
    one = estimate_run(run())
    for parallel in (
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"context_parallel_size": 2},
    ):
        divided = estimate_run(run(**parallel))
        assert divided.peak_memory_bytes < one.peak_memory_bytes
        assert 0.4 * one.step_seconds < divided.step_seconds < one.step_seconds
    copies = estimate_run(run(), world_size=4)
    assert copies.peak_memory_bytes < one.peak_memory_bytes, "optimizer state is divided"
    plain, sequence = (
        estimate_run(run(tensor_model_parallel_size=2, sequence_parallel=flag)) for flag in (False, True)
    )
    assert sequence.peak_memory_bytes < plain.peak_memory_bytes


def test_earlier_stages_hold_more_microbatches():
    config = run(model={"share_embeddings_and_output_weights": False}, pipeline_model_parallel_size=4)
    activations = [stage.components["activations"] for stage in estimate_run(config).memory]
    assert activations == sorted(activations, reverse=True) and activations[0] > 1.5 * activations[-1]


def test_loops_cost_activations_not_state():
    one, two = (
        estimate_run(run({"loop_count": loops, "gated_window": False}, {"micro_batch_size": 8})) for loops in (1, 2)
    )
    for name in ("weights", "main weights", "gradients", "optimizer state"):
        assert one.memory[0].components[name] == two.memory[0].components[name]
    kept = [
        each.memory[0].components["activations"] + each.memory[0].components["first-loop K/V"] for each in (one, two)
    ]
    assert 1.8 < kept[1] / kept[0] < 2.1
    assert one.memory[0].components["first-loop K/V"] == 0 < two.memory[0].components["first-loop K/V"]


def test_a_run_that_does_not_fit_says_so():
    config = load_config(ROOT / "configs/runs/loopcoder_7b.yaml")
    assert estimate_run(config, gpu="h100", world_size=64).fits
    small = estimate_run(config, gpu="l4", world_size=8)
    assert not small.fits and small.peak_memory_bytes > 0.92 * small.device_memory_bytes


def test_faster_cards_are_faster():
    times = [estimate_run(run(), gpu=gpu).step_seconds for gpu in ("l4", "a100", "h100", "h200", "b200")]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", ["plt2_1b", "plt2_ablation", "loopcoder_7b"])
def test_shipped_runs_are_plausible_on_64_h100(name):
    """What trainers of such models report: 30 to 55 % of the dense peak, and a peak below the card's memory."""
    config = load_config(ROOT / "configs/runs" / f"{name}.yaml")
    estimate = estimate_run(config, gpu="h100", world_size=64)
    tokens = config.training.global_batch_size * config.data.sequence_length
    share = estimate.flops_per_token * tokens / (estimate.step_seconds * 64 * 989.4e12)
    assert 0.3 < share < 0.55
    assert 5e9 < estimate.peak_memory_bytes < estimate.device_memory_bytes


def test_fp8_is_faster_and_keeps_copies_of_the_weights():
    bf16, fp8 = (estimate_run(run(training=fp8)) for fp8 in ({}, {"fp8.format": "hybrid"}))
    linear = (fp8.flops.projections + fp8.flops.ffn) / (fp8.flops.total - fp8.flops.global_attention
                                                        - fp8.flops.local_attention)  # fmt: skip
    assert fp8.times.matmul == pytest.approx(bf16.times.matmul * (1 - linear + linear / (2 * 0.75)), rel=1e-3)
    assert fp8.times.attention == bf16.times.attention
    copies = fp8.memory[0].components["FP8 weights"]
    assert copies == 2 * count_rank_parameters(Weights(MODEL, 1024), ParallelLayout()).layers
    assert fp8.peak_memory_bytes == bf16.peak_memory_bytes + copies
    with pytest.raises(UserError, match="gpu a100 has no FP8: set training.fp8=null"):
        estimate_run(run(training={"fp8.format": "hybrid"}), gpu="a100")


def test_layers_that_stay_in_bf16_take_their_time():
    fp8 = {"fp8.format": "hybrid"}
    none, half = {**fp8}, {**fp8, "fp8.num_layers_at_start_in_bf16": 1, "fp8.num_layers_at_end_in_bf16": 3}
    times = [estimate_run(run(training=how)).times.matmul for how in ({}, half, none)]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)  # four of eight


def test_fp8_keeps_copies_of_the_rank_s_experts_too():
    """Of those whose layers are in FP8: here five of eight, of which the first two are dense."""
    model = {"moe.num_experts": 8, "moe.ffn_hidden_size": 256, "moe.first_k_dense_replace": 2}
    fp8 = {"fp8.format": "hybrid", "fp8.num_layers_at_end_in_bf16": 3}
    config = run(model, fp8, expert_model_parallel_size=4)
    copies = estimate_run(config, world_size=4).memory[0].components["FP8 weights"]
    held = count_rank_parameters(Weights(config.model, 1024), ParallelLayout(expert=4))
    assert held.experts == 6 * 2 * 3 * 512 * 256  # layers, experts of a rank, matrices
    assert copies == int(2 * (held.layers * 5 / 8 + held.experts * 3 / 6))


def test_errors():
    with pytest.raises(UserError, match="vocabulary"):
        estimate_run(run(model={"vocab_size": None}))
    assert estimate_run(run(model={"vocab_size": None}), vocab_size=1000) == estimate_run(run())
    with pytest.raises(UserError, match="no such card"):
        estimate_run(run(), gpu="abacus")
