"""The processes of a node, real ones."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from plt_megatron.launcher.workers import WorkerGroup, _local_cpus, parse_cpu_list, share_out, threads
from tests.running import wait_for

READY = "import os, sys, time, signal; rank = int(os.environ['RANK']);"


class Heard:
    """A group, and what it has told."""

    def __init__(self, code: str, count: int = 1, cpus: list | None = None) -> None:
        self.lines: list[tuple[int, str]] = []
        self.exits: dict[int, int] = {}
        environments = {rank: os.environ | {"RANK": str(rank), "PYTHONUNBUFFERED": "1"} for rank in range(count)}
        self.group = WorkerGroup(
            [sys.executable, "-S", "-c", READY + code],
            environments,
            cpus or [None] * count,
            lambda rank, lines: self.lines.extend((rank, line) for line in lines),
            lambda worker, code: self.exits.__setitem__(worker.rank, code),
        )

    def wait(self, condition) -> None:
        wait_for(lambda: condition() or self._listen(), details=lambda: (self.lines, self.exits), interval=0.01)

    def _listen(self) -> None:
        for worker in self.group.workers:
            self.group.listen(worker)
        self.group.reap()

    def wait_for_exits(self, count: int = 1) -> None:
        self.wait(lambda: len(self.exits) == count)


@pytest.fixture
def start():
    started: list[Heard] = []

    def make(*arguments) -> Heard:
        started.append(Heard(*arguments))
        return started[-1]

    yield make
    for heard in started:
        heard.group.kill()
        heard.wait_for_exits(len(heard.exits) + len(heard.group.workers))


def test_lines_of_both_outputs_arrive_whole(start):
    heard = start("[print(rank, i, file=(sys.stdout, sys.stderr)[i % 2]) for i in range(100)]", 3)
    heard.wait_for_exits(3)
    for rank in range(3):
        assert [line for r, line in heard.lines if r == rank] == [f"{rank} {i}" for i in range(100)]


def test_the_last_words_need_no_newline(start):
    heard = start("os.write(1, b'a\\nlast \\xff words'); os._exit(3)")
    heard.wait_for_exits()
    assert heard.lines == [(0, "a"), (0, "last \ufffd words")] and heard.exits == {0: 3}


def test_a_line_without_end_is_cut(start):
    heard = start("os.write(1, b'x' * 200000 + b'\\nend\\n')")
    heard.wait_for_exits()
    assert sum(len(line) for _, line in heard.lines[:-1]) == 200_000 and heard.lines[-1] == (0, "end")


def test_lines_are_heard_while_it_runs(start):
    heard = start("print('up'); time.sleep(60)")
    heard.wait(lambda: heard.lines == [(0, "up")])
    assert heard.exits == {}


def test_a_child_that_keeps_the_output_open_holds_nothing_up(start, tmp_path):
    """A loader's process that outlives its parent: it is ended too."""
    code = f"pid = os.fork(); pid or time.sleep(60); open({str(tmp_path / 'pid')!r}, 'w').write(str(pid)); os._exit(1)"
    heard = start(code)
    heard.wait_for_exits()
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    heard.wait(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def test_requests_to_stop_wait_until_somebody_listens(start):
    """Slurm's signals reach a process that still imports: they must not kill it. Ours is repeated until it is heard."""
    code = """
for number in (signal.SIGUSR1, signal.SIGTERM):
    os.kill(os.getpid(), number)
print("alive")
time.sleep(0.2)
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
print("listens")
time.sleep(60)
"""
    heard = start("\n" + code)
    heard.wait(lambda: (0, "listens") in heard.lines)
    heard.group.signal(signal.SIGUSR1)
    heard.wait_for_exits()
    assert heard.exits == {0: 75} and heard.lines[0] == (0, "alive")


def test_a_stopped_process_can_be_ended(start):
    heard = start("print('up'); time.sleep(60)")
    heard.wait(lambda: heard.lines)
    heard.group.signal(signal.SIGSTOP)
    heard.group.kill()
    heard.wait_for_exits()
    assert heard.exits == {0: -signal.SIGKILL}


def test_each_runs_on_its_cpus(start):
    available = sorted(os.sched_getaffinity(0))
    heard = start("print(sorted(os.sched_getaffinity(0)))", 2, [{available[0]}, None])
    heard.wait_for_exits(2)
    assert sorted(heard.lines) == [(0, str([available[0]])), (1, str(available))]


def test_a_command_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        WorkerGroup(["/nonexistent"], {0: {}}, [None], lambda *_: None, lambda *_: None)


# CPUs and threads of the processes of a node.


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
    assert _local_cpus("00000000:3B:00.0", tmp_path) == {0, 1}
    assert _local_cpus("00000000:AF:00.0", tmp_path) is None
