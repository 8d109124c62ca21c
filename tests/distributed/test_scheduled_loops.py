"""Steps of fewer loops than the model has, and runs whose `training.loop_schedule` asks for them."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from typing import Any
from unittest import mock

import pytest

from plt_megatron.config.schema import LoopStage, RunConfig
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.cases import ENDS, LOSSES, Z_LOSS, Case, Layout
from tests.distributed.params import slow
from tests.distributed.pool import DistributedFailure
from tests.distributed.training_jobs import run_config, train, train_in_turns
from tests.distributed.whole_runs import assert_close, folder, numbers

# ---------------------------------------------------------------- steps in all layouts

CHANGING = (1, 2, 3, 1, 2, 3)  # each loop count twice, so that overlapped reduction has learned it
HIDDEN = {"gate_input": "hidden", "loop_norm": "final"}
EXPERTS = {"moe.num_experts": 4, "moe.router_topk": 2, "moe.ffn_hidden_size": 8}
TWO_LAYERS = {"num_layers": 2}


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("PP2 DP2", Case(3, "full", overlap=True, model=HIDDEN, training=LOSSES)),
        slow("TP2 SP CP2", Case(3, "selective", overlap=True, packed=True, training=LOSSES)),
        slow("DP2 EP2", Case(3, model=EXPERTS)),
        slow("DP2 EP2", Case(3, overlap=True, model=EXPERTS)),
        slow("TP2 DP2", Case(3, "full", overlap=True, model=HIDDEN, training=LOSSES)),
        slow("PP2 CP2", Case(3, packed=True)),
        slow("TP2 SP PP2", Case(3, "full", packed=True, model=HIDDEN)),
        slow("PP4", Case(3, overlap=True, training=LOSSES)),
        slow("PP4", Case(3, overlap=True, model=TWO_LAYERS, parallel=ENDS, training=Z_LOSS)),
        slow("CP2 DP2", Case(3, "full", overlap=True, packed=True)),
    ],
    ids=str,
)
def test_steps_of_changing_loop_counts_do_not_depend_on_the_layout(check, layout, case):
    check(Layout.of(layout), [dataclasses.replace(case, step_loops=CHANGING)], "changing loops")


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
    untold = lambda parts, unused: contextlib.nullcontext()  # noqa: E731
    with mock.patch.object(megatron_engine, "left_alone", untold if control else megatron_engine.left_alone):
        jobs.train(engine, 1, 2)
        return [(changed(engine, True, loops), changed(engine, False, loops)) for loops in (1, 1, 2)]


@pytest.mark.parametrize(("precision", "optimizer"), [("bf16", "adam"), slow("fp32", "sgd"), slow("bf16", "muon")])
def test_parameters_that_a_step_does_not_use_stay_as_they_are(run_distributed, precision, optimizer):
    config = jobs.run_config({"overlap_grad_reduce": True}, precision, optimizer)
    config.training.loop_schedule = [LoopStage(loop_shares=[0.5, 0.5])]
    expected = [(False, True), (False, True), (True, True)]
    assert all(ranks == expected for ranks in run_distributed(_steps_of_one_loop, 2, config, False, all_ranks=True))
    assert run_distributed(_steps_of_one_loop, 2, config, True) == [(True, True)] * 3, "without it they would not"


# ---------------------------------------------------------------- whole runs

GROWN = {"training": {"loop_schedule": [LoopStage(0.5, 1), LoopStage(loop_count=2)]}}
DRAWN = {"training": {"loop_schedule": [LoopStage(0.2, 1), LoopStage(loop_shares=[0.4, 0.6], ramp=0.5)]}}
DP2 = {"data_parallel_size": 2, "overlap_grad_reduce": True}


@pytest.fixture(scope="module")
def grown(data, tmp_path_factory, run_distributed) -> RunConfig:
    """Three steps of one loop, then three of two, on two data-parallel ranks."""
    runs = tmp_path_factory.mktemp("runs")
    config = run_config("grown", runs, data, GROWN, parallel=DP2, checkpoint={"save_interval": 3})
    assert run_distributed(train, 2, config) is True
    return config


def test_a_record_tells_the_loops_of_its_steps(grown):
    records = numbers(grown, "train")
    assert [record["loop_count"] for record in records] == [1, 1, 1, 2, 2, 2]
    assert [record["loss_by_loops"] for record in records] == [
        {str(record["loop_count"]): record["loss"]} for record in records
    ]
    assert [len(record["gate_mean"]) for record in records] == [1, 1, 1, 2, 2, 2]
    assert [record["gate_mean"][-1] for record in records[:4]] == [None, None, None, 0.5], "gates waited"
    validated = [(r["step"], r["loop_count"]) for r in numbers(grown, "validation")]
    assert validated == [(3, 1), (3, 2), (6, 1), (6, 2)]


def test_after_a_switch_a_run_is_one_of_fixed_loops_from_there(grown, tmp_path, run_distributed):
    """Bit for bit, from the weights and the optimizer's state at the switch; from the weights alone it is not."""
    for name, checkpoint in (("fixed", {"allow_other_schedule": True}), ("control", {"weights_only": True})):
        fixed = dataclasses.replace(grown, name=name, output_dir=str(tmp_path))
        fixed.training = dataclasses.replace(grown.training, loop_schedule=[])
        load = str(folder(grown) / "checkpoints" / "step_00000003")
        fixed.checkpoint = dataclasses.replace(grown.checkpoint, load=load, **checkpoint)
        assert run_distributed(train, 2, fixed) is True
        ours = [(record["loss"], record["grad_norm"]) for record in numbers(fixed, "train")[-3:]]
        after = [(record["loss"], record["grad_norm"]) for record in numbers(grown, "train")[3:]]
        assert (ours == after) is (name == "fixed")
        assert "loop_count" not in numbers(fixed, "train")[-1]


def test_another_schedule_is_not_gone_on_with_unasked(grown, tmp_path, run_distributed):
    other = dataclasses.replace(grown, output_dir=str(tmp_path))
    shutil.copytree(folder(grown), folder(other))
    other.training = dataclasses.replace(grown.training, **DRAWN["training"])
    with pytest.raises(DistributedFailure, match=r"(?s)training\.loop_schedule .*checkpoint\.weights_only"):
        run_distributed(train, 2, other)


@pytest.mark.parametrize("layout", [DP2, slow({"pipeline_model_parallel_size": 2})], ids=["dp2", "pp2"])
def test_drawn_loops_are_every_ranks_and_a_stopped_runs(data, tmp_path, run_distributed, layout):
    """One process and two; and a run stopped before, at and after the switch."""
    one, two = (run_config(name, tmp_path, data, DRAWN, parallel=how) for name, how in (("one", {}), ("two", layout)))
    for ranks, config in enumerate((one, two), 1):
        assert run_distributed(train, ranks, config) is True
    loops = [record["loop_count"] for record in numbers(one, "train")]
    assert loops[:2] == [1, 1] and set(loops[2:]) == {1, 2}, "the seed draws both"
    assert_close(two, one, "loss", "grad_norm", "loop_count")
    stopped = run_config("stopped", tmp_path, data, DRAWN, parallel=layout)
    train_in_turns(run_distributed, 2, stopped, stops=3)
    assert numbers(stopped) == numbers(two)
