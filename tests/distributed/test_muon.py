"""Muon: against a plain one, with one process's numbers in every layout, resumed, resharded, and not mixed up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from plt_megatron.config.schema import DecayFactors, RateFactors
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed import muon_jobs
from tests.distributed.cases import Case, Layout

MUON = (("lr", 0.02), ("min_lr", 0.01), ("name", "muon"))
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
]


def _config(**settings: Any) -> Any:
    config = jobs.run_config(optimizer="muon", share_embeddings_and_output_weights=not settings)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **{"lr": 0.02, **settings}))


def test_updates_are_those_of_plain_muon_and_plain_adam(run_distributed):
    """Of a looped model: a weight's gradient is that of all its loops, and orthogonalized once."""
    for settings, errors in zip(
        SETTINGS,
        run_distributed(muon_jobs.beside_a_plain_one, 1, [_config(**settings) for settings in SETTINGS]),
        strict=True,
    ):
        assert len(errors) > 20 and sum(name.endswith(muon_jobs.HIDDEN) for name in errors) == 4 * 4
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-5, f"{settings}: {worst} is off by {errors[worst]:.1e}"


@pytest.mark.parametrize(
    ("layout", "overlap"),
    [
        pytest.param(Layout(tp=2, sp=True, dp=2), True, marks=pytest.mark.slow),
        (Layout(tp=2, dp=2), True),
        pytest.param(Layout(tp=2, sp=True, pp=2, dp=2), True, marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, dp=2), True, marks=pytest.mark.slow),
        pytest.param(Layout(dp=4), False, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, cp=2), False, marks=pytest.mark.slow),
        pytest.param(Layout(dp=2, ep=2), True, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, sp=True, ep=2), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_layout_has_the_numbers_of_one_process(check, layout, overlap):
    """A matrix is orthogonalized as a whole however tensor-parallel ranks divide it, and once whoever holds it."""
    gather = {"overlap_param_gather": True} if overlap else {}
    model = EXPERTS if layout.ep > 1 else {}
    case = Case(2, overlap=overlap, optimizer=MUON, model=(*model.items(),), parallel=(*gather.items(),))
    check(layout, [case], "Muon")


@pytest.fixture(scope="module")
def saved(run_distributed, tmp_path_factory):
    """Six steps at TP2 x DP2, saved after the third."""
    directory = tmp_path_factory.mktemp("muon")
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    config = jobs.run_config(layout, optimizer="muon")
    return run_distributed(jobs.train_and_save, 4, directory, config, then=3), directory


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        pytest.param({"pipeline_model_parallel_size": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"overlap_grad_reduce": True}, 4, marks=pytest.mark.slow),
        pytest.param({}, 1, marks=pytest.mark.slow),
        pytest.param({"tensor_model_parallel_size": 2}, 4, marks=pytest.mark.slow),
        pytest.param({"pipeline_model_parallel_size": 4}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_in_another_layout(run_distributed, saved, layout, world_size):
    whole, directory = saved
    moved = run_distributed(jobs.load_and_train, world_size, directory, jobs.run_config(layout, optimizer="muon"))
    for ours, expected in zip(moved["after"], whole["after"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    assert moved["progress"]["schedule"]["optimizer.muon_momentum"] == 0.95
