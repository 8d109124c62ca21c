"""Each check of a configuration, by what it says; and that a good configuration passes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plt_megatron.config.layout import layout_of, num_microbatches
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import DataSource, DeepSpeedConfig, RunConfig
from plt_megatron.config.validation import find_problems, validate
from plt_megatron.errors import UserError
from tests.settings import changed


def good() -> RunConfig:
    config = RunConfig()
    config.data.sources = [DataSource("corpus")]
    config.data.tokenizer = "tokenizer.model"
    config.training.train_iters = 100
    return config


def change(config: RunConfig, **settings: object) -> RunConfig:
    """Set dotted keys, written with `__` for the dot."""
    new = changed(config, {key.replace("__", "."): value for key, value in settings.items()})
    for field in dataclasses.fields(config):
        setattr(config, field.name, getattr(new, field.name))
    return config


def problems(world_size: int | None = None, **settings: object) -> list[str]:
    return find_problems(change(good(), **settings), world_size=world_size, check_files=False)


def test_a_good_configuration_passes():
    assert problems() == []
    assert problems(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True) == []
    assert problems(parallel__pipeline_model_parallel_size=4) == []
    assert problems(model__loop_count=1, model__share_kv=False) == []
    assert problems(**YARN) == []
    assert problems(**PP2, **{FIRST: 1, LAST: 3}) == []
    assert problems(**PP2, **{HEAD: True}, model__num_layers=5) == []
    assert problems(model__gated_window=False, model__share_kv=False, model__cross_loop_parallel=False) == []
    assert problems(world_size=4, parallel__tensor_model_parallel_size=2) == []
    assert problems(validation__loop_counts=[1, 2, 8]) == []
    assert problems(data__split="1,0,0", validation__iters=0) == []
    assert problems(data__tokenizer=None, model__vocab_size=512) == []
    assert problems(name="sweep/loops_2") == []


NAIVE = {"model__cross_loop_parallel": False, "model__share_kv": False, "model__gated_window": False}
YARN = {"model__rope_scaling__factor": 4.0, "model__rope_scaling__yarn__original_max_position_embeddings": 1024}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
FIRST, LAST = "parallel__num_layers_in_first_pipeline_stage", "parallel__num_layers_in_last_pipeline_stage"
HEAD = "parallel__account_for_loss_in_pipeline_split"
TWO_PARTS = {"data__sources": [], "data__train_sources": [DataSource("a")]}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__loop_count": 0}, "model.loop_count must be at least 1, got 0"),
        ({"model__loop_count": 9}, "model.loop_count must be at most 8, got 9"),
        ({"model__window_size": 0}, "model.window_size must be at least 1, got 0"),
        ({"training__ema_decay": 1.0}, "training.ema_decay must be below 1, got 1.0"),
        ({"training__ema_decay": -0.1}, "training.ema_decay must be at least 0, got -0.1"),
        ({"training__ema_decay": float("nan")}, "training.ema_decay must be a finite number, got nan"),
        ({"training__z_loss_coeff": -1e-4}, "training.z_loss_coeff must be at least 0, got -0.0001"),
        ({"training__z_loss_coeff": float("inf")}, "training.z_loss_coeff must be a finite number, got inf"),
        (
            {**YARN, "model__rope_scaling__yarn__beta_slow": 32.0},
            "model.rope_scaling.yarn.beta_fast 32 must be above model.rope_scaling.yarn.beta_slow",
        ),
        (
            {**YARN, "model__rope_scaling__yarn__beta_slow": 0.0},
            "model.rope_scaling.yarn.beta_slow must be above 0, got 0.0",
        ),
        ({**YARN, "model__rope_scaling__factor": 0.5}, "model.rope_scaling.factor must be at least 1, got 0.5"),
        (
            {**YARN, "data__sequence_length": 4104},
            "4104 is longer than YaRN's model.rope_scaling.factor 4 x model.rope_scaling.yarn",
        ),
        ({**YARN, "parallel__apply_rope_fusion": True, "model__backend": "te"}, "the kernel does not scale what it"),
        ({"model__share_kv": False}, "model.gated_window needs model.share_kv"),
        (
            {"checkpoint__exports__interval": 30, "checkpoint__save_interval": 20},
            "checkpoint.exports.interval 30 must be a multiple of checkpoint.save_interval, which is 20",
        ),
        (
            {"training__ema_decay": 0.9, "optimizer__name": "muon"},
            "optimizer.name muon is not verified with training.ema_decay",
        ),
        ({"evaluation__tasks": ["a"]}, "evaluation.tasks need exports of the run and their tokenizer: set"),
        ({"checkpoint__exports__interval": 30}, "a multiple of checkpoint.save_interval, which is 0: set it, as to 30"),
        ({"checkpoint__exports__interval": 30, "checkpoint__enabled": False}, "checkpoint.enabled=false writes none"),
        ({"model__hidden_size": 130}, "model.hidden_size 130 is not divisible by model.num_attention_heads 4"),
        ({"model__kv_channels": 33}, "head dimension (model.kv_channels) 33 is not divisible by 2"),
        ({"model__hidden_size": 12}, "(model.kv_channels) 3 is not divisible by 2"),
        ({"model__num_query_groups": 3}, "num_attention_heads 4 is not divisible by model.num_query_groups 3"),
        ({"model__learned_hidden_scale": "model", **NAIVE}, "learned_hidden_scale model applies to E + h, but"),
        ({"model__loop_norm": "rms", **NAIVE}, "a loop reads h itself; set model.input_injection=true"),
        (
            {"model__share_kv": False, "model__share_values": False, "model__gated_window": False},
            "model.share_values=false applies to shared keys, but model.share_kv=false shares neither; set",
        ),
        ({"model__residual_scale": 0.0}, "model.residual_scale must be above 0, got 0.0"),
        ({"model__embedding_scale": float("nan")}, "model.embedding_scale must be a finite number, got nan"),
        ({"model__rotary_base": float("inf")}, "model.rotary_base must be a finite number, got inf"),
        ({"model__layernorm_epsilon": 0.0}, "model.layernorm_epsilon must be above 0, got 0.0"),
        ({"parallel__sequence_parallel": True}, "needs parallel.tensor_model_parallel_size > 1"),
        (
            {"parallel__recompute_granularity": "full", "parallel__recompute_num_layers": 5},
            "parallel.recompute_num_layers 5 is more than the 4 layers of a pipeline stage",
        ),
        (
            {"parallel__pipeline_model_parallel_size": 3, "training__global_batch_size": 9},
            "model.num_layers 4 is not divisible by parallel.pipeline_model_parallel_size 3",
        ),
        (
            {"parallel__num_layers_in_first_pipeline_stage": 2},
            "first_pipeline_stage applies to the stages of a pipeline: leave",
        ),
        ({**PP2, "parallel__num_layers_in_first_pipeline_stage": 0}, "first_pipeline_stage must be at least 1, got 0"),
        (
            {**PP2, "parallel__num_layers_in_first_pipeline_stage": 4},
            "stage 4 leave 0 of model.num_layers 4 to the other",
        ),
        ({**PP2, FIRST: 3, LAST: 2}, "stage 2 must add up to model.num_layers 4: there is no stage between them"),
        ({**PP2, FIRST: 3, HEAD: True}, "and parallel.account_for_loss_in_pipeline_split both set what the first and"),
        (
            {**PP2, HEAD: True},
            "4 + 1 (parallel.account_for_loss_in_pipeline_split) is not divisible by parallel.pipeline",
        ),
        (
            {**PP2, FIRST: 3, "parallel__recompute_granularity": "full", "parallel__recompute_num_layers": 2},
            "parallel.recompute_num_layers 2 is more than the 1 layers of a pipeline stage",
        ),
        (
            {**PP2, FIRST: 3, "training__fp8__format": "hybrid", "model__backend": "te"},
            "training.fp8 is not verified with parallel.num_layers_in_first_pipeline_stage: leave",
        ),
        ({"parallel__distributed_timeout_minutes": 0.0}, "distributed_timeout_minutes must be above 0"),
        ({"training__global_batch_size": 9, "training__micro_batch_size": 2}, "9 is not divisible by 2"),
        ({"training__train_iters": None}, "training: give the run's length, either train_iters or train_tokens"),
        ({"training__train_tokens": 10}, "training: give either train_iters or train_tokens, not both"),
        ({"training__train_iters": 0}, "training.train_iters must be at least 1, got 0"),
        ({"training__seed": 0}, "training.seed must be at least 1"),
        ({"optimizer__lr": 1e-6}, "optimizer.lr 1e-06 is below optimizer.min_lr 3e-05"),
        ({"optimizer__lr": 0.0}, "optimizer.lr must be above 0"),
        ({"optimizer__lr_warmup_iters": 100}, "lr_warmup_iters 100 must leave one of the schedule's 100 steps"),
        (
            {"optimizer__lr_warmup_iters": 8, "optimizer__lr_decay_iters": 7},
            "lr_warmup_iters 8 must leave one of the schedule's 7 steps",
        ),
        ({"optimizer__adam_beta2": 1.0}, "optimizer.adam_beta2 must be below 1, got 1.0"),
        ({"optimizer__clip_grad": -1.0}, "optimizer.clip_grad must be at least 0"),
        (
            {"optimizer__lr_decay_style": "WSD", "optimizer__lr_warmup_iters": 60, "optimizer__lr_wsd_decay_iters": 41},
            "lr_warmup_iters 60 must leave optimizer.lr_wsd_decay_iters 41 of the schedule's 100 steps",
        ),
        ({"validation__loop_counts": [0]}, "validation.loop_counts[0] must be at least 1, got 0"),
        ({"validation__loop_counts": [2, 9]}, "validation.loop_counts[1] must be"),
        ({"validation__loop_counts": [1, 2], "model__loop_count": 1}, "has no gates"),
        ({"data__sources": []}, "data.sources is empty"),
        ({"data__train_sources": [DataSource("a")]}, "not both"),
        (TWO_PARTS, "data.validation_sources is empty"),
        ({"data__sources": [], "data__test_sources": [DataSource("a")]}, "data.train_sources is empty"),
        ({"data__sources": [DataSource("a", weight=0.0)]}, "data.sources[0].weight must be above 0"),
        ({"data__sources": [DataSource("a", weight=1e308)]}, "data.sources[0].weight must be at most 1"),
        ({"data__sources": [DataSource("a"), DataSource("b", max_epochs=-1.0)]}, "data.sources[1].max_epochs"),
        ({"data__split": "90,10"}, "data.split must be three numbers"),
        ({"data__split": "90,10,x"}, "data.split must be three numbers"),
        ({"data__split": "0,0,0"}, "data.split must be three numbers"),
        ({"data__split": "90,-10,20"}, "data.split must be three numbers"),
        ({"data__split": "inf,1,1"}, "data.split must be three numbers"),
        ({"data__split": "nan,1,1"}, "data.split must be three numbers"),
        (
            {"data__split": "1,0,0"},
            "data.split 1,0,0 keeps nothing for this: name some data to validate on, or set validation.iters=0",
        ),
        ({"data__split": "0,1,0"}, "data.split 0,1,0 keeps nothing for this: a run needs data to train on"),
        ({"data__tokenizer": None}, "give data.tokenizer, or model.vocab_size"),
        ({"logging__peak_tflops": 0.0}, "logging.peak_tflops must be above 0"),
        ({"checkpoint__keep_last": 0}, "checkpoint.keep_last must be at least 1"),
        ({"name": ""}, "name must be a folder name below output_dir"),
        ({"name": "../x"}, "name must be a folder name below output_dir"),
        ({"name": "/x"}, "name must be a folder name below output_dir"),
        ({"name": "."}, "name must be a folder name below output_dir"),
    ],
)
def test_one_problem_is_one_line(settings, expected):
    (line,) = problems(**settings)
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__num_attention_heads": 6, "model__hidden_size": 96}, "model.num_attention_heads 6"),
        (
            {"model__num_attention_heads": 12, "model__hidden_size": 96, "model__num_query_groups": 6},
            "model.num_query_groups 6 with parallel.tensor_model_parallel_size 4: ranks split",
        ),
        ({"model__num_query_groups": 1, "model__kv_channels": 1}, "one number must divide the other"),
        (
            {"model__num_query_groups": 2, "optimizer__name": "muon"},
            "optimizer.name muon with model.num_query_groups 2 and parallel.tensor_model_parallel_size 4: ranks would",
        ),
        ({"model__ffn_hidden_size": 386}, "model.ffn_hidden_size 386"),
        ({"data__sequence_length": 254, "parallel__sequence_parallel": True}, "data.sequence_length 254"),
    ],
)
def test_what_tensor_parallelism_must_divide(settings, expected):
    lines = problems(parallel__tensor_model_parallel_size=4, **settings)
    assert any(expected in line and "parallel.tensor_model_parallel_size 4" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"data__sequence_length": 252},
            "data.sequence_length 252 is not divisible by 8: parallel.context_parallel_size 4",
        ),
        (
            {
                "data__sequence_length": 264,
                "parallel__sequence_parallel": True,
                "parallel__tensor_model_parallel_size": 4,
            },
            "data.sequence_length 264 is not divisible by 16: parallel.sequence_parallel shares",
        ),
    ],
)
def test_context_parallelism_must_fit_the_sequence(settings, expected):
    (line,) = problems(parallel__context_parallel_size=4, **settings)
    assert expected in line


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__loop_count": 1}, "needs model.gated_window and model.loop_count > 1"),
        ({"model__gated_window": False}, "needs model.gated_window and model.loop_count > 1"),
        ({"parallel__context_parallel_size": 2}, "does not run with parallel.context_parallel_size 2"),
        ({"deepspeed": DeepSpeedConfig()}, "does not run with deepspeed"),
        ({"model__gate_activation": "tanh"}, "does not compute model.gate_activation tanh"),
        ({"model__kv_channels": 8}, "takes head dimensions from 16 to 256, got 8"),
    ],
)
def test_the_fused_window_refuses_what_it_is_not_proven_for(settings, expected):
    lines = [line for line in problems(model__fused_gated_window=True, **settings) if "fused_gated_window" in line]
    assert len(lines) == 1 and expected in lines[0] and lines[0].endswith("set model.fused_gated_window=false")


def test_context_parallelism_with_what_it_allows():
    assert problems(parallel__context_parallel_size=4) == []
    assert problems(parallel__context_parallel_size=2, data__sequence_length=4, model__window_size=64) == []
    sequence_parallel = {"parallel__sequence_parallel": True, "parallel__tensor_model_parallel_size": 4}
    assert problems(parallel__context_parallel_size=2, data__sequence_length=8, **sequence_parallel) == []
    assert problems(parallel__context_parallel_size=8, parallel__cp_comm_type="all_gather") == []


def test_context_parallelism_counts_among_the_processes():
    two = {"parallel__context_parallel_size": 2, "parallel__tensor_model_parallel_size": 2}
    assert problems(world_size=8, **two) == []
    (line,) = problems(world_size=6, **two)
    assert "6 processes: tensor 2 x pipeline 1 x context 2 parallel needs a multiple of 4" in line
    (line,) = problems(world_size=4, parallel__data_parallel_size=2, **two)
    assert "tensor 2 x pipeline 1 x context 2 x data 2 parallel needs 8 processes, got 4" in line
    config = change(good(), **two)
    assert layout_of(config).world_size == 4 and layout_of(config, 16).data == 4
    assert num_microbatches(config, 16) == 2, "the ranks of one sequence read the same samples"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "parallel.window_cp_comm_type a2a splits the 4 key/value heads (model.num_query_groups): not divisible"),
        ({"parallel__cp_comm_type": "a2a", "model__loop_count": 1}, "parallel.cp_comm_type a2a splits"),
        (
            {
                "parallel__cp_comm_type": "a2a",
                "parallel__window_cp_comm_type": "all_gather",
                "parallel__context_parallel_size": 2,
                "data__reset_at_document_boundaries": True,
            },
            "Transformer Engine would split each document over the ranks, not the sequence; set "
            "parallel.window_cp_comm_type=a2a",
        ),
        (
            {"parallel__cp_comm_type": "p2p", "model__loop_count": 1, "data__reset_at_document_boundaries": True},
            "document over the ranks, not the sequence; set data.reset_at_document_boundaries=false",
        ),
        (
            {"parallel__cp_comm_type": "a2a", "model__loop_count": 1, "data__reset_at_document_boundaries": True},
            "context 8; set data.reset_at_document_boundaries=false and parallel.cp_comm_type=all_gather, or",
        ),
    ],
)
def test_what_transformer_engine_cannot_share(settings, expected):
    settings = {"parallel__context_parallel_size": 8, **settings}
    for backend, have_te in (("te", True), ("te", False), ("auto", True)):
        config = change(good(), model__backend=backend, **settings)
        lines = find_problems(config, check_files=False, have_te=have_te)
        assert [expected in line and "model.backend=torch" in line for line in lines] == [True], lines
    for backend, have_te in (("torch", True), ("auto", False)):
        assert (
            find_problems(change(good(), model__backend=backend, **settings), check_files=False, have_te=have_te) == []
        )


WINDOWED_VALUES = {"model__share_values": False, "model__gated_window": False, "model__full_attention": "last_loop"}


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize(
    "change_to",
    [
        {"model__share_values": True, "model__share_kv": False},
        {"model__share_kv": True, "model__full_attention": "every_loop"},
    ],
)
def test_values_of_their_own_lead_from_no_refusal_to_another(share_kv, change_to):
    settings: dict[str, object] = {**WINDOWED_VALUES, "model__share_kv": share_kv}
    (line,) = find_problems(change(good(), **settings), check_files=False)
    for key, value in change_to.items():
        if settings[key] != value:
            assert f"{key.replace('__', '.')}={str(value).lower()}" in line
    assert find_problems(change(good(), **settings | change_to), check_files=False) == []


def test_transformer_engine_shares_what_divides():
    settings = {"parallel__context_parallel_size": 2, "parallel__tensor_model_parallel_size": 2, "model__backend": "te"}
    assert find_problems(change(good(), **settings, parallel__cp_comm_type="a2a"), check_files=False) == []
    all_gather = {**settings, "parallel__context_parallel_size": 16, "parallel__window_cp_comm_type": "all_gather"}
    assert find_problems(change(good(), **all_gather), check_files=False) == []


def test_pipelines_need_a_multiple_of_microbatches():
    settings = {"parallel__pipeline_model_parallel_size": 4, "training__micro_batch_size": 4}
    (line,) = problems(**settings, training__global_batch_size=8)
    assert "microbatches per step: 2 is not divisible by parallel.pipeline_model_parallel_size 4" in line
    assert problems(**settings, training__global_batch_size=32) == []
    (line,) = problems(world_size=8, **settings, training__global_batch_size=24)  # DP 2: 3 microbatches
    assert "microbatches per step: 3" in line


def test_world_size_against_the_layout():
    (line,) = problems(world_size=3)
    assert "global_batch_size 8 is not divisible by 3" in line


def test_all_problems_are_reported_at_once():
    config = change(good(), model__window_size=0, training__train_iters=None, data__split="1")
    with pytest.raises(UserError) as caught:
        validate(config, check_files=False)
    assert len(str(caught.value).splitlines()) == 3


def test_values_of_another_type_that_a_program_gives_are_all_that_is_named():
    config: Any = RunConfig()
    config.name, config.data.sources, config.data.stages = 3, [DataSource("x"), {}], None
    config.data.sources[0].path = Path("x")
    config.model.share_kv, config.model.loop_count, config.model.loop_span = "no", True, [0, 1.0]
    config.training.train_iters, config.training.train_tokens = np.int64(10), 4e9
    config.optimizer.name, config.optimizer.lr, config.optimizer.lr_warmup_iters = "adamw", 1, -1
    assert [problem.partition(" must be ")[0] for problem in find_problems(config)] == [
        *("name", "model.loop_count", "model.loop_span[1]", "model.share_kv"),
        *("data.sources[0].path", "data.sources[1]", "data.stages"),
        *("training.train_iters", "training.train_tokens", "optimizer.name"),
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_iters", 10**99), ("train_iters", 10**9 + 1), ("train_tokens", 10**400), ("global_batch_size", 2**24 + 1)],
)
def test_no_integer_is_so_large_that_work_with_it_would_not_end(key, value):
    config = change(good(), training__train_iters=None)
    (line,) = find_problems(change(config, **{f"training__{key}": value}), check_files=False)[:1]
    assert line.startswith(f"training.{key} must be at most ") and len(line) < 120
    assert value < 10**15 or line.endswith(f"got 1E+{len(str(value)) - 1}")


def test_the_samples_that_follow_are_bounded_too():
    (line,) = problems(training__train_iters=10**9, training__global_batch_size=2**12)
    assert "1,000,000,000 steps of training.global_batch_size 4096 are 4,096,000,000,000 samples" in line
    (line,) = problems(training__train_iters=None, training__train_tokens=10**15, data__sequence_length=64)
    assert "samples, but an index holds at most 1,099,511,627,776" in line


def test_a_problem_comes_after_the_file_and_line_of_the_first_setting_it_names(tmp_path):
    (tmp_path / "model.yaml").write_text("model:\n  hidden_size: 130\n  num_layers: 4\n")
    (tmp_path / "run.yaml").write_text(
        "include: model.yaml\ndata: {sources: [{path: a},\n  {path: b, max_epochs: -1}], tokenizer: t}\n"
        "training:\n  train_iters: 0\n"
    )
    config = load_config(tmp_path / "run.yaml", ["model.loop_count=9"])
    assert find_problems(config, check_files=False) == [
        "model.loop_count must be at most 8, got 9",
        f"{tmp_path}/run.yaml:3: data.sources[1].max_epochs must be above 0, got -1.0",
        f"{tmp_path}/run.yaml:5: training.train_iters must be at least 1, got 0",
    ]
    good_numbers = ["training.train_iters=9", "data.sources=[{path: a}]"]
    (line,) = find_problems(load_config(tmp_path / "run.yaml", good_numbers), check_files=False)
    assert line.startswith(f"{tmp_path}/model.yaml:2: model.hidden_size 130 is not divisible")


@pytest.mark.parametrize("key", ["training.on_nonfinite", "training.spikes.action"])
def test_a_rollback_needs_a_checkpoint_to_return_to(key):
    asked = {key.replace(".", "__"): "rollback"}
    for settings, lacking in (
        ({"checkpoint__save_interval": 0}, "save_interval=0"),
        ({"checkpoint__save_interval": good().training.train_iters}, f"save_interval={good().training.train_iters}"),
        ({"checkpoint__save_interval": 5, "checkpoint__enabled": False}, "enabled=false"),
        ({"checkpoint__load": "other", "checkpoint__weights_only": True}, "save_interval=0"),
    ):
        (problem,) = problems(**asked, **settings)
        assert problem.startswith(f"{key}=rollback: with checkpoint.{lacking} there is no checkpoint"), problem
        assert problems(**{key.replace(".", "__"): "skip"}, **settings) == []
    for settings in ({"checkpoint__save_interval": 5}, {"checkpoint__load": "other"}):
        assert problems(**asked, **settings) == []
