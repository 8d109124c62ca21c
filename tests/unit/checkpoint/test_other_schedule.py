"""Which settings of losses on earlier loops, and which form of the loop, a checkpoint is resumed with unasked."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plt_megatron.config import derived
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import LoopStage, MoeConfig, RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.run_folder import resuming
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.optimizers import LearningRate
from tests.unit.slurm.fake_slurm import write_checkpoint

NAME = "training.loop_loss_weights"


def run(weights: list[float], loops: int) -> RunConfig:
    config = RunConfig()
    config.training.train_iters, config.training.loop_loss_weights, config.model.loop_count = 10, weights, loops
    return config


def progress_of(config: RunConfig, step_tokens: int) -> dict[str, Any]:
    progress = {"schedule": resuming.schedule(config, step_tokens), "config": dataclasses.asdict(config)}
    return json.loads(json.dumps(progress | {"schedule_step_tokens": step_tokens, "step": 6, "consumed_tokens": 6}))


@pytest.mark.parametrize("earlier_version", [False, True])
@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        (([0.5], 1), ([0.5], 2), None),
        (([0.5], 2), ([0.5], 1), None),
        (([0.5], 2), ([0.5], 3), None),
        (([0.5, 0.25], 3), ([0.5, 0.25], 4), None),
        (([0.5, 0.5], 3), ([0.5], 3), None),
        (([0.5], 3), ([0.5, 0.5], 3), None),
        (([0.5], 3), ([0.25], 3), "[0.5] (now [0.25]);"),
        (([0.5], 2), ([], 2), "[0.5] (now []);"),
        (([0.5], 2), ([0.5, 0.25], 3), "[0.5] (now [0.5, 0.25]);"),
    ],
)
def test_what_was_set_is_compared_and_what_it_stands_for(before, now, refused, earlier_version):
    saved, own = run(*before), run(*now)
    progress = progress_of(saved, 1)
    if earlier_version:  # which wrote down a weight for each loop
        progress["schedule"][NAME] = derived.loop_loss_weights(saved, saved.model.loop_count)
    with nullcontext() if refused is None else pytest.raises(UserError) as error:
        resuming.check_schedule(Path("checkpoint"), progress, own, allow_other=False)
    assert refused is None or f"was trained with {NAME} {refused}" in str(error.value)


@pytest.mark.parametrize("stages", [[LoopStage(0.5, 1), LoopStage(loop_count=2)], [LoopStage(0.5, 1)]])
def test_stages_at_shares_of_the_run_belong_to_its_length(stages):
    """The rest of the run is one, too."""
    before, now = run([], 2), run([], 2)
    for config in (before, now):
        config.optimizer.lr_decay_style = "constant"
        config.training.loop_schedule = stages
    now.training.train_iters = 20
    progress = progress_of(before, 1)
    with pytest.raises(UserError, match=r"training.loop_schedule.* 10 .now 20"):
        resuming.check_schedule(Path("checkpoint"), progress, now, allow_other=False)
    resuming.check_schedule(Path("checkpoint"), progress, now, allow_other=True)
    del progress["schedule"]["training.loop_schedule over"]  # of an earlier version
    resuming.check_schedule(Path("checkpoint"), progress, now, allow_other=False)


def test_a_run_is_not_called_like_the_import_that_it_starts_from(tmp_path):
    config = load_config("configs/runs/plt2_tiny.yaml", [f"output_dir={tmp_path}", "checkpoint.weights_only=true"])
    own = RunFolder.of(config).checkpoints
    write_checkpoint(own, config, 0, weights_only=True, data_fingerprint={})
    with pytest.raises(UserError, match=f"{own} has the weights of an import.*another name"):
        resuming.find_start(config)


def test_a_larger_batch_leaves_the_schedule_the_steps_that_it_began_with(tmp_path):
    length = ["training.train_iters=null", "training.train_tokens=1024000", "training.global_batch_size=4"]
    wsd = ["optimizer.lr_decay_style=WSD", "optimizer.lr_warmup_iters=150", "optimizer.lr_wsd_decay_iters=200"]
    settings = [*length, *wsd, f"output_dir={tmp_path}", "name=run", "data.sequence_length=256"]
    config = load_config("configs/runs/plt2_tiny.yaml", settings)
    progress = progress_of(config, 1024)
    now = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=32))
    said = "lr_warmup_iters 150 must leave optimizer.lr_wsd_decay_iters 200 of the schedule's 125 steps"
    assert any(said in problem for problem in find_problems(now, check_files=False))
    (tmp_path / "run/checkpoints/step_00000006").mkdir(parents=True)
    assert not any("must leave" in problem for problem in find_problems(now, check_files=False))
    resuming.check_schedule(Path("checkpoint"), progress, now, allow_other=False)
    LearningRate(now, SimpleNamespace(param_groups=[]))  # as the engine makes one before the checkpoint is read
    now.training.train_tokens = 128_000
    with pytest.raises(UserError, match="must leave"):
        resuming.check_schedule(Path("checkpoint"), progress, now, allow_other=True)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({}, {"window_size": 9, "rotary_base": 5e5}, ()),
        ({}, {"key_shift": "heads"}, ("key_shift none (now heads)",)),
        ({}, {"embedding_scale": 0.7}, ("embedding_scale 1.0 (now 0.7)",)),
        ({"loop_count": 1}, {"loop_count": 1, "embedding_scale": 0.7, "share_kv": False}, ()),
        ({"loop_count": 1}, {"embedding_scale": 0.7}, ()),
        ({"loop_count": 1}, {"loop_count": 1, "residual_scale": 2.0}, ("residual_scale 1.0 (now 2.0)",)),
        (
            {},
            {"key_shift": "heads", "share_kv": False, "gated_window": False, "full_attention": "last_loop"},
            ("key_shift none", "share_kv True", "gated_window True", "full_attention every_loop"),
        ),
        (  # no tensor differs
            {"num_layers": 4, "loop_span": [1, 3], "share_kv": False, "gated_window": False},
            {"num_layers": 4, "loop_span": [0, 4], "share_kv": False, "gated_window": False},
            ("loop_span [1, 3] (now [0, 4])",),
        ),
        (
            {},
            {"hidden_size": 64, "key_shift": "heads"},
            ("hidden_size 128", "key_shift none", "tensors of other shapes"),
        ),
    ],
)
def test_a_run_goes_on_with_the_form_that_it_has(before, now, refused):
    """All that changed is named at once. Another run may start from its weights in another form of the same shapes."""
    saved, own = run([], 2), run([], 2)
    saved.model, own.model = (dataclasses.replace(saved.model, **settings) for settings in (before, now))
    start = resuming.Start(Path("checkpoint"), {"config": dataclasses.asdict(saved)}, is_own=True)
    with pytest.raises(UserError) if refused else nullcontext() as error:
        resuming.check_model(start, own, None)
    assert not refused or all(part in str(error.value) for part in (*refused, "runs/run/config.yaml"))
    with pytest.raises(UserError) if "hidden_size" in now else nullcontext():
        resuming.check_model(dataclasses.replace(start, is_own=False), own, None)


def test_another_model_than_that_of_checkpoint_load_is_restored_or_trained_without(tmp_path):
    """An import has its model in a file."""
    saved, own = run([], 2), run([], 2)
    own.model.hidden_size *= 2
    progress = {"config": dataclasses.asdict(saved)}
    start = resuming.Start(tmp_path / "imported/checkpoints/step_00000000", progress, is_own=False)
    with pytest.raises(UserError, match="leave checkpoint.load out$") as error:
        resuming.check_model(start, own, None)
    assert "another name" not in str(error.value) and "model.yaml" not in str(error.value)
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported/model.yaml").touch()
    with pytest.raises(UserError, match="include .*/imported/model.yaml"):
        resuming.check_model(start, own, None)


@pytest.mark.parametrize("with_bias_first", [False, True])
def test_a_buffer_that_the_loader_would_miss_is_missed_before_the_start(with_bias_first):
    models = []
    for rate in (None, 1e-3)[:: -1 if with_bias_first else 1]:
        models.append(run([], 1))
        models[-1].model.moe = MoeConfig(num_experts=4, router_score_function="sigmoid", router_bias_update_rate=rate)
    start = resuming.Start(Path("checkpoint"), {"config": dataclasses.asdict(models[0])}, is_own=False)
    with pytest.raises(UserError, match=r"model\.moe .*tensors of other shapes"):
        resuming.check_model(start, models[1], None)
