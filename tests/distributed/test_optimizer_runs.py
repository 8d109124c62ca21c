"""Optimizers against plain ones, and Muon in every layout; test_checkpoint_reshard.py moves their checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from plt_megatron.config.schema import DecayFactors, RateFactors
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed import optimizer_jobs
from tests.distributed.cases import Case, Layout
from tests.distributed.params import slow

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


def _config(**settings: Any) -> Any:
    config = jobs.run_config(optimizer="muon", share_embeddings_and_output_weights=not settings)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **{"lr": 0.02, **settings}))


def test_updates_are_those_of_plain_optimizers(run_distributed):
    """The gradient of a looped model's weight is that of all its loops, and Muon orthogonalizes it once."""
    for settings, errors in zip(
        SETTINGS,
        run_distributed(optimizer_jobs.beside_a_plain_one, 1, [_config(**settings) for settings in SETTINGS]),
        strict=True,
    ):
        assert len(errors) > 15 and sum(name.endswith(optimizer_jobs.HIDDEN) for name in errors) == 2 * 4
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
