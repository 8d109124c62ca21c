"""Models of which some layers run once, and loops by layer: layouts give one process's numbers, checkpoints fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from plt_megatron.config.schema import ModelConfig
from plt_megatron.hf.exporting import ExportOptions, export
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed import deepspeed_jobs
from tests.distributed.cases import EXPERTS, SPAN, Case, Layout
from tests.distributed.deepspeed_jobs import MEGATRON, Zero
from tests.distributed.params import slow
from tests.distributed.parity_checks import TOLERANCE, differences
from tests.distributed.training_jobs import run_config, train

HIDDEN = {**SPAN, "gate_input": "hidden", "loop_norm": "final"}
SCALED = {**SPAN, "loop_norm": "rms", "learned_hidden_scale": "channel", "residual_scaling": "layers"}
BY_LAYER = {"cross_loop_parallel": False, "loop_order": "layer"}
OF_EXPERTS = {**SPAN, **EXPERTS}


@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        ("TP2 SP", [Case(3, "full", packed=True, model=HIDDEN)]),
        slow(
            "TP2 SP DP2", [Case(2, "full", overlap=True, model=SCALED), Case(3, "selective", packed=True, model=HIDDEN)]
        ),
        slow(
            "TP2 SP CP2",
            [
                Case(3, "full", packed=True, model=SPAN),
                Case(2, overlap=True, model=HIDDEN),
                Case(3, "full", packed=True, model={**BY_LAYER, **SPAN}),
                Case(2, "selective", overlap=True, model={**BY_LAYER, "gated_window": False, "share_kv": False}),
            ],
        ),
        slow(
            "TP2 DP2",
            [
                Case(3, "full", model={**HIDDEN, "loop_span": [0, 2]}),
                Case(2, model={**SPAN, "share_kv": False, "gated_window": False}),
            ],
        ),
        slow(
            "CP2 DP2", [Case(2, "selective", overlap=True, model={**SCALED, "loop_span": [2, 4]}), Case(1, model=SPAN)]
        ),
        slow("DP2 EP2", [Case(2, model=OF_EXPERTS), Case(3, "full", overlap=True, model=OF_EXPERTS)]),
        slow(
            "DP2",
            [
                Case(2, overlap=True, model=SPAN, parallel={"overlap_param_gather": True}),
                Case(2, overlap=True, model=SPAN, optimizer={"name": "muon"}),
                Case(3, "full", overlap=True, model=HIDDEN, step_loops=(1, 2, 3, 1, 2, 3)),
                Case(3, overlap=True, model=BY_LAYER, step_loops=(1, 2, 3, 1, 2, 3)),
            ],
        ),
    ],
)
def test_a_layout_changes_nothing(check, layout, cases):
    check(Layout.of(layout), cases, "layers that run once", [str(case.model) for case in cases])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        ("DP2", [(Case(2, "full", model=SPAN), Zero(3))]),
        (
            "TP2 SP DP2",
            [
                (Case(3, "full", model=SCALED), Zero(1)),
                (Case(2, "selective", packed=True, model=HIDDEN), Zero(2)),
                (Case(3, model=HIDDEN), Zero(3)),
                (Case(3, "full", model={**BY_LAYER, **SPAN}), Zero(2)),
                (Case(2, model=BY_LAYER), Zero(3)),
            ],
        ),
    ],
)
def test_deepspeed_gives_the_same_numbers(run_deepspeed, layout, cases):
    layout = Layout.of(layout)
    outcomes = run_deepspeed(deepspeed_jobs.train_cases, layout.world_size, layout, cases, timeout_s=280)
    plain = [(case.reference, MEGATRON) for case, _ in cases]
    references = run_deepspeed(deepspeed_jobs.train_cases, 1, Layout(), plain)
    for case, outcome, reference in zip(cases, outcomes, references, strict=True):
        assert max(differences(outcome, reference).values()) <= TOLERANCE, case


# ---------------------------------------------------------------- checkpoints

MODEL: dict[str, Any] = {**SPAN, **jobs.SCALES}


@pytest.fixture(scope="module")
def saved(run_distributed, tmp_path_factory):
    """The folder of a checkpoint."""
    directory = tmp_path_factory.mktemp("span")
    run_distributed(jobs.train_and_save, 1, directory, jobs.run_config(**MODEL), steps=1)
    return directory


def test_weights_are_read_without_processes(saved):
    from plt_megatron.hf.conversion import mappings_for
    from plt_megatron.train.checkpoint.reading import read_weights

    model: ModelConfig = jobs.run_config(**MODEL).model
    shapes = {name: tuple(tensor.shape) for name, tensor in read_weights(saved)}
    assert shapes == {mapping.name: mapping.shape for mapping in mappings_for(model, jobs.VOCAB)}
    gates = sorted(name for name in shapes if name.endswith("plt_gate.weight"))
    assert [name.split(".")[2] for name in gates] == ["1", "2"]


@pytest.mark.slow
def test_gates_of_other_layers_are_refused_and_one_loops_weights_are_a_start(run_distributed, saved, tmp_path):
    for span in ([0, 2], [2, 3], None):
        error = run_distributed(jobs.error_of_load, 1, saved, jobs.run_config(**{**MODEL, "loop_span": span}))
        assert "\n" not in error and "the tensor decoder.layers." in error and "plt_gate" in error, error
    one = {**MODEL, "loop_count": 1}
    run_distributed(jobs.train_and_save, 1, tmp_path, jobs.run_config(**one), steps=1)
    started = run_distributed(jobs.load_and_train, 1, tmp_path, jobs.run_config(**MODEL), then=1)
    assert any("has no gates and scales of loops" in line for line in started["log"])


# ---------------------------------------------------------------- a whole run


@pytest.mark.usefixtures("warm_starts")
@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"loop_span": [1, 2], "moe.num_experts": 4, "moe.ffn_hidden_size": 16},
        {"loop_span": [0, 2], "cross_loop_parallel": False, "loop_order": "layer"},
    ],
    ids=["experts", "by layer"],
)
def test_a_run_is_logged_and_its_export_decodes_as_it_trained(data, run_distributed, tmp_path, model):
    model = {"num_layers": 3, "loop_count": 3, **model}
    config = run_config("run", tmp_path, data, model=model, training={"train_iters": 4})
    assert run_distributed(train, 1, config) is True
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in (each for each in records if each["kind"] == "train"):
        assert all(value > 0 for name in ("hidden_norm", "step_size") for value in record[name]), record
        assert record["gate_mean"][0] is None and all(0.4 < gate < 0.6 for gate in record["gate_mean"][1:])
        loads = record.get("expert_load", [])
        assert all(sum(load) == pytest.approx(4, abs=1e-3) for load in loads), "relative to an even load"
        assert len(loads) == (3 if "moe.num_experts" in model else 0)
    result = export(ExportOptions(tmp_path / "run", tmp_path / "out", verify=True), lambda text: None)
    assert result.difference is not None and result.difference < 1e-5
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    tokens = torch.randint(200, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = exported(tokens, use_cache=False).logits
        cache, steps = exported.new_cache(), []
        for begin, end in [(0, 8), *((i, i + 1) for i in range(8, 20))]:
            steps.append(exported(tokens[:, begin:end], cache=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
