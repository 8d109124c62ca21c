"""Steps of fewer loops than the model has, and runs whose `training.loop_schedule` asks for them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config.schema import DataConfig, LoopStage, RunConfig
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed import deepspeed_jobs
from tests.distributed.cases import LOSSES, Case, Layout, train_cases
from tests.distributed.deepspeed_jobs import Zero
from tests.distributed.parity_checks import TOLERANCE, differences
from tests.distributed.training_jobs import make_data, run_config, train
from tests.distributed.whole_runs import folder, numbers

# ---------------------------------------------------------------- steps in all layouts

CHANGING = (1, 2, 3, 1, 2, 3)  # each loop count twice, so that overlapped reduction has learned it
HIDDEN = (("gate_input", "hidden"), ("loop_norm", "final"))
EXPERTS = (("moe.num_experts", 4), ("moe.router_topk", 2), ("moe.ffn_hidden_size", 8))
TWO_LAYERS = (("num_layers", 2),)
ENDS = (("account_for_embedding_in_pipeline_split", True), ("account_for_loss_in_pipeline_split", True))
Z_LOSS = (("z_loss_coeff", 0.02),)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (Layout(pp=2, dp=2), Case(3, "full", overlap=True, model=HIDDEN, training=LOSSES)),
        pytest.param(
            Layout(tp=2, sp=True, cp=2),
            Case(3, "selective", overlap=True, packed=True, training=LOSSES),
            marks=SLOW,
        ),
        pytest.param(Layout(dp=2, ep=2), Case(3, model=EXPERTS), marks=SLOW),
        pytest.param(Layout(dp=2, ep=2), Case(3, overlap=True, model=EXPERTS), marks=SLOW),
        pytest.param(Layout(tp=2, dp=2), Case(3, "full", overlap=True, model=HIDDEN, training=LOSSES), marks=SLOW),
        pytest.param(Layout(pp=2, cp=2), Case(3, packed=True), marks=SLOW),
        pytest.param(Layout(tp=2, sp=True, pp=2), Case(3, "full", packed=True, model=HIDDEN), marks=SLOW),
        pytest.param(Layout(pp=4), Case(3, overlap=True, training=LOSSES), marks=SLOW),
        pytest.param(Layout(pp=4), Case(3, overlap=True, model=TWO_LAYERS, parallel=ENDS, training=Z_LOSS), marks=SLOW),
        pytest.param(Layout(cp=2, dp=2), Case(3, "full", overlap=True, packed=True), marks=SLOW),
    ],
    ids=str,
)
def test_steps_of_changing_loop_counts_do_not_depend_on_the_layout(run_distributed, layout, case):
    case = dataclasses.replace(case, step_loops=CHANGING)
    (outcome,) = run_distributed(train_cases, layout.world_size, layout, [case])
    (reference,) = run_distributed(train_cases, 1, Layout(), [case.reference])
    wrong = differences(outcome, reference)
    worst = max(wrong, key=lambda name: wrong[name])
    assert wrong[worst] <= TOLERANCE, f"{worst} is off by {wrong[worst]:.1e}"
    for steps in outcome.dispatched:
        sent, groups = zip(*steps, strict=True)
        assert sent[:3] == (0, 0, 0)
        # Nothing arrives, with one loop, for a group of nothing but gates.
        assert not case.overlap or (sent[3] >= groups[3] - 1 and sent[4:] == groups[4:])


# ---------------------------------------------------------------- what a step does not use


def _steps_of_one_loop(config: RunConfig, control: bool) -> list[tuple[bool, bool]]:
    """After two steps: whether steps of 1, 1 and 2 loops changed the gates or the optimizer's state of
    them, and any other parameter. `control`: with an optimizer that is not told what was used."""
    from plt_megatron.model.parameters import only_in_loops
    from plt_megatron.train import megatron_engine

    def state(engine: Any, gates: bool) -> list[Any]:
        found = []
        for name, parameter in engine.stage.named_parameters():
            if only_in_loops(name) is gates:
                found.append(parameter.detach().clone())
                for part in engine.state.parts:
                    for main in part.main_parameters([parameter]):
                        found += [main.detach().clone(), *(value.clone() for value in part.inner.state[main].values())]
        return found

    def changed(engine: Any, gates: bool, loops: int) -> bool:
        before = state(engine, gates)
        engine.train_step(jobs.batches_of(loops), loop_count=loops)
        return any(bool((one != other).any()) for one, other in zip(before, state(engine, gates), strict=True))

    engine = jobs.build(config)
    left_alone = megatron_engine.left_alone
    if control:
        megatron_engine.left_alone = lambda parts, unused: contextlib.nullcontext()
    try:
        jobs.train(engine, 1, 2)
        return [(changed(engine, True, loops), changed(engine, False, loops)) for loops in (1, 1, 2)]
    finally:
        megatron_engine.left_alone = left_alone


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("bf16", "adam"),
        pytest.param("fp32", "sgd", marks=SLOW),
        pytest.param("bf16", "muon", marks=SLOW),
    ],
)
def test_parameters_that_a_step_does_not_use_stay_as_they_are(run_distributed, precision, optimizer):
    config = jobs.run_config({"overlap_grad_reduce": True}, precision, optimizer)
    config.training.loop_schedule = [LoopStage(loop_shares=[0.5, 0.5])]
    expected = [(False, True), (False, True), (True, True)]
    assert all(ranks == expected for ranks in run_distributed(_steps_of_one_loop, 2, config, False, all_ranks=True))
    assert run_distributed(_steps_of_one_loop, 2, config, True) == [(True, True)] * 3, "without it they would not"


# ---------------------------------------------------------------- whole runs

GROWN = [LoopStage(0.5, 1), LoopStage(loop_count=2)]
DRAWN = [LoopStage(0.2, 1), LoopStage(loop_shares=[0.4, 0.6], ramp=0.5)]
DP2 = {"data_parallel_size": 2, "overlap_grad_reduce": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_data(tmp_path_factory.mktemp("schedule_data"))


def scheduled(name: str, output_dir: Path, data: DataConfig, stages: list[LoopStage], **changes: Any) -> RunConfig:
    training = {"loop_schedule": stages} | changes.pop("training", {})
    return run_config(name, output_dir, data, training=training, **changes)


@pytest.fixture(scope="module")
def grown(data, tmp_path_factory, run_distributed) -> RunConfig:
    """Three steps of one loop, then three of two, on two data-parallel ranks."""
    runs = tmp_path_factory.mktemp("runs")
    config = scheduled("grown", runs, data, GROWN, parallel=DP2, checkpoint={"save_interval": 3})
    assert run_distributed(train, 2, config) is True
    return config


def trained(config: RunConfig, first: int = 1) -> list[dict[str, Any]]:
    return [record for record in numbers(config) if record["kind"] == "train" and record["step"] >= first]


def test_a_record_tells_the_loops_of_its_steps(grown):
    records = trained(grown)
    assert [record["loop_count"] for record in records] == [1, 1, 1, 2, 2, 2]
    assert [record["loss_by_loops"] for record in records] == [
        {str(record["loop_count"]): record["loss"]} for record in records
    ]
    assert [len(record["gate_mean"]) for record in records] == [1, 1, 1, 2, 2, 2]
    assert [record["gate_mean"][-1] for record in records[:4]] == [None, None, None, 0.5], "gates waited"
    validated = [(r["step"], r["loop_count"]) for r in numbers(grown) if r["kind"] == "validation"]
    assert validated == [(3, 1), (3, 2), (6, 1), (6, 2)]


def test_after_a_switch_a_run_is_one_of_fixed_loops_from_there(grown, tmp_path, run_distributed):
    """Bit for bit, from the weights and the optimizer's state at the switch; from the weights alone it is not."""
    for name, checkpoint in (("fixed", {"allow_other_schedule": True}), ("control", {"weights_only": True})):
        fixed = dataclasses.replace(grown, name=name, output_dir=str(tmp_path))
        fixed.training = dataclasses.replace(grown.training, loop_schedule=[])
        load = str(folder(grown) / "checkpoints" / "step_00000003")
        fixed.checkpoint = dataclasses.replace(grown.checkpoint, load=load, **checkpoint)
        assert run_distributed(train, 2, fixed) is True
        ours = [(record["loss"], record["grad_norm"]) for record in trained(fixed)[-3:]]
        after = [(record["loss"], record["grad_norm"]) for record in trained(grown, 4)]
        assert (ours == after) is (name == "fixed")
        assert "loop_count" not in trained(fixed)[-1]


