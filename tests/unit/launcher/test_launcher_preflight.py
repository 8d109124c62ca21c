"""Which node is the bad one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from plt_megatron.launcher import preflight

H100 = {"name": "NVIDIA H100 80GB HBM3", "driver": "570.1", "memory": "81559 MiB"}
GOOD = {
    "devices": [H100] * 8,
    "versions": {"python": "3.13.1", "torch": "2.14.1", "megatron-core": "0.19.2"},
    "space": {"/dev/shm": 1 << 40, "temporary": 1 << 40, "run": 1 << 40},
    "temporary": "/scratch",
    "run_error": None,
    "skew": 0.01,
}


def nodes(count: int = 4, **changes) -> dict:
    """Facts of `count` nodes; `n2={"skew": 9}` changes the second's."""
    facts = {f"n{index}": copy.deepcopy(GOOD) for index in range(1, count + 1)}
    for node, values in changes.items():
        for name, value in values.items():
            facts[node][name] = {**facts[node][name], **value} if isinstance(value, dict) else value
    return facts


def test_equal_nodes_are_good():
    assert preflight.judge(nodes(), 8) == {}


def test_the_first_nodes_clock_may_be_the_odd_one():
    skews = {"n1": 0.0, "n2": 30.1, "n3": 29.9, "n4": 30.0}
    assert list(preflight.judge(nodes(**{node: {"skew": skew} for node, skew in skews.items()}), 8)) == ["n1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"devices": [H100] * 7}, "7 GPUs respond instead of 8"),
        ({"devices": [*[H100] * 7, {**H100, "name": "NVIDIA A100"}]}, "NVIDIA A100"),
        ({"devices": [{**H100, "driver": "535.2"}] * 8}, "driver 535.2 instead of 8 x NVIDIA H100"),
        ({"versions": {"torch": "2.13.0"}}, "torch 2.13.0 instead of 2.14.1"),
        ({"versions": {"transformer-engine": "2.5"}}, "transformer-engine 2.5 instead of none"),
        ({"space": {"/dev/shm": 1 << 20}}, "/dev/shm: 1 MiB free, 64 MiB needed"),
        ({"space": {"/dev/shm": None}}, "/dev/shm: missing, 64 MiB needed"),
        ({"space": {"temporary": 5 << 20}}, "/scratch: 5 MiB free, 256 MiB needed"),
        ({"skew": -61.5}, "its clock is -61.5 s off the others'"),
        ({"run_error": "/r: cannot be written to (Read-only file system)"}, "cannot be written to"),
    ],
)
def test_the_odd_one_is_named(change, says):
    found = preflight.judge(nodes(n3=change), 8)
    assert list(found) == ["n3"] and says in found["n3"]


def test_all_that_is_wrong_is_said_at_once():
    found = preflight.judge(nodes(n2={"skew": 60.0, "versions": {"torch": "1"}}), 8)
    assert "torch" in found["n2"] and "clock" in found["n2"]


@pytest.mark.parametrize(("count", "old", "named"), [(4, "n1", "n1"), (2, "n2", "n2"), (2, "n1", "n2")])
def test_a_majority_counts_and_of_two_the_first_node(count, old, named):
    assert list(preflight.judge(nodes(count, **{old: {"versions": {"torch": "old"}}}), 8)) == [named]


def test_devices_matter_where_there_are_to_be_some():
    facts = nodes(n1={"devices": []}, n2={"devices": []}, n3={"devices": []})
    assert preflight.judge(facts, 0) == {}
    # More than asked for are no problem: the job was given some of the node's.
    assert preflight.judge(nodes(n2={"devices": [*[H100] * 8, {**H100, "name": "T4"}]}), 8) == {}


def test_what_is_shared_is_no_nodes_fault():
    facts = nodes()["n1"]
    assert preflight.shared_problem(facts) is None
    facts["space"]["run"] = 3 << 20
    assert preflight.shared_problem(facts) == "the run's folder: 3 MiB free, 1024 MiB needed"


NODE_OF = {rank: f"n{rank // 2}" for rank in range(8)}


def result(rank: int, stage: int = 2, error: str | None = None) -> dict:
    return {"rank": rank, "stage": stage, "error": error}


def test_a_broken_device_is_blamed():
    results = {rank: result(rank) for rank in range(8)} | {5: result(5, 0, "its device 1 fails: ECC")}
    assert preflight.blame(results, NODE_OF) == {"n2": "its device 1 fails: ECC"}


def test_who_stays_behind_is_blamed():
    results = {rank: result(rank, 2) for rank in range(8)} | {6: result(6, 1)}
    assert list(preflight.blame(results, NODE_OF)) == ["n3"]
    del results[6], results[7]
    assert list(preflight.blame(results, NODE_OF)) == ["n3"], "it has never said a word"


def test_nobody_is_blamed_if_all_stand_at_the_same_place():
    assert preflight.blame({rank: result(rank) for rank in range(8)}, NODE_OF) == {}
    assert preflight.blame({}, NODE_OF) == {}


@pytest.mark.parametrize(("silent", "blamed"), [(1, 1), (6, 6), (7, 0), (40, 0)])
def test_many_nodes_without_a_word_are_not_blamed(silent, blamed):
    """Importing torch on 128 nodes at once may take longer than the check."""
    node_of = {rank: f"n{rank}" for rank in range(128)}
    results = {rank: {"rank": rank, "stage": 1, "error": None} for rank in range(silent, 128)}
    assert len(preflight.blame(results, node_of)) == blamed


def test_many_who_stay_behind_are_a_network_and_no_nodes():
    results = {rank: result(rank, 3 if rank < 2 else 2) for rank in range(8)}
    assert preflight.blame(results, NODE_OF) == {}


def test_bandwidths_are_told_and_the_slowest_link_named():
    node_of = {0: "a", 1: "b", 2: "c", 3: "d"}
    results = {rank: {"all_reduce": 40.0 + rank, "receive": 20.0} for rank in node_of}
    results[2]["receive"] = 4.0
    text = "\n".join(preflight.describe_links(results, node_of))
    assert "all-reduce over 4 processes: 40.00 GB/s" in text
    assert "20.00 GB/s, the slowest 4.00 GB/s from b to c" in text and "warning: the link from b to c is slow" in text


def test_the_facts_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "made" / "here"))
    facts = preflight.gather_facts(tmp_path)
    assert facts["versions"]["torch"] and facts["run_error"] is None
    assert facts["temporary"] == str(tmp_path / "made" / "here") and facts["space"]["temporary"] > 0
    assert facts["space"]["run"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert list(tmp_path.iterdir()) == [tmp_path / "made"], "the test file is gone"
    assert "cannot be written to" in preflight.gather_facts(tmp_path / "absent")["run_error"]


def test_only_the_communication_is_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float) -> Callable[[], None]:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    assert preflight._time(None, SimpleNamespace(type="cpu"), takes(1.0), takes(10.0)) == 1.0
