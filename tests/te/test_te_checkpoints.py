"""Checkpoints of Transformer Engine's layers: weights and optimizer state move to and from the torch spec, FP8 state is
saved, restored and resharded, and exports know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.distributed import checkpoint_jobs
from tests.distributed.parity_checks import judge
from tests.te import te_jobs as jobs

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


def _torch() -> object:
    return checkpoint_jobs.run_config(backend="torch")


def _te(layout: dict | None = None) -> object:
    return checkpoint_jobs.run_config(layout, backend="te")


@pytest.fixture
def check_same(record_property) -> Callable[[Any, Any, str, str], None]:
    """Losses and gradient norms of a run that moved are those of one that stayed; how close goes into the table."""

    def check(ours: Any, expected: Any, start: str, end: str) -> None:
        assert len(ours) == len(expected) == 3
        off = np.abs(np.ravel(ours) / np.ravel(expected) - 1).max()
        assert not judge(record_property, {start: float(off)}, "checkpoints between backends, saved at", end, start)

    return check


def test_torchs_layers_and_optimizer_go_on_as_transformer_engines(run_distributed, run_te, tmp_path, check_same):
    """Saved by a process without Transformer Engine, with torch's Adam; loaded with its layers and its Adam."""
    expected = run_distributed(checkpoint_jobs.train_and_save, 1, tmp_path, _torch(), then=3)["after"]
    check_same(run_te(jobs.load_then_go_on, 1, tmp_path, _te(), 3)["after"], expected, "torch TP1", "te TP1")
    check_same(run_te(jobs.load_then_go_on, 2, tmp_path, _te(TP2_SP), 3)["after"], expected, "torch TP1", "te TP2 SP")


def test_one_loop_goes_on_with_two_as_with_torchs_adam(run_distributed, run_te, tmp_path, check_same):
    """The gates' first updates too, although Transformer Engine's Adam counts a group's updates."""
    one = checkpoint_jobs.run_config(backend="torch", loop_count=1)
    run_distributed(checkpoint_jobs.train_and_save, 1, tmp_path, one)
    expected = run_distributed(checkpoint_jobs.load_and_train, 1, tmp_path, _torch())["after"]
    check_same(run_te(jobs.load_then_go_on, 1, tmp_path, _te(), 3)["after"], expected, "torch TP1, one loop", "te TP1")


def _gates_after_a_step_of_one_loop(config: Any) -> list[float]:
    """The gates' weights after their first update, which follows a step that does not use them."""
    from plt_megatron.model.parameters import only_in_loops

    engine = checkpoint_jobs.build(config)
    for loops in (1, 2):
        engine.train_step(checkpoint_jobs.batches_of(loops), loop_count=loops)
    gates = [parameter for name, parameter in engine.stage.named_parameters() if only_in_loops(name)]
    return [value for gate in gates for value in gate.flatten().tolist()]


def test_gates_that_a_step_has_left_out_start_as_with_torchs_adam(run_distributed, run_te):
    expected = run_distributed(_gates_after_a_step_of_one_loop, 1, _torch())
    assert any(expected)
    assert run_te(_gates_after_a_step_of_one_loop, 1, _te()) == pytest.approx(expected, rel=0.01)


def test_muon_goes_on_bit_for_bit_without_a_matrix_to_train(run_te, tmp_path):
    """As on a pipeline stage without layers."""
    config = checkpoint_jobs.run_config(optimizer="muon", backend="te")
    config.training.trainable = ["plt_gate"]
    expected = run_te(jobs.save_then_go_on, 1, tmp_path, config)["after"]
    assert run_te(jobs.load_then_go_on, 1, tmp_path, config)["after"] == expected


def test_transformer_engines_go_on_as_torchs(run_distributed, run_te, tmp_path, check_same):
    expected = run_te(jobs.save_then_go_on, 2, tmp_path, _te(PP2), 3, 3)["after"]
    moved = run_distributed(checkpoint_jobs.load_and_train, 1, tmp_path, _torch(), then=3)["after"]
    check_same(moved, expected, "te PP2", "torch TP1")


def test_experts_move_between_one_after_another_and_grouped(run_distributed, run_te, tmp_path, check_same):
    model = {
        "moe.num_experts": 4,
        "moe.ffn_hidden_size": 24,
        "moe.first_k_dense_replace": 1,
        "moe.router_score_function": "sigmoid",
        "moe.router_bias_update_rate": 1e-3,
    }
    plain = checkpoint_jobs.run_config(backend="torch", **model)
    grouped = checkpoint_jobs.run_config({"expert_model_parallel_size": 2}, backend="te", **model)
    expected = run_distributed(checkpoint_jobs.train_and_save, 1, tmp_path / "plain", plain, then=3)["after"]
    moved = run_te(jobs.load_then_go_on, 2, tmp_path / "plain", grouped, 3)["after"]
    check_same(moved, expected, "torch TP1, experts", "te EP2")
    expected = run_te(jobs.save_then_go_on, 2, tmp_path / "grouped", grouped, 3, 3)["after"]
    moved = run_distributed(checkpoint_jobs.load_and_train, 1, tmp_path / "grouped", plain, then=3)["after"]
    check_same(moved, expected, "te EP2, experts", "torch TP1")


