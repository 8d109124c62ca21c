"""The registry of optimizers agrees with the schema."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import typing

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.config.rules.deepspeed import DECIDED_BY, written
from plt_megatron.config.rules.optimizer import OPTIMIZERS, settings_of_others
from plt_megatron.config.rules.optimizer import find_problems as optimizer_problems
from plt_megatron.config.schema import DeepSpeedConfig, OptimizerConfig, RunConfig, TrainingConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError

ONE_STEP = TrainingConfig(train_iters=1)


def test_every_name_of_the_schema_is_an_optimizer():
    assert set(typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])) == OPTIMIZERS.keys()


def test_what_one_optimizer_alone_reads_is_named_for_it():
    """Everything else in the section holds whatever the optimizer is. Muon reads Adam's too."""
    fields = {field.name for field in dataclasses.fields(OptimizerConfig)}
    for name, spec in OPTIMIZERS.items():
        own = {field for field in fields if field.startswith(f"{name}_")}
        beside = {field for field in fields if field.startswith("adam_")} if spec.megatron(OptimizerConfig()) else set()
        assert own | beside == set(spec.settings)
        assert not settings_of_others(OptimizerConfig(name=name)) & own
    assert {name for name in settings_of_others(OptimizerConfig()) if not name.startswith("muon_")} == {"sgd_momentum"}
    assert settings_of_others(OptimizerConfig(name="muon")) == {"sgd_momentum"}


def test_accepted_newton_schulz_steps_make_orthogonal_updates():
    import torch

    muon_utils = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    matrix = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    refused = set()
    for kind in ("quintic", "polar_express"):
        for steps in range(5, 13):
            own = OptimizerConfig(name="muon", muon_num_ns_steps=steps, muon_coefficient_type=kind)
            if any(
                "muon_num_ns_steps" in line for line in optimizer_problems(RunConfig(optimizer=own, training=ONE_STEP))
            ):
                refused.add((kind, steps))
                continue
            size = torch.linalg.svdvals(muon_utils.newton_schulz(matrix, steps, kind)).square().mean().sqrt()
            assert 0.8 < size < 1.2, (kind, steps)
    assert refused == {("quintic", steps) for steps in (6, 7, 8, 9, 11, 12)}


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.deepspeed is not None])
def test_what_deepspeed_is_told_of_an_optimizer_cannot_be_contradicted(name):
    config = RunConfig(deepspeed=DeepSpeedConfig(), optimizer=OptimizerConfig(name=name), training=ONE_STEP)
    told = {key for key in written(config) if key.startswith("optimizer.")} - {"optimizer.params.torch_adam"}
    assert told == {key for key in DECIDED_BY if key.startswith("optimizer.")}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["optimizer.name=muon", "deepspeed={}"],
            "optimizer.name muon is not verified with deepspeed: set optimizer.name=adam, or leave out the section "
            "deepspeed",
        ),
        (
            ["optimizer.lr_mult.head=2"],
            "optimizer.lr_mult.head: the head is the embedding (model.share_embeddings_and_output_weights); set "
            "optimizer.lr_mult.embedding",
        ),
        (
            ["optimizer.wd_mult.head=0"],
            "optimizer.wd_mult.head: the head is the embedding (model.share_embeddings_and_output_weights); set "
            "optimizer.wd_mult.embedding",
        ),
        (
            ["model.mup_base_hidden_size=64", "model.loop_norm=final"],
            "model.mup_base_hidden_size: the final norm's weight carries muP's multiplier of the logits, but with "
            "model.loop_norm final loops read it; set model.loop_norm=rms",
        ),
        (
            ["model.mup_base_hidden_size=64", "optimizer.name=sgd"],
            "optimizer.name sgd with model.mup_base_hidden_size, which has rules for adam and muon; set "
            "optimizer.name=adam",
        ),
        (["model.mup_base_hidden_size=0"], "model.mup_base_hidden_size must be at least 1, got 0"),
        (["optimizer.lr_mult.gates=-1"], "optimizer.lr_mult.gates must be at least 0, got -1.0"),
        (["optimizer.muon_num_ns_steps=0"], "optimizer.muon_num_ns_steps must be at least 1, got 0"),
        (["optimizer.muon_momentum=1"], "optimizer.muon_momentum must be below 1, got 1.0"),
        (["optimizer.muon_extra_scale_factor=0"], "optimizer.muon_extra_scale_factor must be above 0, got 0.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, said):
    tied = ["model.share_embeddings_and_output_weights=true", "parallel.overlap_grad_reduce=false"]
    config = load_config("configs/runs/plt2_tiny.yaml", [*tied, *settings])
    assert find_problems(config, check_files=False) == [said]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.muon_coefficient_type=cubic", "optimizer.muon_coefficient_type"),
        ("optimizer.muon_scale_mode=none", "optimizer.muon_scale_mode"),
        ("optimizer.lr_mult.biases=2", "optimizer.lr_mult.biases"),
        ("optimizer.lr_mult=2", "optimizer.lr_mult"),
        ("optimizer.name=dist_muon", "optimizer.name"),
        ("optimizer.optimizer_cpu_offload=true", "checkpoints would lack its state"),
        ("optimizer.exp_avg_dtype=bf16", "moments are fp32"),
        ("optimizer.decoupled_lr=1e-3", "set optimizer.lr_mult.embedding"),
        ("model.use_mup=true", "set model.mup_base_hidden_size"),
        ("optimizer.use_layer_wise_distributed_optimizer=true", "set optimizer.name=muon"),
    ],
)
def test_an_unknown_setting_is_refused_by_name(setting, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        load_config("configs/runs/plt2_tiny.yaml", [setting])
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "emerging_optimizers" else found(name, *rest)
    )
    config = load_config("configs/runs/plt2_tiny.yaml", ["optimizer.name=muon"])
    (said,) = [line for line in find_problems(config) if "emerging_optimizers" in line]
    assert "plt-megatron[muon]" in said and "optimizer.name=adam" in said
