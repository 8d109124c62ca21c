"""The process spawner, with children that are no trainers: environment, statuses, signals, bounded ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from plt_megatron.commands import preprocess
from plt_megatron.runtime import local_processes
from plt_megatron.runtime.local_processes import run_processes, threads_per_process, usable_cores
from tests.running import ROOT, alive, wait_for, wait_until_gone


def run(code: str, count: int = 2, **arguments: float) -> int:
    return run_processes([sys.executable, "-S", "-c", code], count, **arguments)


RANK = "import os, sys, time, signal; rank = int(os.environ['RANK']);"
SLEEP = "time.sleep(60)"


def test_each_process_knows_its_place(tmp_path):
    code = f"{RANK} open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(repr(dict(os.environ)))"
    assert run(code, 3) == 0
    environments = [eval((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [env["RANK"] for env in environments] == [env["LOCAL_RANK"] for env in environments] == ["0", "1", "2"]
    assert {env["WORLD_SIZE"] for env in environments} == {env["LOCAL_WORLD_SIZE"] for env in environments} == {"3"}
    assert {env["MASTER_ADDR"] for env in environments} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in environments}) == 1


def test_rank_0_can_listen_on_the_port_and_the_others_reach_it():
    code = f"""{RANK}
import socket
port = int(os.environ["MASTER_PORT"])
if rank == 0:
    server = socket.socket(socket.AF_INET6)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("::", port))
    server.listen()
    server.settimeout(60)
    server.accept()[0].sendall(b"x")
else:
    while True:
        try:
            sys.exit(socket.create_connection(("127.0.0.1", port), 60).recv(1) != b"x")
        except ConnectionRefusedError:
            time.sleep(0.01)
"""
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    assert run(code) == 0


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((0, 75), 75), ((2, 2), 2), ((1, 1), 1), ((3, 3), 3)],
)
def test_the_status_of_the_job(statuses, expected):
    assert run(f"{RANK} sys.exit({statuses!r}[rank])") == expected


def test_a_failure_ends_the_others_and_is_named(capfd):
    started = time.monotonic()
    assert run(f"{RANK} rank == 1 and sys.exit(3); {SLEEP}", 3) == 3
    assert time.monotonic() - started < 5
    error = capfd.readouterr().err
    assert "rank 1 exited with status 3" in error and "stopping the other 2" in error


def test_a_process_that_ignores_the_request_to_stop_is_killed(tmp_path):
    ready = str(tmp_path / "ready")
    code = f"""{RANK}
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open({ready!r}, "w").close()
    {SLEEP}
while not os.path.exists({ready!r}):
    time.sleep(0.01)
sys.exit(4)
"""
    started = time.monotonic()
    assert run(code, grace_seconds=0.3) == 4
    assert 0.3 <= time.monotonic() - started < 5


def test_a_killed_process_is_named_with_its_signal(capfd):
    assert run(f"{RANK} rank == 0 and os.kill(os.getpid(), signal.SIGKILL); {SLEEP}") == 137
    assert "rank 0 was killed by SIGKILL (out of memory?)" in capfd.readouterr().err


def test_preemption_of_one_does_not_stop_the_others(tmp_path):
    """Rank 0 may still be writing the checkpoint when rank 1 has left with status 75."""
    done = tmp_path / "done"
    code = f"{RANK} rank == 1 and sys.exit(75); time.sleep(0.3); open({str(done)!r}, 'w').close(); sys.exit(75)"
    assert run(code) == 75
    assert done.exists()


def test_the_cause_is_preferred_to_its_echo():
    assert local_processes._exit_status([1, 2]) == 2
    assert local_processes._exit_status([1, -signal.SIGSEGV]) == 128 + signal.SIGSEGV
    assert local_processes._exit_status([1, 1]) == 1


def test_a_command_that_does_not_exist_leaves_nothing_behind():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError):
        run_processes(["/nonexistent/command"], 2)
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- signals, from outside

DRIVER = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` ignores it
from plt_megatron.runtime.local_processes import run_processes
assert "torch" not in sys.modules
lock = open(os.environ["TEST_FOLDER"] + "/lock", "w")
command = [sys.executable, "-S", "-c", sys.argv[1]]
sys.exit(run_processes(command, 2, grace_seconds=2, pass_fds=[lock.fileno()]))
"""

