"""CPUs and threads of the processes of a node."""

from __future__ import annotations

import pytest

from plt_megatron.launcher.binding import _local_cpus, parse_cpu_list, share_out, threads


def test_processes_share_the_jobs_cpus_and_no_others():
    cpus = {2, 3, 4, 5, 10, 11, 12}
    shares = share_out(cpus, 3)
    assert set().union(*shares) == cpus and sum(map(len, shares)) == len(cpus)
    assert sorted(map(len, shares)) == [2, 2, 3]


def test_fewer_cpus_than_processes_bind_none():
    assert share_out({0, 1}, 4) == [None] * 4


def test_a_process_runs_near_its_device():
    left, right = set(range(8)), set(range(8, 16))
    shares = share_out(left | right, 4, [left, right, right, left])
    assert [share <= near for share, near in zip(shares, [left, right, right, left], strict=True)] == [True] * 4
    assert sum(map(len, shares)) == len(set().union(*shares)) == 16


@pytest.mark.parametrize(
    "near",
    [
        [{0, 1}, {0, 1}, {0, 1}, {2, 3}],  # three processes near two CPUs
        [{0, 1, 2}, {2, 3}, None, None],  # what is near overlaps
        [{90}, {91}, {92}, {93}],  # near, and not this job's
    ],
)
def test_what_cannot_be_near_is_shared_evenly(near):
    shares = share_out({0, 1, 2, 3}, 4, near)
    assert sorted(map(sorted, shares)) == [[0], [1], [2], [3]]


def test_threads():
    assert threads({0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}, 2, 8) == 4
    assert threads({0, 1, 2, 3}, {0, 1, 2, 3}, 1, 2) == 2, "no more than the job asked for"
    assert threads(None, {0, 1}, 4, 8) == 1


def test_cpu_lists():
    assert parse_cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpu_list("\n") == set()


def test_the_kernel_knows_what_is_near_a_gpu(tmp_path):
    device = tmp_path / "0000:3b:00.0"
    device.mkdir()
    (device / "local_cpulist").write_text("0-1\n")
    assert _local_cpus(tmp_path, "00000000:3B:00.0") == {0, 1}
    assert _local_cpus(tmp_path, "00000000:AF:00.0") is None
