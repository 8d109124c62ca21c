"""A rehearsal communicates exactly as the real ranks do, and finds faults that are seeded into the code."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.commands.rehearse import main
from plt_megatron.config.layout import layout_of
from plt_megatron.errors import UserError
from tests.distributed.rehearsal_jobs import FAULTS, VOCAB_SIZE, record_real, run_config
from tests.running import ROOT, run


def rehearsed(*cases: str) -> dict[str, Any]:
    done = run([sys.executable, "-m", "tests.distributed.rehearsal_jobs", *cases], timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


SOUND = ["layerwise recomputed", "DP2 gates", "TP2 hidden wide recomputed", "ungated", "DP2 EP2 six"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return rehearsed("TP2 PP2", "PP2 top batches", "PP2 top", *SOUND)


@pytest.fixture(scope="module")
def faulty() -> dict[str, Any]:
    return rehearsed(*FAULTS)


def assert_as_real(run_distributed: Any, layout: str, found: dict[str, Any], folder: Path) -> None:
    config = run_config(layout)
    real = run_distributed(record_real, layout_of(config).world_size, config, folder, all_ranks=True)
    assert len(found["calls"]) >= min(3, len(real))
    for rank, calls in found["calls"].items():
        assert len(calls) > 20 and calls == real[int(rank)]["calls"], f"{layout}: rank {rank}"
    for rank, theirs in enumerate(real):
        assert len(theirs["written"]) > 3 and found["written"][str(rank)] == theirs["written"], f"{layout}: rank {rank}"
    assert found["problems"] == [] and found["matched"] > 40


def test_groups_bytes_and_order_are_those_of_the_real_run(run_distributed, found, tmp_path):
    assert_as_real(run_distributed, "TP2 PP2", found["TP2 PP2"], tmp_path)
    off = dict(found["TP2 PP2"]["differences"])
    assert abs(off["FLOPs"]) < 1e-3 and len(off) >= 7
    assert all(abs(difference) < 0.01 for what, difference in off.items() if "bytes" in what)


def test_a_stage_that_trains_nothing_is_as_in_the_real_run(run_distributed, found, tmp_path):
    """It has the parameter groups of the others, and no gradients of weights."""
    assert_as_real(run_distributed, "PP2 top", found["PP2 top"], tmp_path)
    off = [value for what, value in found["PP2 top"]["differences"] if what == "FLOPs"]
    assert len(off) == 2 and off == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("case", SOUND)
def test_nothing_is_wrong_with_what_is_recomputed_layer_by_layer_or_hardly_trained(found, case):
    """What runs again is no work of the model, in either order of loops, and padding is no traffic amiss."""
    assert found[case]["problems"] == []
    assert abs(dict(found[case]["differences"])["FLOPs"]) < 1e-6


def test_of_a_run_with_other_batches_before_the_last_step_is_compared(found):
    assert found["PP2 top batches"]["problems"] == []
    assert found["PP2 top batches"]["differences"] == found["PP2 top"]["differences"]


# The others name 8 cards.
CARDS = {"plt2_tiny": 2, "plt2_demo": 2, "plt2_moe_tiny": 2}
SHIPPED = [
    pytest.param(path.stem, CARDS.get(path.stem, 8), marks=[] if path.stem == "plt2_tiny" else pytest.mark.slow)
    for path in sorted((ROOT / "configs" / "runs").glob("*.yaml"))
]


@pytest.mark.parametrize(("name", "cards"), SHIPPED)
def test_of_a_shipped_file_nothing_is_reported(name, cards):
    command = [sys.executable, "tools/rehearse.py", f"configs/runs/{name}.yaml", "model.vocab_size=8000"]
    options = ["--gpus-per-node", str(cards), "--processes", "2"]
    done = run([*command, *options], timeout=600)
    assert done.stderr == "" and "problem" not in done.stdout and "FLOPs" in done.stdout


def test_what_transformer_engine_would_refuse_is_refused(capsys):
    settings = ["model.vocab_size=8000", "data.tokenizer=null", "parallel.context_parallel_size=2"]
    assert main(["configs/runs/plt2_1b.yaml", *settings, "parallel.data_parallel_size=4"]) == 2
    assert "cp_comm_type p2p with data.reset_at_document_boundaries" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--nodes", "--gpus-per-node", "--processes"])
def test_none_of_what_there_must_be_is_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["configs/runs/plt2_tiny.yaml", option, "0"])
    assert option in capsys.readouterr().err


@pytest.mark.slow
def test_experts_communicate_as_in_a_real_run_of_an_even_load(run_distributed, tmp_path):
    experts = rehearsed("TP2 SP DP2 EP2")["TP2 SP DP2 EP2"]
    assert_as_real(run_distributed, "TP2 SP DP2 EP2", experts, tmp_path)
    sent = [call for call in experts["calls"]["0"] if call[0] == "all_to_all" and call[1] == [0, 1]]
    assert len(sent) >= 2 * 2 * 6, "2 microbatches x 2 loops x 3 each way of the one layer that has experts"
    off = dict(experts["differences"])
    assert abs(off["FLOPs"]) < 1e-3 and abs(off["memory, stage 0"]) < 0.05
    exactly = {what: value for what, value in off.items() if "parallel" in what}
    assert exactly.keys() == {"bytes sent, tensor parallel", "bytes sent, expert parallel"}
    assert all(abs(value) < 1e-6 for value in exactly.values()), exactly
    assert all(abs(value) < 0.01 for what, value in off.items() if "bytes" in what), off


CLOSE = {"FLOPs": 1e-3, "memory, stage 0": 0.1, "bytes": 0.01}
AVERAGED = {"memory, stage 0": 0.05, "checkpoint, written by all": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "bounds"),
    [
        *((case, {}) for case in ("TP2 PP2 DP2", "TP2 SP CP2 DP2", "PP4 DP2 overlap", "PP2 DP4 EP4 allgather")),
        ("TP2 PP2 DP2 Muon", {}),
        *((case, CLOSE) for case in ("TP2 SP CP2 DP2 span", "TP2 SP DP2 EP2 span", "TP4 SP DP2")),
        *((case, CLOSE) for case in ("TP2 PP2 losses", "TP4 SP DP2 losses")),
        *((case, {"FLOPs": 1e-3, "memory, stage": 0.1}) for case in ("PP2 DP2 uneven", "PP4 ends")),
        *((case, AVERAGED) for case in ("TP2 DP2 average", "TP2 SP DP2 EP2 average")),
    ],
)
def test_what_is_rehearsed_is_the_real_run_and_close_to_the_estimate(run_distributed, case, bounds, tmp_path):
    found = rehearsed(case)[case]
    assert_as_real(run_distributed, case, found, tmp_path)
    for word, bound in bounds.items():
        off = [value for what, value in found["differences"] if word in what]
        assert off and max(map(abs, off)) < bound, (word, found["differences"])
        assert word != "memory, stage" or len(off) == int(case[2]), "every stage of the pipeline"
    assert any(key.startswith("kept.ema.") for key, *_ in found["written"]["0"]) == case.endswith("average")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("wrong group", r"wrong group: rank 0's .*tensor model parallel.* has ranks 0, 2, the layout 0, 1"),
        ("rank-dependent shape", r"mismatched collective: rank 0's .* meets rank 1's"),
        ("tied embeddings", r"bytes sent, tied embeddings.*missing"),
        ("mismatched messages", r"waits forever: rank \d in recv"),
        ("written twice", r"checkpoint: ranks \d and \d both write .*final_layernorm.weight\[0:64\]"),
        ("not written", r"checkpoint: nobody writes optimizer.state.exp_avg"),
    ],
)
def test_a_seeded_fault_is_named(faulty, fault, named):
    assert any(re.search(named, problem) for problem in faulty[fault]["problems"]), faulty[fault]["problems"]


def test_memory_over_is_named_with_rank_and_phase(found):
    problems = found["TP2 PP2"]["on_a_small_card"]
    assert len(problems) == 4 and all(
        re.match(r"memory over: rank \d needs .* in (for|back)ward \d", each) for each in problems
    )


def test_bad_divisibility_is_refused():
    from plt_megatron.predict.rehearsal.rehearse import rehearse

    config = run_config("PP2")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3))
    with pytest.raises(UserError, match="num_layers"):
        rehearse(config, VOCAB_SIZE, world_size=2)
