"""The moving average of the weights in whole runs: torch's own, resumed, in other layouts, validated, exported."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plt_megatron.config.schema import ParallelConfig, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.hf.averaging import AverageOptions, average
from plt_megatron.hf.conversion import mappings_for
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.train.callbacks.base import Callback
from plt_megatron.train.checkpoint.reading import Weights, read_weights, stored_at
from tests.distributed.checkpoint_jobs import edit_progress, stored_tensors
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import as_after_step, folder, numbers

DECAY = 0.75
TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
DP = {"overlap_grad_reduce": True}  # and gathers weights during the next forward pass
EP = {"expert_model_parallel_size": 2}
ONE_ROW = {"micro_batch_size": 1, "ema_decay": DECAY}


class Reference(Callback):
    """torch's own average of the whole weights, after each update."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.names = [name for name, _ in run.engine.stage.named_parameters()]
        self.model = torch.nn.ParameterList(p.detach().clone() for p in run.engine.stage.parameters())
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def after_step(self, step: Any, result: Any) -> None:
        if result.updated:
            self.run.engine.gather_parameters()
            with torch.no_grad():
                for own, weight in zip(self.model, self.run.engine.stage.parameters(), strict=True):
                    own.copy_(weight)
            self.average.update_parameters(self.model)

    def on_save(self, checkpoint: Path) -> None:
        self.saved = copy.deepcopy(self.average)

    def on_rollback(self, state: dict[str, Any]) -> None:
        self.average = copy.deepcopy(self.saved)


def train_beside_reference(config: RunConfig, bad_step: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """torch's average at the end of a run, and the validation loss of a model that has it, by loop count."""
    from plt_megatron.train import trainer

    runs: list[Reference] = []

    def kept(run: Any) -> Reference:
        runs.append(Reference(run))
        return runs[-1]

    with mock.patch.object(trainer, "CALLBACKS", (*trainer.CALLBACKS, kept)):
        assert train(config, bad_step) is True
    (reference,) = runs
    average = dict(zip(reference.names, (p.detach() for p in reference.average.module), strict=True))
    return average, _losses_with(reference.run, average, config)


def _losses_with(run: Any, weights: dict[str, torch.Tensor], config: RunConfig) -> dict[str, float]:
    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.megatron_engine import MegatronEngine

    init_process_groups(config.parallel)
    run.engine = MegatronEngine(config, run.data.vocab_size)
    with torch.no_grad():
        for name, parameter in run.engine.stage.named_parameters():
            parameter.copy_(weights[name])
    (validation,) = [callback for callback in run.callbacks if type(callback).__name__ == "Validation"]
    return {str(loops): validation._measure(loops)["loss"] for loops in (1, 2)}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory, run_distributed) -> tuple[RunConfig, Any]:
    """Six steps of one process in fp32, the second of them bad."""
    config = run_config("alone", tmp_path_factory.mktemp("runs"), data, training={"ema_decay": DECAY})
    config.checkpoint.keep_last = 3
    return config, run_distributed(train_beside_reference, 1, config, bad_step=2)