# ---------------------------------------------------------------- FP8


@pytest.fixture(scope="module")
def saved(run_te, tmp_path_factory):
    """Two steps with delayed scaling, saved; and what two more gave."""
    directory = tmp_path_factory.mktemp("fp8")
    return directory, run_te(jobs.save_then_go_on, 1, directory, jobs.checkpoint_config({}, "delayed"))


def _assert_same_state(ours, expected) -> None:
    # Linear layers and the global attention of two layers, each with forward and backward scales.
    assert ours.keys() == expected.keys() and len(ours) == 2 * 2 * (jobs.WEIGHTS_PER_LAYER + 1)
    for name, (scale, history) in expected.items():
        assert np.array_equal(ours[name][0], scale) and np.array_equal(ours[name][1], history), name


def test_fp8_state_survives_a_resume_bit_for_bit(run_te, saved):
    directory, whole = saved
    resumed = run_te(jobs.load_then_go_on, 1, directory, jobs.checkpoint_config({}, "delayed"))
    _assert_same_state(resumed["fp8"], whole["fp8"])
    assert any((scale != 1).any() for scale, _ in whole["fp8"].values()), "scales have moved from where they start"
    assert any(np.count_nonzero(history) > 0 for _, history in whole["fp8"].values())
    assert resumed["after"] == whole["after"]


def test_experts_in_fp8_resume_bit_for_bit_and_move_between_ranks(run_te, tmp_path):
    model = {"moe.num_experts": 4, "moe.ffn_hidden_size": 64, "moe.first_k_dense_replace": 1}

    def config(**layout: int) -> Any:
        return jobs.checkpoint_config(layout, "tensorwise", **model)

    expected = run_te(jobs.save_then_go_on, 1, tmp_path, config())["after"]
    assert run_te(jobs.load_then_go_on, 1, tmp_path, config())["after"] == expected
    moved = run_te(jobs.load_then_go_on, 2, tmp_path, config(expert_model_parallel_size=2))["after"]
    for numbers, stayed in zip(moved, expected, strict=True):
        assert numbers[0] == pytest.approx(stayed[0], rel=0.02) and numbers[1] == pytest.approx(stayed[1], rel=0.2)


def test_without_the_saved_state_the_numbers_would_be_others(run_te, saved):
    directory, whole = saved
    fresh = run_te(jobs.load_then_go_on, 1, directory, jobs.checkpoint_config({}, "tensorwise"))
    assert fresh["after"] != whole["after"]


@pytest.mark.parametrize(("layout", "ranks"), [(TP2_SP, 2), (PP2, 2)], ids=["TP2 SP", "PP2"])
def test_fp8_state_survives_resharding(run_te, saved, layout, ranks):
    directory, whole = saved
    config = jobs.checkpoint_config(layout, "delayed")
    results = run_te(jobs.load_then_go_on, ranks, directory, config, all_ranks=True)
    _assert_same_state({name: state for result in results for name, state in result["fp8"].items()}, whole["fp8"])
    for numbers, expected in zip(results[0]["after"], whole["after"], strict=True):
        assert numbers[0] == pytest.approx(expected[0], rel=0.02) and numbers[1] == pytest.approx(expected[1], rel=0.2)


def test_a_checkpoint_moves_between_fp8_and_bf16(run_te, saved):
    """The state is dropped, and made anew, where the other has none."""
    directory, whole = saved
    config = jobs.checkpoint_config({}, "delayed")
    config.training.fp8 = None
    after = run_te(jobs.load_then_go_on, 1, directory, config)["after"]
    assert after[0][0] == pytest.approx(whole["after"][0][0], rel=0.02)


@pytest.mark.usefixtures("warm_starts")
def test_an_export_is_the_weights_alone(saved, tmp_path):
    from safetensors import safe_open

    from plt_megatron.hf.exporting import ExportOptions, export
    from plt_megatron.train.checkpoint.reading import read_weights

    directory, _ = saved
    names = [name for name, _ in read_weights(directory)]
    assert names and not any("_extra_state" in name for name in names)
    result = export(ExportOptions(directory, tmp_path / "exported", verify=True), say=lambda line: None)
    assert result.difference is not None and result.difference < 1e-4
    with safe_open(tmp_path / "exported" / "model.safetensors", "pt") as file:
        assert not any("extra" in name or "scale" in name or "amax" in name for name in file.keys())
