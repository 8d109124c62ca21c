"""Optimizers against plain ones, and Muon in every layout; test_checkpoint_reshard.py moves their checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from plt_megatron.config.schema import DecayFactors, RateFactors, RunConfig
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.cases import Case, Layout
from tests.distributed.params import slow
from tests.reference.plain_muon import PlainMuon

MUON = {"lr": 0.02, "min_lr": 0.01, "name": "muon"}
EXPERTS = {"moe.num_experts": 4, "moe.ffn_hidden_size": 24}
FACTORS: dict[str, Any] = {
    "lr_mult": RateFactors(embedding=0.5, head=0.7, hidden=1.5, gates=3.0, norms=0.25),
    "wd_mult": DecayFactors(embedding=0.0, head=2.0, hidden=0.5, gates=1.5, norms=1.0),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {
        "muon_coefficient_type": "simple",
        "muon_nesterov": False,
        "muon_scale_mode": "shape_scaling",
        "muon_num_ns_steps": 3,
    },
    {
        "muon_coefficient_type": "polar_express",
        "muon_num_ns_steps": 4,  # each triples the rounding of the directions that have least
        "muon_momentum": 0.5,
        "muon_scale_mode": "unit_rms_norm",
        "muon_extra_scale_factor": 1.0,
        **FACTORS,
    },
    {"name": "adam", **FACTORS},
    {"name": "sgd", "lr": 0.3, "weight_decay": 0.1},
    {"name": "sgd", **FACTORS},
]


# By the end of a name, as the tests see it: the rest is Adam's.
HIDDEN = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight", "router.weight")


def beside_a_plain_one(configs: list[RunConfig]) -> list[dict[str, float]]:
    """For each configuration, by parameter: the largest difference, relative to the parameter's largest change over
    four steps and beyond fp32's rounding of the weights, between the engine's and a plain optimizer's on the same
    gradients."""
    return [_beside_a_plain_one(config) for config in configs]


def _beside_a_plain_one(config: RunConfig) -> dict[str, float]:
    engine = jobs.build(config)
    settings = config.optimizer
    start = {name: parameter.detach().double().clone() for name, parameter in engine.stage.named_parameters()}
    plain = {name: _plain(name, value.clone(), config) for name, value in start.items()}

    def plain_step(loss: float, norm: float) -> bool:
        clip = min(1.0, settings.clip_grad / (norm + 1e-6))
        for name, parameter in engine.stage.named_parameters():
            kind = _kind(name)
            rate = engine.scheduler.lr * getattr(settings.lr_mult, kind)
            decay = settings.weight_decay * getattr(settings.wd_mult, kind)
            if parameter.dim() == 1 and kind != "norms":
                decay = 0.0
            plain[name].step(clip * parameter.main_grad.double(), rate, decay)
        return True

    for step in range(1, 5):
        engine.train_step(jobs.batches_of(step), plain_step)
    errors = {}
    for name, parameter in engine.stage.named_parameters():
        expected = plain[name].weight
        moved = (expected - start[name]).abs().max()
        assert moved > 0, name
        rounding = 4 * torch.finfo(torch.float32).eps * expected.abs()
        error = ((parameter.detach().double() - expected).abs() - rounding).clamp(min=0)
        errors[name] = float(error.max() / moved)
    return errors


def _kind(name: str) -> str:
    if name.endswith(HIDDEN):
        return "hidden"
    kinds = {"word_embeddings": "embedding", "output_layer": "head", "plt_gate": "gates"}
    return next((kind for part, kind in kinds.items() if part in name), "norms")


def _plain(name: str, weight: Tensor, config: RunConfig) -> Any:
    settings, model = config.optimizer, config.model
    if settings.name == "sgd":
        return _PlainSGD(weight, settings.sgd_momentum)
    if settings.name == "adam" or not name.endswith(HIDDEN):
        return _PlainAdam(weight, settings.adam_beta1, settings.adam_beta2, settings.adam_eps)
    rows = torch.arange(len(weight))
    parts = [rows]
    if name.endswith("linear_fc1.weight"):  # gate, up
        parts = list(rows.chunk(2))
    elif name.endswith("linear_qkv.weight"):  # of each query group its queries, its key, its value
        head = model.hidden_size // model.num_attention_heads
        groups = rows.view(model.num_query_groups, -1)
        parts = [each.flatten() for each in (groups[:, : -2 * head], groups[:, -2 * head : -head], groups[:, -head:])]
    return PlainMuon(
        weight,
        momentum=settings.muon_momentum,
        nesterov=settings.muon_nesterov,
        steps=settings.muon_num_ns_steps,
        kind=settings.muon_coefficient_type,
        size=settings.muon_scale_mode,
        scale=settings.muon_extra_scale_factor,
        rows=parts,
    )


class _PlainSGD:
    def __init__(self, weight: Tensor, momentum: float) -> None:
        self.weight, self.momentum, self.moving = weight, momentum, torch.zeros_like(weight)

    def step(self, gradient: Tensor, rate: float, decay: float) -> None:
        self.moving = self.momentum * self.moving + gradient + decay * self.weight
        self.weight = self.weight - rate * self.moving


class _PlainAdam:
    def __init__(self, weight: Tensor, beta1: float, beta2: float, eps: float) -> None:
        self.weight, self.beta1, self.beta2, self.eps = weight, beta1, beta2, eps
        self.mean, self.square, self.count = torch.zeros_like(weight), torch.zeros_like(weight), 0

    def step(self, gradient: Tensor, rate: float, decay: float) -> None:
        self.count += 1
        self.mean = self.beta1 * self.mean + (1 - self.beta1) * gradient
        self.square = self.beta2 * self.square + (1 - self.beta2) * gradient**2
        mean = self.mean / (1 - self.beta1**self.count)
        square = self.square / (1 - self.beta2**self.count)
        self.weight = (1 - rate * decay) * self.weight - rate * mean / (square.sqrt() + self.eps)


def _config(**settings: Any) -> Any:
    config = jobs.run_config(optimizer="muon", share_embeddings_and_output_weights=not settings)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **{"lr": 0.02, **settings}))


def test_updates_are_those_of_plain_optimizers(run_distributed):
    """The gradient of a looped model's weight is that of all its loops, and Muon orthogonalizes it once."""
    for settings, errors in zip(
        SETTINGS,
        run_distributed(beside_a_plain_one, 1, [_config(**settings) for settings in SETTINGS]),
        strict=True,
    ):
        assert len(errors) > 15 and sum(name.endswith(HIDDEN) for name in errors) == 2 * 4
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-5, f"{settings}: {worst} is off by {errors[worst]:.1e}"


@pytest.mark.parametrize(
    ("layout", "overlap"),
    [
        ("TP2 DP2", True),
        *(slow(layout, True) for layout in ("TP2 SP DP2", "TP2 SP PP2 DP2", "PP2 DP2", "DP2 EP2")),
        *(slow(layout, False) for layout in ("DP4", "TP2 CP2", "TP2 SP EP2")),
    ],
    ids=str,
)
def test_every_layout_has_the_numbers_of_one_process(check, layout, overlap):
    """A matrix is orthogonalized as a whole however tensor-parallel ranks divide it, and once whoever holds it."""
    gather = {"overlap_param_gather": True} if overlap else {}
    model = EXPERTS if "EP" in layout else {}
    check(Layout.of(layout), [Case(overlap=overlap, optimizer=MUON, model=model, parallel=gather)], "Muon")
