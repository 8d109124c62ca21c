"""Optimizers of the registry in the engine: against plain ones, in other layouts, and not mixed up."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.distributed import checkpoint_jobs as jobs

SGD = jobs.run_config(optimizer="sgd")
TP2_PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}


def _sgd_beside_a_plain_one(config):
    """The largest relative difference, beyond fp32's rounding of the weights, of a parameter's change over four steps:
    the engine's against plain arithmetic on the same gradients; and how many parameters decay."""
    import torch

    engine = jobs.build(config)
    settings = config.optimizer
    (part,) = engine.state.parts
    decay = {
        part.main_parameter(parameter).data_ptr(): group["weight_decay"]
        for parameter, _ in part.parameter_parts()
        for group in part.inner.param_groups
        if any(part.main_parameter(parameter) is main for main in group["params"])
    }
    start = {name: parameter.detach().double().clone() for name, parameter in engine.stage.named_parameters()}
    weights = {name: value.clone() for name, value in start.items()}
    momentum = {name: torch.zeros_like(value) for name, value in start.items()}

    def plain_step(loss: float, norm: float) -> bool:
        rate = engine.optimizer.param_groups[0]["lr"]
        clip = min(1.0, settings.clip_grad / (norm + 1e-6))
        for name, parameter in engine.stage.named_parameters():
            decayed = decay[part.main_parameter(parameter).data_ptr()]
            gradient = clip * parameter.main_grad.double() + decayed * weights[name]
            momentum[name] = settings.sgd_momentum * momentum[name] + gradient
            weights[name] = weights[name] - rate * momentum[name]
        return True

    for step in range(1, 5):
        engine.train_step(jobs.batches_of(step), plain_step)
    errors = []
    for name, parameter in engine.stage.named_parameters():
        moved = weights[name] - start[name]
        assert moved.abs().max() > 0, name
        rounding = 4 * torch.finfo(torch.float32).eps * weights[name].abs()
        error = ((parameter.detach().double() - weights[name]).abs() - rounding).clamp(min=0)
        errors.append(float(error.max() / moved.abs().max()))
    return max(errors), sum(value > 0 for value in decay.values()), len(decay)


def test_sgd_is_plain_sgd_with_momentum(run_distributed):
    config = dataclasses.replace(SGD, optimizer=dataclasses.replace(SGD.optimizer, lr=0.3, weight_decay=0.1))
    error, decaying, parameters = run_distributed(_sgd_beside_a_plain_one, 1, config)
    assert error < 1e-5
    assert 0 < decaying < parameters, "norms do not decay"


@pytest.mark.slow
def test_a_checkpoint_of_sgd_goes_on_in_another_layout(run_distributed, tmp_path):
    whole = run_distributed(jobs.train_and_save, 4, tmp_path, jobs.run_config(TP2_PP2, optimizer="sgd"), then=3)
    moved = run_distributed(jobs.load_and_train, 2, tmp_path, jobs.run_config(optimizer="sgd"))
    for ours, expected in zip(moved["after"], whole["after"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    assert moved["progress"]["schedule"]["optimizer.sgd_momentum"] == 0.9


def _errors_of_loading(folders):
    """Of each one's checkpoint into the other's engine, and whether its weights alone can be had."""
    from plt_megatron.errors import UserError
    from plt_megatron.train.checkpoint import load_checkpoint, load_weights, save_checkpoint

    engines = {name: jobs.build(jobs.run_config(optimizer=name)) for name in folders}
    errors = []
    for name, folder in folders.items():
        jobs.train(engines[name], 1, 1)
        save_checkpoint(engines[name], folder, {"step": 1})
    for name, other in (("sgd", "adam"), ("adam", "sgd"), ("muon", "adam"), ("adam", "muon")):
        for allow in (False, True):
            try:
                load_checkpoint(engines[name], folders[other], allow_other_schedule=allow)
            except UserError as error:
                errors.append(str(error))
        load_weights(engines[name], folders[other])
        jobs.train(engines[name], 1, 1)
    return errors


def test_an_optimizer_does_not_go_on_from_anothers_state(run_distributed, tmp_path):
    folders = {name: tmp_path / name for name in ("adam", "sgd", "muon")}
    errors = run_distributed(_errors_of_loading, 1, folders)
    assert [re.search(r"optimizer\.name (\w+ \(now \w+\))", error)[1] for error in errors] == [
        *["adam (now sgd)"] * 2,
        *["sgd (now adam)"] * 2,
        *["adam (now muon)"] * 2,
        *["muon (now adam)"] * 2,
    ]
    assert all("checkpoint.weights_only=true" in error and "\n" not in error for error in errors)
