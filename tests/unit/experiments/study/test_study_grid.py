"""A study's runs: lengths, branches and where these start; and the shapes that a decision is about."""

from __future__ import annotations

import dataclasses

import pytest

from plt_megatron.config import derived
from plt_megatron.config.branching import first_decay_step
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import read_study
from plt_megatron.experiments.study.grid import Grid, make_grid, source_of, start_step, trained_steps
from plt_megatron.experiments.study.knowledge import _ladder, make_candidates
from plt_megatron.predict.parameters import count_parameters
from tests.unit.experiments.study.study_helpers import STUDY, write_study


@pytest.fixture
def grid(tmp_path) -> Grid:
    return make_grid(read_study(write_study(tmp_path), [f"output_dir={tmp_path}"]))


def test_arms_are_every_size_wiring_and_seed_and_one_loop_serves_all(grid):
    names = [own.name for own in grid.arms]
    assert len(names) == len(set(names)) == 3 * (1 + 2 * 2) * 2
    assert "every-s-1x-seed1" in names and "naive_loop-l-3x-seed2" in names
    for own in grid.arms:
        counted = count_parameters(own.config.model, 256)
        assert own.once + own.looped == counted.non_embedding
        assert own.once == counted.final_norm
        assert own.config.model.loop_count == own.loops and own.config.training.seed == own.seed


def test_runs_have_their_horizons_and_one_order_of_samples(grid):
    runs = grid.planned([(0, 5120.0), (0, 2560.0), (0, 1280.0)], 1, [])
    assert [run.tokens for run in runs] == [5120, 2560, 1280]
    assert [first_decay_step(run.config) for run in runs] == [64, 32, 16]
    assert {run.config.data.order_samples for run in runs} == {160}
    assert {run.config.checkpoint.keep_every for run in runs} == {16}
    for run in runs:
        assert not find_problems(run.config, check_files=False)
        assert derived.lr_decay_iters(run.config) == derived.train_iters(run.config)


def test_shorter_horizons_branch_from_the_longest(grid):
    trunk, middle, short = grid.planned([(0, 5120.0), (0, 2560.0), (0, 1280.0)], 1, [])
    assert source_of(trunk) is None and start_step(trunk) == 0 and trained_steps(trunk) == 80
    for run, step in ((middle, 32), (short, 16)):
        assert source_of(run) == trunk.name and start_step(run) == step == first_decay_step(run.config)
        assert run.config.checkpoint.load == f"{trunk.folder.path}/checkpoints/step_{step:08d}"
        assert trained_steps(run) == step // 4 and run.config.checkpoint.allow_other_schedule
        assert run.change == f"branch of {trunk.name} at step {step}"


def test_a_longer_horizon_of_a_later_round_goes_on_where_the_rate_began_to_fall(grid):
    first = grid.planned([(0, 1280.0)], 1, [])
    second = grid.planned([(0, 5120.0)], 2, first)
    assert source_of(second[0]) == first[0].name and start_step(second[0]) == 16 and trained_steps(second[0]) == 64
    (third,) = grid.planned([(0, 2560.0)], 3, [*first, *second])
    assert source_of(third) == second[0].name and start_step(third) == 32
    (other,) = grid.planned([(1, 1280.0)], 2, first)
    assert source_of(other) is None, "another seed's"


STAGES = "{training.loop_schedule: [{until: 0.5, loop_count: 1}, {loop_count: 2}]}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[1280, 2560, 5120]", "[1280, 1300, 5120]", "horizons are too close together for steps of 64 tokens"),
        (
            "L: {",
            "L: {training.batch_schedule: [{until: 640, global_batch_size: 1}], ",
            "training.batch_schedule: a study's runs and branches have one batch size",
        ),
        ("variants:", f"variants:\n  staged: {STAGES}", "training.loop_schedule has 2 stages, which end at shares"),
        ("L: {model.hidden_size: 64", "L: {model.hidden_size: 66", r"size L, every, 1 loop: .*66"),
        ("set: {", "set: {model.loop_span: [0, 1], ", "model.loop_span: a study's law needs all layers to loop; leave"),
        ("set: {", "set: {checkpoint.enabled: false, ", "checkpoint.enabled: a study's runs branch from checkpoints"),
        ("lr_warmup_iters: 4", "lr_warmup_iters: 60", "optimizer.lr_warmup_iters 60"),
        ("  M:", "  s:", "'every, S, 1,280 tokens' and 'every, s, 1,280 tokens' would both be every-s-1x-seed1-1.28k"),
        ("  naive loop:", "  plt+:", "'PLT, S, 1,280 tokens' and 'plt+, S, 1,280 tokens' would both be plt-s-2x-seed1"),
    ],
    ids=[
        "horizons",
        "batches",
        "stages of loops",
        "a size",
        "layers that run once",
        "no checkpoints",
        "warm-up",
        "case",
        "signs",
    ],
)
def test_what_no_study_can_be_made_of_is_refused(tmp_path, old, new, said):
    path = write_study(tmp_path, STUDY.replace(old, new, 1))
    with pytest.raises(UserError, match=said.replace("plt+", r"plt\+")):
        make_grid(read_study(path))


