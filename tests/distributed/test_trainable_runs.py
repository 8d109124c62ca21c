"""Runs of which some parameters are trained: their updates, the others' values, checkpoints and exports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plt_megatron.config.schema import RunConfig
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.model.trainable import is_trained
from plt_megatron.train.checkpoint.reading import read_weights
from tests.distributed.cases import BIASES
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import as_after_step, folder, numbers

TRAINABLE = ["layers.1", "plt_gate"]
ONE_STEP = {"train_iters": 1}


def weights(config: RunConfig, step: int, part: Any = "weights") -> dict[str, torch.Tensor]:
    return dict(read_weights(folder(config) / "checkpoints" / f"step_{step:08d}", part=part))


@pytest.mark.parametrize("parallel", [{}, {"recompute_granularity": "full"}])
def test_updates_are_those_of_a_run_that_trains_all(data, tmp_path, run_distributed, parallel):
    """Without clipping, a first step of Adam depends on a parameter's own gradient alone. Of recomputed
    layers, too, whose input has none of its own."""
    optimizer = {"clip_grad": 0.0, "lr_warmup_iters": 0}
    model = {"share_embeddings_and_output_weights": False}
    runs = {}
    for name, patterns, lr in (("part", TRAINABLE, 3e-3), ("all", [], 3e-3), ("none", [], 0.0)):
        training = {**ONE_STEP, "trainable": patterns}
        own = {**optimizer, "lr": lr, "min_lr": 0.0}
        config = run_config(name, tmp_path, data, model=model, training=training, optimizer=own, parallel=parallel)
        assert run_distributed(train, 1, config) is True
        runs[name] = weights(config, 1)
    moved = 0
    for tensor_name, tensor in runs["part"].items():
        trained = is_trained(TRAINABLE, tensor_name)
        assert torch.equal(tensor, runs["all" if trained else "none"][tensor_name]), tensor_name
        moved += not torch.equal(tensor, runs["none"][tensor_name])
    assert moved >= 5 and sum(not is_trained(TRAINABLE, name) for name in runs["part"]) >= 5


@pytest.fixture(scope="module")
def shared_out(data, tmp_path_factory, run_distributed) -> RunConfig:
    """Six steps in bf16 of a pipeline whose first stage has nothing to train but its gates."""
    training = {"trainable": TRAINABLE, "precision": "bf16", "ema_decay": 0.75}
    parallel = {"pipeline_model_parallel_size": 2}
    config = run_config("part", tmp_path_factory.mktemp("runs"), data, training=training, parallel=parallel)
    assert run_distributed(train, 2, config) is True
    return config


def test_it_goes_on_bit_for_bit(shared_out, tmp_path, run_distributed):
    config = as_after_step(shared_out, 4, "again", tmp_path)
    assert run_distributed(train, 2, config) is True
    assert numbers(config) == numbers(shared_out)
    for part in ("weights", "main weights", "ema"):
        ours, theirs = weights(config, 6, part), weights(shared_out, 6, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_it_goes_on_in_another_layout(shared_out, tmp_path, run_distributed):
    layout = {"pipeline_model_parallel_size": 1, "overlap_grad_reduce": True}
    config = as_after_step(shared_out, 4, "moved", tmp_path, parallel=layout)
    assert run_distributed(train, 2, config) is True
    ours, theirs = ([record["loss"] for record in numbers(run)] for run in (config, shared_out))
    assert ours == pytest.approx(theirs, rel=2e-3)  # bf16


@pytest.mark.parametrize("part", ["main weights", "ema"])
def test_what_is_not_trained_is_the_models_own_in_every_part(shared_out, part):
    own, precise = weights(shared_out, 6), weights(shared_out, 6, part)
    assert own.keys() == precise.keys()
    for name, tensor in own.items():
        assert precise[name].dtype == torch.float32
        assert torch.equal(precise[name], tensor.float()) != is_trained(TRAINABLE, name), name


def test_its_average_is_exported(shared_out, tmp_path):
    from safetensors.torch import load_file

    export(ExportOptions(folder(shared_out), tmp_path / "export", ema=True))
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    embedding = weights(shared_out, 6)["embedding.word_embeddings.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"].float(), embedding.float())


def test_what_only_the_last_stage_trains_goes_on_bit_for_bit(data, tmp_path, run_distributed):
    """The first rank, which writes the number of updates, makes none itself."""
    training, parallel = {"train_iters": 4, "trainable": ["layers.1"]}, {"pipeline_model_parallel_size": 2}
    config = run_config("last", tmp_path, data, training=training, parallel=parallel)
    assert run_distributed(train, 2, config) is True
    again = as_after_step(config, 2, "again", tmp_path / "again")
    assert run_distributed(train, 2, again) is True
    assert numbers(again) == numbers(config)


def test_experts_alone_are_trained_saved_and_loaded(data, tmp_path, run_distributed):
    """While they are shared out, megatron-core gives the other parameters an optimizer of nothing."""
    model = {"moe.num_experts": 4, "moe.ffn_hidden_size": 24}
    training = {"train_iters": 4, "trainable": ["mlp.experts"]}
    parallel = {"data_parallel_size": 2, "expert_model_parallel_size": 2}
    config = run_config("experts", tmp_path, data, model=model, training=training, parallel=parallel)
    assert run_distributed(train, 2, config) is True
    before, after = weights(config, 2), weights(config, 4)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != is_trained(["mlp.experts"], name), name
    again = as_after_step(config, 2, "again", tmp_path / "again", parallel={"expert_model_parallel_size": 1})
    assert run_distributed(train, 2, again) is True
    ours, theirs = ([record["loss"] for record in numbers(run)] for run in (again, config))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("trained", ["plt_gate", "mlp.router"])
def test_biases_of_frozen_routers_stay(data, tmp_path, run_distributed, trained):
    """megatron-core moves them without a gradient."""
    model = {"moe.num_experts": 4, "moe.ffn_hidden_size": 24, **BIASES, "moe.router_load_balancing_type": "none"}
    training = {"train_iters": 2, "trainable": [trained]}
    config = run_config("biases", tmp_path, data, model=model, training=training, checkpoint={"save_interval": 1})
    assert run_distributed(train, 1, config) is True
    before, after = weights(config, 1), weights(config, 2)
    biases = [name for name in before if name.endswith("expert_bias")]
    assert biases
    for name in biases:
        assert torch.equal(before[name], after[name]) == (trained == "plt_gate"), name


def test_it_begins_with_the_weights_of_a_run_that_trained_all(data, tmp_path, run_distributed):
    whole = run_config("whole", tmp_path, data, training={"train_iters": 3})
    assert run_distributed(train, 1, whole) is True
    start = {"load": str(folder(whole)), "weights_only": True, "save_interval": 3}
    part = run_config("part", tmp_path, data, training={"train_iters": 3, "trainable": TRAINABLE}, checkpoint=start)
    assert run_distributed(train, 1, part) is True
    before, after = weights(whole, 3), weights(part, 3)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != is_trained(TRAINABLE, name), name