def test_another_schedule_is_not_gone_on_with_unasked(grown, tmp_path, run_distributed):
    from tests.distributed.pool import DistributedFailure

    other = dataclasses.replace(grown, output_dir=str(tmp_path))
    shutil.copytree(folder(grown), folder(other))
    other.training = dataclasses.replace(grown.training, loop_schedule=DRAWN)
    with pytest.raises(DistributedFailure, match=r"(?s)training\.loop_schedule .*checkpoint\.weights_only"):
        run_distributed(train, 2, other)


@pytest.mark.parametrize(
    "layout", [DP2, pytest.param({"pipeline_model_parallel_size": 2}, marks=SLOW)], ids=["dp2", "pp2"]
)
def test_drawn_loops_are_every_ranks_and_a_stopped_runs(data, tmp_path, run_distributed, layout):
    """One process and two; and a run stopped before, at and after the switch."""
    one, two = (scheduled(name, tmp_path, data, DRAWN, parallel=how) for name, how in (("one", {}), ("two", layout)))
    for ranks, config in enumerate((one, two), 1):
        assert run_distributed(train, ranks, config) is True
    loops = [record["loop_count"] for record in trained(one)]
    assert loops[:2] == [1, 1] and set(loops[2:]) == {1, 2}, "the seed draws both"
    for field in ("loss", "grad_norm", "loop_count"):
        expected = [record[field] for record in trained(one)]
        assert [record[field] for record in trained(two)] == pytest.approx(expected, rel=1e-5), field

    stopped = scheduled("stopped", tmp_path, data, DRAWN, parallel=layout)
    folder(stopped).mkdir(parents=True)
    for finished in (False, False, False, True):
        if not finished:
            (folder(stopped) / "STOP").touch()
        assert run_distributed(train, 2, stopped) is finished
    assert numbers(stopped) == numbers(two)