LISTENER = """
import os, signal, sys, time
rank, folder = os.environ["RANK"], os.environ["TEST_FOLDER"]
heard = []
def hear(number, frame):
    heard.append(number)
    print(signal.Signals(number).name, file=open(f"{folder}/heard.{rank}", "a"), flush=True)
for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
    signal.signal(getattr(signal, name), hear)
print(os.getpid(), file=open(f"{folder}/up.{rank}.part", "w"), flush=True)
os.rename(f"{folder}/up.{rank}.part", f"{folder}/up.{rank}")
while signal.SIGTERM not in heard:
    time.sleep(0.01)
sys.exit(75)
"""


# On SIGINT rank 1 ends at once, and rank 0 after the spawner has seen that, with something left to do.
INTERRUPTED = """
import os, signal, sys, time
rank, folder = os.environ["RANK"], os.environ["TEST_FOLDER"]
def end(number, frame):
    while rank == "0" and os.path.exists("/proc/" + open(f"{folder}/up.1").read().strip()):
        time.sleep(0.01)
    time.sleep(0.3 if rank == "0" else 0)
    print("in order", file=open(f"{folder}/end.{rank}", "w"), flush=True)
    os._exit(130)
signal.signal(signal.SIGINT, end)
print(os.getpid(), file=open(f"{folder}/up.{rank}.part", "w"), flush=True)
os.rename(f"{folder}/up.{rank}.part", f"{folder}/up.{rank}")
time.sleep(60)
"""


@contextlib.contextmanager
def driver(folder: Path, listener: str = LISTENER) -> Iterator[subprocess.Popen[bytes]]:
    """The spawner in a process of its own with two listeners, once both are up."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TEST_FOLDER": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, listener], env=env)
    try:
        wait_for(lambda: all((folder / f"up.{rank}").exists() for rank in range(2)))
        yield process
    finally:
        process.kill()
        process.wait()


def heard(folder: Path) -> list[list[str]]:
    files = [folder / f"heard.{rank}" for rank in range(2)]
    return [file.read_text().split() if file.exists() else [] for file in files]


def pids(folder: Path) -> list[int]:
    return [int((folder / f"up.{rank}").read_text()) for rank in range(2)]


def test_signals_reach_every_process_and_preemption_is_reported(tmp_path):
    with driver(tmp_path) as process:
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: heard(tmp_path) == [["SIGUSR1"]] * 2)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: heard(tmp_path) == [["SIGUSR1", "SIGINT"]] * 2)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: heard(tmp_path) == [["SIGUSR1", "SIGINT", "SIGHUP"]] * 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert heard(tmp_path) == [["SIGUSR1", "SIGINT", "SIGHUP", "SIGTERM"]] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_who_is_interrupted_puts_things_in_order_though_others_are_done(tmp_path):
    with driver(tmp_path, INTERRUPTED) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [(tmp_path / f"end.{rank}").read_text() for rank in range(2)] == ["in order\n"] * 2


def test_a_second_interrupt_kills(tmp_path):
    with driver(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        wait_for(lambda: heard(tmp_path) == [["SIGINT"]] * 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert alive(pids(tmp_path)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_no_process_outlives_a_killed_launcher(tmp_path):
    with driver(tmp_path) as process:
        process.kill()
        process.wait(60)
        wait_until_gone(*pids(tmp_path))
    assert heard(tmp_path) == [["SIGTERM"]] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_process_holds_the_launchers_lock(tmp_path):
    """So that no other training begins while ranks of a killed launcher still save."""
    with driver(tmp_path):
        for pid in pids(tmp_path):
            assert str(tmp_path / "lock") in [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]


# ---------------------------------------------------------------- cores


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(local_processes, "usable_cores", lambda: 7)
    assert [threads_per_process(count) for count in (1, 2, 3, 7, 8)] == [7, 3, 2, 1, 1]
    monkeypatch.undo()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_tokenizing_takes_the_cores_that_it_may_use(monkeypatch):
    """Not all 256 of a node of which a job has eight."""
    monkeypatch.setattr(local_processes.os, "sched_getaffinity", lambda pid: {3})
    arguments = ["--input", "a.jsonl", "--output-prefix", "a", "--tokenizer", "tokenizer.model"]
    assert preprocess._options(preprocess._parser().parse_args(arguments)).workers == 1


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("", 8)])
def test_a_containers_cpu_limit_counts(monkeypatch, text, cores):
    monkeypatch.setattr(local_processes.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(local_processes.Path, "read_text", lambda self, encoding: text)
    assert usable_cores() == cores