def average_of(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    return dict(read_weights(folder(config) / "checkpoints" / f"step_{step:08d}", part="ema"))


def test_the_average_is_torchs(alone):
    config, (expected, _) = alone
    assert_is_torchs(config, expected, updates=5)  # not of the bad step


@pytest.mark.slow
def test_a_rollback_brings_back_the_average_of_its_checkpoint(data, tmp_path, run_distributed):
    training = {"ema_decay": DECAY, "on_nonfinite": "rollback"}
    config = run_config("rolled back", tmp_path, data, training=training)
    expected, _ = run_distributed(train_beside_reference, 1, config, bad_step=4)  # the third is undone
    assert_is_torchs(config, expected, updates=6)


def assert_is_torchs(config: RunConfig, expected: dict[str, torch.Tensor], updates: int) -> None:
    ours = average_of(config, 6)
    progress = json.loads((folder(config) / "checkpoints/step_00000006/progress.json").read_text())
    assert progress["ema"] == {"updates": updates}
    assert len(ours) == len(expected)
    weights = dict(read_weights(folder(config)))
    for name, tensor in expected.items():
        own = ours[name][: len(tensor)]
        assert own.dtype == torch.float32 and torch.equal(own, tensor[: len(own)]), name
    assert not any(torch.equal(ours[name], weights[name]) for name in ours)


def test_the_average_is_validated_beside_the_weights(alone):
    config, (_, losses) = alone
    last = [record for record in numbers(config, "validation") if record["step"] == 6]
    for record in last:
        assert record["ema_loss"] == pytest.approx(losses[str(record["loop_count"])], rel=1e-6)
        assert record["ema_loss"] != record["loss"]
    assert [record["loop_count"] for record in last] == [1, 2]


@pytest.mark.slow
def test_a_run_without_the_average_has_the_same_weights(alone, tmp_path, run_distributed):
    """Nor does the average stay: a run that takes it up again begins anew."""
    config, _ = alone
    other = as_after_step(config, 4, "without", tmp_path, training={"ema_decay": None})
    assert run_distributed(train, 1, other) is True
    assert [record["loss"] for record in numbers(other)] == [record["loss"] for record in numbers(config)]
    assert all(
        torch.equal(tensor, dict(read_weights(folder(config)))[name]) for name, tensor in read_weights(folder(other))
    )
    with pytest.raises(UserError, match=r"step_00000006 has no ema"):
        average_of(other, 6)


@pytest.fixture(scope="module")
def shared_out(data, tmp_path_factory, run_distributed) -> RunConfig:
    """Six steps in bf16 on two data-parallel ranks, which gather weights during the next forward pass."""
    training = {"ema_decay": DECAY, "precision": "bf16"}
    config = run_config("shared", tmp_path_factory.mktemp("runs"), data, parallel=DP, training=training)
    assert run_distributed(train, 2, config) is True
    return config


def test_it_goes_on_bit_for_bit(shared_out, tmp_path, run_distributed):
    config = as_after_step(shared_out, 4, "resumed", tmp_path, checkpoint={"async_save": True})
    assert run_distributed(train, 2, config) is True
    assert numbers(config) == numbers(shared_out)
    ours, theirs = average_of(config, 6), average_of(shared_out, 6)
    assert ours.keys() == theirs.keys() and len(ours) >= 10
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.float32 for name in ours)


@pytest.fixture(scope="module")
def moved(alone, tmp_path_factory, run_distributed) -> RunConfig:
    """The run of one process, gone on from step 4 on two data-parallel ranks."""
    config = as_after_step(alone[0], 4, "moved", tmp_path_factory.mktemp("runs"), parallel=DP)
    assert run_distributed(train, 2, config) is True
    return config


def test_it_goes_on_in_another_layout(alone, moved):
    assert_same_average(moved, alone[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "world_size", "changes"),
    [
        pytest.param(TP_SP, 2, {}, id="TP2"),
        pytest.param(PP, 2, {"micro_batch_size": 1}, id="PP2"),
        pytest.param(TP_SP | PP | DP, 8, {"micro_batch_size": 1}, id="TP2xPP2xDP2"),
        pytest.param({"context_parallel_size": 2} | DP, 2, {}, id="CP2"),
    ],
)
def test_it_goes_on_in_any_layout(alone, tmp_path, run_distributed, parallel, world_size, changes):
    config, _ = alone
    other = as_after_step(config, 4, "moved", tmp_path, parallel=parallel, training=changes)
    assert run_distributed(train, world_size, other) is True
    assert_same_average(other, config)


def assert_same_average(other: RunConfig, config: RunConfig) -> None:
    ours, theirs = average_of(other, 6), average_of(config, 6)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=name)
    for one, another in zip(numbers(other, "validation"), numbers(config, "validation"), strict=True):
        assert one["ema_loss"] == pytest.approx(another["ema_loss"], rel=1e-5)


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.slow
def test_experts_have_averages_too(data, tmp_path, run_distributed):
    """Theirs is an optimizer of its own; EP2 x DP2 against one process. Biases go along as they are."""
    experts = {
        "moe.num_experts": 4,
        "moe.ffn_hidden_size": 16,
        "moe.router_score_function": "sigmoid",
        "moe.router_bias_update_rate": 1e-3,
    }
    runs = [
        run_config(name, tmp_path, data, model=experts, parallel=layout, training=ONE_ROW)
        for name, layout in (("one", {}), ("four", EP))
    ]
    for config, size in zip(runs, (1, 4), strict=True):
        assert run_distributed(train, size, config) is True
    assert_same_average(runs[1], runs[0])
    ours = average_of(runs[1], 6)
    assert any(".experts.3." in name for name in ours)
    bias = "decoder.layers.1.mlp.router.expert_bias"
    assert torch.equal(ours[bias], dict(read_weights(folder(runs[1])))[bias]) and ours[bias].any()
    export(ExportOptions(folder(runs[0]), tmp_path / "ema", ema=True, verify=True), say=lambda line: None)


