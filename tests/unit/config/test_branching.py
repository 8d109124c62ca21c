"""Decay branches: which settings make a run one, and what cannot branch."""

from __future__ import annotations

import dataclasses
import json

import pytest

from plt_megatron.commands import train
from plt_megatron.config.branching import branch_settings, decay_steps, first_decay_step
from plt_megatron.config.loader import load_config
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.run_folder import resuming
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.resuming import branch_config
from tests.unit.slurm.fake_slurm import write_checkpoint

TRUNK = [
    "name=trunk",
    "training.train_iters=100",
    "training.global_batch_size=4",
    "optimizer.lr_decay_style=WSD",
    "optimizer.lr_warmup_iters=5",
]


@pytest.fixture
def trunk(tmp_path) -> RunFolder:
    """A run's folder with a checkpoint of step 36."""
    config = load_config("configs/runs/plt2_tiny.yaml", [*TRUNK, f"output_dir={tmp_path / 'runs'}"])
    folder = RunFolder.of(config)
    folder.save_config(config)
    (folder.checkpoints / "step_00000036").mkdir(parents=True)
    return folder


def test_a_branch_is_the_run_of_its_length_from_the_trunks_checkpoint(trunk):
    config = branch_config(f"{trunk.path}@36", ["logging.log_interval=1"])
    assert (config.name, config.output_dir) == ("trunk_branch_36", str(trunk.path.parent))
    assert (config.training.train_iters, config.optimizer.lr_wsd_decay_iters) == (40, 4)
    assert first_decay_step(config) == 36 and decay_steps(36) == 4
    assert config.checkpoint.load == str(trunk.checkpoints / "step_00000036") and config.checkpoint.allow_other_schedule
    assert config.data.order_samples == 400, "the samples come in the trunk's order"
    assert config.logging.log_interval == 1 and config.model == trunk.config().model
    assert not [problem for problem in find_problems(config, check_files=False) if "order" in problem]


def test_the_order_is_the_one_that_the_trunk_has_drawn(trunk):
    """It may have begun with another batch, of which as many tokens are other samples."""
    drawn = {"format": 1, "data_fingerprint": {"sampling": {"seed": 1234, "num_samples": 403}}}
    (trunk.checkpoints / "step_00000036" / "progress.json").write_text(json.dumps(drawn))
    assert branch_config(f"{trunk.path}@36", []).data.order_samples == 403


def test_another_branch_of_the_same_name_does_not_go_on_with_the_first(trunk):
    first = branch_config(f"{trunk.path}@36", [])
    checkpoint = write_checkpoint(RunFolder.of(first).checkpoints, first, 38, data_fingerprint={})
    assert branch_config(f"{trunk.path}@36", []) == first
    for same in ([], ["checkpoint.allow_other_schedule=false"]):
        with pytest.raises(UserError, match=f"{checkpoint} was trained with .*lr_wsd_decay_iters 4 .now 8"):
            branch_config(f"{trunk.path}@36", same, 8)
    assert branch_config(f"{trunk.path}@36", ["checkpoint.allow_other_schedule=true"], 8).training.train_iters == 44