# ---------------------------------------------------------------- DeepSpeed

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@needs_deepspeed
@pytest.mark.parametrize(
    ("layout", "zeros", "recompute"),
    [
        pytest.param(Layout(dp=2), [Zero(1), Zero(3)], "none", marks=SLOW),
        pytest.param(Layout(dp=2), [Zero(2, "cpu")], "none", marks=SLOW),
        pytest.param(Layout(tp=2, sp=True, dp=2), [Zero(2), Zero(3, "cpu", "cpu")], "full", marks=SLOW),
        pytest.param(Layout(dp=2), [Zero(1, "cpu"), Zero(3)], "selective", marks=SLOW),
    ],
    ids=str,
)
def test_deepspeed_has_the_other_engines_numbers(run_deepspeed, layout, zeros, recompute):
    case = Case(3, recompute, step_loops=(2, 1, 3, 1, 2), training=LOSSES)
    (expected,) = run_deepspeed(deepspeed_jobs.train_cases, 1, Layout(), [(case.reference, deepspeed_jobs.MEGATRON)])
    outcomes = run_deepspeed(deepspeed_jobs.train_cases, layout.world_size, layout, [(case, zero) for zero in zeros])
    for zero, outcome in zip(zeros, outcomes, strict=True):
        assert outcome == pytest.approx(expected, rel=1e-5), str(zero)


@needs_deepspeed
@SLOW
def test_deepspeed_resumes_with_what_was_not_used(run_deepspeed, tmp_path):
    """Steps of one and of two loops in turn: bit for bit in the same place, and on the other engine."""
    place = deepspeed_jobs.Place(Zero(1), loop_schedule=True)
    journey = run_deepspeed(deepspeed_jobs.set_out, 2, tmp_path, place)
    steps, _, digest = run_deepspeed(deepspeed_jobs.arrive, 2, tmp_path, place)
    assert (steps, digest) == (journey.stayed, journey.digest)
    other, _, _ = run_deepspeed(
        deepspeed_jobs.arrive, 1, tmp_path, dataclasses.replace(place, zero=deepspeed_jobs.MEGATRON)
    )
    for ours, expected in zip(other, journey.stayed, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