@pytest.mark.parametrize(
    ("old", "new", "settings", "rates"),
    [
        ("128}", "128, optimizer.lr: 7e-4}", [], {"S": 3e-4 * 2**0.5, "M": 3e-4, "L": 7e-4}),
        ("set: {", "set: {optimizer.lr: 1e-3, ", [], {"S": 1e-3 * 2**0.5, "M": 1e-3, "L": 1e-3 / 2**0.5}),
        ("", "", ["optimizer.lr=1e-3"], {"S": 1e-3 * 2**0.5, "M": 1e-3, "L": 1e-3 / 2**0.5}),
    ],
    ids=["a size's", "every run's", "the command line's"],
)
def test_rates_follow_the_width_where_a_size_has_none_of_its_own(tmp_path, old, new, settings, rates):
    path = write_study(tmp_path, STUDY.replace(old, new))
    grid = make_grid(read_study(path, ["lr_exponent_of_width=0.5", *settings]))
    assert {own.size: own.config.optimizer.lr for own in grid.arms} == pytest.approx(rates)


def test_a_sizes_own_lowest_rate_does_not_follow_the_width(tmp_path):
    text = STUDY.replace("ffn_hidden_size: 128}", "ffn_hidden_size: 128, optimizer.min_lr: 1e-6}")
    grid = make_grid(read_study(write_study(tmp_path, text), ["lr_exponent_of_width=0.5"]))
    assert {own.config.optimizer.min_lr for own in grid.arms if own.size == "L"} == {1e-6}


def test_shapes_are_the_largest_sizes_at_its_proportions(grid):
    candidates = make_candidates(grid, {("", 1): 1e9})
    single = [c for c in candidates if c.loops == 1]
    naive = [c for c in candidates if c.variant == "naive loop" and c.loops == 2]
    assert len(single) > 20 and len(naive) == len(single)
    sizes = [c.once + c.looped for c in single]
    assert sizes == sorted(sizes) and sizes[0] < 1e4 and sizes[-1] > 1e11
    largest = next(own for own in grid.arms if own.size == "L" and own.loops == 1)
    own = min(single, key=lambda c: abs(c.looped - largest.looped))
    assert own.looped == largest.looped
    assert all(c.seconds == c.flops / 1e9 for c in single) and all(c.seconds is None for c in naive)
    for one, looped in zip(single, naive, strict=True):
        assert looped.latency_ms > 1.3 * one.latency_ms or looped.looped < 1e5
        assert looped.flops > one.flops and looped.memory > one.memory
    plt = [c for c in candidates if c.variant == "PLT" and c.loops == 2]
    assert plt[-1].latency_ms < 1.05 * single[-1].latency_ms


def test_shapes_with_experts_have_their_share_of_dense_layers(tmp_path):
    experts = (
        "model.num_layers: 8, model.moe.num_experts: 4, model.moe.router_topk: 2, model.moe.first_k_dense_replace: 3"
    )
    study = read_study(write_study(tmp_path, STUDY.replace("set: {", f"set: {{{experts}, ")))
    config = next(own.config for own in make_grid(study).arms if own.size == "L" and own.loops == 1)
    for model in (scaled.model for scaled in _ladder(config)):
        dense = model.moe.first_k_dense_replace
        assert dense < model.num_layers and abs(dense - model.num_layers * 3 / 8) <= 1


def test_a_grid_is_the_same_wherever_it_is_made(grid, tmp_path):
    again = make_grid(read_study(tmp_path / "study.yaml", [f"output_dir={tmp_path}"]))
    assert [dataclasses.asdict(own.config) for own in again.arms] == [dataclasses.asdict(o.config) for o in grid.arms]