@pytest.mark.parametrize(("first", "later", "constant"), [(4, 32, True), (16, 4, False)])
def test_a_trunk_that_changed_its_batch_branches_by_the_tokens_that_it_has_seen(tmp_path, first, later, constant):
    """In a run given in tokens, whose schedule counts steps of the first batch; the decay is the last tenth."""
    length = ["training.train_iters=null", "training.train_tokens=1024000", f"output_dir={tmp_path}"]
    began, goes_on = (
        load_config("configs/runs/plt2_tiny.yaml", [*TRUNK, *length, f"training.global_batch_size={size}"])
        for size in (first, later)
    )
    folder = RunFolder.of(goes_on)
    folder.save_config(goes_on)
    tokens = 757_760 if constant else 942_080
    write_checkpoint(folder.checkpoints, began, 560, data_fingerprint={}, consumed_tokens=tokens)
    if constant:
        branch = branch_config(f"{folder.path}@560", [], 4)
        samples = (tokens + 4 * later * goes_on.data.sequence_length) // goes_on.data.sequence_length
        assert branch.training.train_iters == 564 and branch.data.order_samples >= samples
        assert not [line for line in find_problems(branch, check_files=False) if "order_samples" in line]
        path = folder.checkpoints / "step_00000560"
        progress = json.loads((path / "progress.json").read_text())
        resuming.check_schedule(path, progress, branch, allow_other=True)
        few = dataclasses.replace(branch, data=dataclasses.replace(branch.data, order_samples=samples - 1))
        with pytest.raises(UserError, match=f"order_samples.* reads {samples:,} samples"):
            resuming.check_schedule(path, progress, few, allow_other=True)
    else:
        with pytest.raises(UserError, match="to 921,600 tokens: it cannot branch at step 560, 942,080 tokens"):
            branch_config(f"{folder.path}@560", [], 4)


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ("{trunk}", [], r"expected RUN@STEP"),
        ("{trunk}@last", [], r"expected RUN@STEP"),
        ("{trunk}@40", [], r"no checkpoint of step 40; it has 36 \(.*keep_every.*\); .*plt train BRANCH"),
        ("{trunk}x@36", [], r"cannot read .*config.yaml"),
        ("{trunk}@36", ["name=trunk"], r"the branch needs a name of its own"),
        ("{trunk}@36", ["run.yaml"], r"takes its configuration from its run, not from run.yaml"),
    ],
)
def test_what_is_no_branch_is_refused(trunk, source, settings, said):
    with pytest.raises(UserError, match=said):
        branch_config(source.format(trunk=trunk.path), settings)


def test_a_branch_decays_over_some_steps(trunk):
    with pytest.raises(UserError, match="--decay-steps must be at least 1, got 0"):
        branch_config(f"{trunk.path}@36", [], 0)


@pytest.mark.parametrize(
    ("changes", "step", "decay", "said"),
    [
        (["optimizer.lr_decay_style=cosine"], 36, 4, "lr_decay_style cosine: only WSD runs"),
        ([], 4, 4, "constant rate from step 5 to 90: it cannot branch at step 4"),
        ([], 91, 4, "it cannot branch at step 91"),
        ([], 90, 20, "a branch of 110 steps is longer than trunk.*data.order_samples=440"),
        (
            ["training.loop_schedule=[{until: 0.5, loop_count: 1}, {loop_count: 2}]"],
            36,
            4,
            "trunk cannot branch: training.loop_schedule has 2 stages, which end at shares of a run's own length",
        ),
    ],
)
def test_a_trunk_that_cannot_branch_there_is_refused(changes, step, decay, said):
    config = load_config("configs/runs/plt2_tiny.yaml", [*TRUNK, *changes])
    with pytest.raises(UserError, match=said):
        branch_settings(config, "checkpoint", step, decay)


def test_a_branch_draws_the_trunks_loops():
    config = load_config("configs/runs/plt2_tiny.yaml", [*TRUNK, "training.loop_schedule=[{loop_shares: [0.5, 0.5]}]"])
    branch = load_config(
        "configs/runs/plt2_tiny.yaml",
        [*TRUNK, "training.loop_schedule=[{loop_shares: [0.5, 0.5]}]", *branch_settings(config, "checkpoint", 36, 4)],
    )
    trunks, own = ([LoopSchedule(each).loop_count(step, 0) for step in range(40)] for each in (config, branch))
    assert own == trunks and {*own} == {1, 2}


def test_the_order_of_samples_must_hold_the_runs(trunk):
    config = load_config("configs/runs/plt2_tiny.yaml", [*TRUNK, "data.order_samples=399"])
    (problem,) = [text for text in find_problems(config, check_files=False) if "order_samples" in text]
    assert "data.order_samples 399 must be between the 400 that the run reads" in problem


@pytest.mark.parametrize("arguments", [[], ["--decay-steps", "3", "run.yaml"]])
def test_the_command_line_takes_a_configuration_or_a_branch(arguments, capsys):
    with pytest.raises(SystemExit) as status:
        train.main(arguments)
    error = capsys.readouterr().err
    assert status.value.code == 2 and "CONFIG.yaml" in error and "--branch-from" in error