def test_the_average_is_exported(alone, tmp_path):
    config, (expected, _) = alone
    export(ExportOptions(folder(config), tmp_path / "ema", ema=True), say=lambda line: None)
    tensors = load_file(tmp_path / "ema" / "model.safetensors")
    vocab_size = json.loads((tmp_path / "ema/config.json").read_text())["vocab_size"]
    for mapping in mappings_for(config.model, vocab_size):
        ours = mapping.to_megatron([tensors[name] for name, _ in mapping.hf])
        assert torch.equal(ours, expected[mapping.name][: len(ours)]), mapping.name
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "a moving average over 5 updates, decay 0.75" in card
    last = numbers(config, "validation")[-1]
    assert f"| loss with 2 loops | {last['ema_loss']:.4f} |" in card


def test_what_has_no_average_is_not_exported_as_one(alone, tmp_path):
    config, _ = alone
    other = as_after_step(config, 4, "plain", tmp_path)
    path = folder(other) / "checkpoints" / "step_00000004"
    edit_progress(path, lambda progress: progress.update(ema={"updates": 0}))
    with pytest.raises(UserError, match=r"step_00000004 has no moving average of its weights: .*ema_decay"):
        export(ExportOptions(path, tmp_path / "out", ema=True), say=lambda line: None)
    export(ExportOptions(folder(config), tmp_path / "hf"), say=lambda line: None)
    with pytest.raises(UserError, match="a Hugging Face folder has one set of weights; leave --ema out"):
        export(ExportOptions(tmp_path / "hf", tmp_path / "out", ema=True), say=lambda line: None)


# plt average


def raw_main_weights(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """The optimizer's, as torch reads them."""
    prefix = "optimizer.state.param."
    tensors = stored_tensors(folder(config) / "checkpoints" / f"step_{step:08d}", prefix)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


@pytest.mark.slow
def test_checkpoints_of_two_layouts_are_averaged_and_a_run_starts_from_it(alone, moved, tmp_path, run_distributed):
    config, _ = alone
    sources = [f"{folder(config)}@4", f"{folder(moved)}@6"]
    result = average(AverageOptions(sources, tmp_path / "averaged", weights=[1, 3]), say=lambda line: None)
    assert result.shares == [0.25, 0.75] and result.precision == "fp32"
    one, other = raw_main_weights(config, 4), raw_main_weights(moved, 6)
    ours = Weights(result.checkpoint)
    for name in ours.names:
        key, place = stored_at(name)
        rows = slice(0, len(ours.read(name)))
        expected = 0.25 * one[key][place][rows].double() + 0.75 * other[key][place][rows].double()
        assert torch.equal(ours.read(name), expected.float()), name
    started = dataclasses.replace(moved, name="started", output_dir=str(tmp_path), parallel=ParallelConfig(**TP_SP))
    started.checkpoint = dataclasses.replace(moved.checkpoint, load=str(tmp_path / "averaged"), weights_only=True)
    started.training = dataclasses.replace(moved.training, train_iters=1, ema_decay=None)
    started.optimizer = dataclasses.replace(moved.optimizer, lr=1e-12, min_lr=0, lr_warmup_iters=0)
    assert run_distributed(train, 2, started) is True
    after = dict(read_weights(folder(started)))
    for name in ours.names:
        torch.testing.assert_close(after[name], ours.read(name), rtol=0, atol=1e-9, msg=name)


def test_moving_averages_are_averaged_of_fp32_where_the_run_is_in_bf16(shared_out, tmp_path):
    sources = [f"{folder(shared_out)}@4", f"{folder(shared_out)}@6"]
    plain = average(AverageOptions(sources, tmp_path / "plain", precision="fp32"), say=lambda line: None)
    both = raw_main_weights(shared_out, 4), raw_main_weights(shared_out, 6)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    key, place = stored_at(name)
    expected = (both[0][key][place].double() + both[1][key][place].double()) / 2
    assert torch.equal(Weights(plain.checkpoint).read(name), expected.float())
    ema = average(AverageOptions(sources[1:], tmp_path / "ema", ema=True), say=lambda line: None)
    assert ema.precision == "bf16"
    assert torch.equal(Weights(ema.checkpoint).read(name), average_of(shared_out, 6)[name].bfloat16())
    with pytest.raises(UserError, match="alone is its own average"):
        average(AverageOptions(sources[1:], tmp_path / "one"), say=lambda line: None)
