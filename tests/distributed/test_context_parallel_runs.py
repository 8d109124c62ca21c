"""Whole runs whose ranks share each sequence: the metrics of one process, and checkpoints that know no difference."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from plt_megatron.config.schema import RunConfig
from tests.checkpoints import read_progress
from tests.distributed.params import slow
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import as_after_step, assert_close, folder, numbers

CP = {"context_parallel_size": 2}
STEPS = {"train_iters": 4}


@pytest.fixture(scope="module")
def make(data, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A configuration of packed documents by name and layout."""
    data = dataclasses.replace(data, reset_at_document_boundaries=True)
    runs = tmp_path_factory.mktemp("runs")

    def make(name: str, parallel: dict[str, Any], **changes: Any) -> RunConfig:
        training = STEPS | changes.pop("training", {})
        return run_config(name, runs, data, parallel=parallel, training=training, **changes)

    return make


@pytest.fixture(scope="module")
def single(make, run_distributed) -> RunConfig:
    config = make("one process", {})
    assert run_distributed(train, 1, config) is True
    return config


@pytest.fixture(scope="module")
def shared(make, run_distributed) -> RunConfig:
    config = make("two ranks", CP)
    assert run_distributed(train, 2, config) is True
    return config


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    """Losses, gradient norms, tokens, validation, what is logged of the loops."""
    ours, theirs = numbers(one), numbers(other)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for record, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            pairs = zip(record[name], value, strict=True) if isinstance(value, list) else [(record[name], value)]
            for actual, number in pairs:
                close = pytest.approx(number, rel=2e-5) if isinstance(number, float | int) else number
                assert actual == close, f"step {record['step']}: {name}"


def test_metrics_are_those_of_one_process(single, shared):
    assert_same_run(shared, single)
    record = numbers(shared)[0]
    assert record["tokens"] == 256 and 0 < record["loss_tokens"] < 256, "documents' last tokens do not count"
    assert {"gate_mean", "hidden_norm", "step_size"} <= record.keys()


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        slow({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 4, id="TP2 SP CP2"),
        pytest.param({"pipeline_model_parallel_size": 2, "recompute_granularity": "full"}, 4, id="PP2 CP2"),
    ],
)
def test_other_parallelism_beside_it(single, make, run_distributed, request, layout, ranks):
    config = make(request.node.callspec.id, layout | CP, training={"micro_batch_size": 1})
    assert run_distributed(train, ranks, config) is True
    assert_close(config, single, "loss", rel=2e-5, kind=None)


@pytest.mark.parametrize("ranks", [slow(1, id="CP2 to one process"), slow(2, id="one process to CP2")])
def test_a_run_goes_on_with_more_or_fewer_ranks_to_a_sequence(single, shared, tmp_path, run_distributed, ranks):
    start, layout = shared if ranks == 1 else single, {"context_parallel_size": ranks}
    config = as_after_step(start, 2, "other ranks", tmp_path, parallel=layout)
    assert run_distributed(train, ranks, config) is True
    assert_same_run(config, single)
    assert read_progress(folder(config))["layout"].items() >= {**layout, "data_parallel_size": 1}.items()


def test_an_incident_names_each_sequence_once_with_all_its_tokens(single, make, run_distributed):
    config = make("bad step", CP)
    assert run_distributed(train, 2, config, bad_step=1) is True
    (path,) = (folder(config) / "incidents").glob("step_00000001_*.json")
    report = json.loads(path.read_text())
    first = numbers(single)[0]
    assert [row["rank"] for row in report["microbatches"]] == [0] * 4
    assert sum(row["tokens"] for row in report["microbatches"]) == first["loss_tokens"]
    losses = sum(row["tokens"] * row["loss"] for row in report["microbatches"])
    assert losses == pytest.approx(first["loss"] * first["loss_tokens"], rel=1e-5)
