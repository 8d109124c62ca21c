"""Launchers of two nodes as processes of this machine, with programs in place of torch and the trainer."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import Mock

import pytest
from jobs import job_settings

from plt_megatron.config.schema import RunConfig
from plt_megatron.launcher import node as launching
from plt_megatron.launcher.job import Allocation, save_settings
from plt_megatron.run_folder.folder import RunFolder, save_config
from tests.running import ROOT, alive, run, wait_for

# Stands in for the interpreter: `-P -m plt_megatron.launcher.preflight` or `-P -m plt_megatron.train.main CONFIG`.
PROGRAM = """#!{python} -S
import json, os, signal, socket, sys, time
rank, run = int(os.environ["RANK"]), {run!r}
if sys.argv[3].endswith("preflight"):
    result = dict(rank=rank, stage=4, error=None, all_reduce=1.0, receive=2.0, versions=dict(cuda="None"))
    print("probe " + json.dumps(result), flush=True)
    sys.exit(0)
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "PYTHONPATH")
print("env " + json.dumps({{name: os.environ[name] for name in names}}), address, flush=True)
open(run + f"/up.{{rank}}", "a").write(f"{{os.getpid()}}\\n")
def attempts():
    return len(open(run + f"/up.{{rank}}").read().split())
{body}
"""
LISTEN = """
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
while not os.path.exists(run + "/finish"):
    time.sleep(0.02)
"""


# A launcher in which something is not as it is: `launch(changed=...)`.
CHANGED = """
import runpy, sys, time
sys.path.insert(0, {root!r})
from plt_megatron.launcher import preflight
{code}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The first node's coordinator hardly waits for other causes of a failure; test_launcher_coordinator.py waits.
SETTLES_AT_ONCE = {"localhost": "from plt_megatron.launcher import coordinator\ncoordinator.SETTLE_SECONDS = 0.3"}


def test_ranks_have_the_profiles_values_where_an_image_has_its_own(tmp_path, monkeypatch):
    """As pyxis leaves them: the image's come first."""
    save_settings(job_settings(environment={"LD_LIBRARY_PATH": "$HERE/lib", "MINE": "1"}), tmp_path)
    monkeypatch.setattr(launching, "NodeLauncher", Mock())
    variables = {"LD_LIBRARY_PATH": "/image", "PLT_COPY_LD_LIBRARY_PATH": "/here/lib", "MINE": "1"}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}
    for name, value in (variables | job).items():
        monkeypatch.setenv(name, value)
    launching.launch_node(tmp_path)
    assert (os.environ["LD_LIBRARY_PATH"], os.environ["MINE"]) == ("/here/lib", "1")


class TwoNodes:
    """A job on the "nodes" localhost and other; the first one's name is all that has to resolve."""

    def __init__(self, run: Path, body: str, **settings) -> None:
        self.run = run
        (run / "logs").mkdir(parents=True)
        program = run / "python"
        program.write_text(PROGRAM.format(python=sys.executable, run=str(run), body=body))
        program.chmod(0o755)
        save_config(RunConfig(), run / "config.yaml")
        usual = {"python": str(program), "cpus_per_process": 1, "max_restarts": 1}
        save_settings(job_settings(time_limit_seconds=60, **(usual | settings)), run)
        self.job = free_job()
        self.launchers: dict[str, subprocess.Popen[str]] = {}

    def launch(self, *nodes: str, changed: Mapping[str, str] | None = None) -> None:
        """Start launchers, of both nodes unless `nodes` says otherwise. `changed`: code that a node's runs first."""
        for node in nodes or ("localhost", "other"):
            env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
            env |= {"SLURM_JOB_ID": str(self.job), "SLURM_JOB_NODELIST": "localhost,other", "SLURMD_NODENAME": node}
            command = [sys.executable, str(ROOT / "plt_megatron" / "launcher" / "in_job.py"), "node", str(self.run)]
            if node in (changed or {}):
                command = [sys.executable, "-c", CHANGED.format(root=str(ROOT), code=changed[node]), *command[1:]]
            out = (self.run / f"out.{node}").open("a")
            self.launchers[node] = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)

    def launch_all(self) -> None:
        """Start both launchers, and wait until all ranks are up."""
        self.launch()
        self.wait_until(lambda: [len(pids) for pids in self.pids().values()] == [1] * 4)

    def wait(self) -> list[int]:
        return [launcher.wait(240) for launcher in self.launchers.values()]

    def wait_until(self, condition: Callable[[], object]) -> None:
        wait_for(condition, details=self.outputs)

    def pids(self) -> dict[int, list[int]]:
        return {int(path.suffix[1:]): [*map(int, path.read_text().split())] for path in self.run.glob("up.*")}

    def outputs(self) -> str:
        return "\n".join(path.read_text() for path in [*self.run.glob("out.*"), *self.run.glob("logs/*")])

    def ends(self) -> list[dict]:
        return [event for event in RunFolder(self.run).attempts() if event["event"] == "end"]

    def alive(self) -> list[int]:
        return alive(pid for own in self.pids().values() for pid in own)

    def end(self) -> None:
        for launcher in self.launchers.values():
            launcher.kill()
            launcher.wait()


def free_job() -> int:
    """A job number whose ports are free."""
    while True:
        job = random.randrange(1 << 20)
        with socket.socket() as attempt:
            try:
                attempt.bind(("", Allocation(job, "", 0, ("a",), 0).launcher_port))
                return job
            except OSError:
                continue


@pytest.fixture
def two_nodes(tmp_path):
    made: list[TwoNodes] = []

    def make(body: str, **settings) -> TwoNodes:
        made.append(TwoNodes(tmp_path / "run", body, **settings))
        return made[-1]

    yield make
    for job in made:
        job.end()


def test_all_ranks_run_and_are_logged(two_nodes):
    job = two_nodes("[print(f'line {i} of {rank}', flush=True) for i in range(50)]")
    job.launch()
    assert job.wait() == [0, 0], job.outputs()
    logs = job.run / "logs"
    for rank in range(4):
        text = (logs / f"rank-{rank:04d}.log").read_text()
        assert [f"rank {rank}: line {i} of {rank}\n" in text for i in range(50)] == [True] * 50
        env = json.loads(re.search(r"env (\{.*\})", text)[1])
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank % 2))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["OMP_NUM_THREADS"]) == ("4", "2", "1")
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    merged = (logs / "merged.log").read_text().splitlines()
    pattern = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d attempt 1 (rank \d|launcher localhost): ")
    assert [line for line in merged if not pattern.match(line)] == []
    assert sum(" line " in line for line in merged) == 200
    assert len({re.search(r"\('localhost', \d+\)", line)[0] for line in merged if "('localhost'" in line}) == 1


def test_launchers_may_come_in_any_order(two_nodes):
    job = two_nodes("")
    job.launch("other")
    job.launch("localhost")
    assert job.wait() == [0, 0], job.outputs()


def test_a_dead_rank_ends_all_and_all_start_again(two_nodes):
    job = two_nodes("attempts() == 1 and (time.sleep(60) if rank != 3 else os.kill(os.getpid(), signal.SIGKILL))")
    job.launch(changed=SETTLES_AT_ONCE)
    assert job.wait() == [0, 0], job.outputs()
    failed, finished = job.ends()
    assert failed["failure"]["rank"] == 3 and failed["failure"]["node"] == "other"
    assert finished["status"] == "finished" and job.alive() == []


def test_a_failure_that_stays(two_nodes):
    job = two_nodes("rank == 1 and (print('error: too bad', flush=True), sys.exit(1)); time.sleep(60)")
    job.launch(changed=SETTLES_AT_ONCE)
    assert job.wait() == [1, 1], job.outputs()
    _, end = job.ends()
    assert end["reason"] == "rank 1 on localhost exited with status 1: too bad"
    assert "error: too bad" in end["failure"]["lines"] and job.alive() == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_launcher_stops_all_ranks_in_peace(two_nodes, number):
    job = two_nodes(LISTEN)
    job.launch_all()
    job.launchers["other"].send_signal(number)
    assert job.wait() == [75, 75], job.outputs()
    assert job.ends()[-1]["status"] == "preempted" and job.ends()[-1]["retry"]


def test_a_signal_while_ranks_still_start(two_nodes):
    """They do not listen yet, and must not die of it."""
    job = two_nodes("while not os.path.exists(run + '/listen'): time.sleep(0.02)\n" + LISTEN)
    job.launch_all()
    job.launchers["localhost"].send_signal(signal.SIGUSR1)
    job.wait_until(lambda: "asked to stop: saving" in job.outputs())
    (job.run / "listen").touch()
    assert job.wait() == [75, 75], job.outputs()


def test_a_signal_while_the_other_node_is_not_there_yet(two_nodes):
    job = two_nodes("")
    job.launch("localhost")
    job.wait_until(lambda: (job.run / "attempts.jsonl").exists())
    job.launchers["localhost"].send_signal(signal.SIGUSR1)
    assert job.wait() == [75], job.outputs()


@pytest.mark.parametrize(("killed", "statuses"), [("other", [77, -9]), ("localhost", [-9, 77])])
def test_a_nodes_launcher_dies(two_nodes, killed, statuses):
    """The last that is heard of the first node's is its end: the others end their ranks and exit."""
    job = two_nodes(LISTEN)
    job.launch_all()
    job.launchers[killed].kill()
    assert job.wait() == statuses, job.outputs()
    if killed == "other":
        assert job.ends()[-1]["status"] == "node_failed" and "other is lost" in job.ends()[-1]["reason"]
    job.wait_until(lambda: job.alive() == [])


def test_a_clock_that_is_off(two_nodes):
    job = two_nodes("")
    job.launch(changed={"other": "now = time.time\ntime.time = lambda: now() - 100"})
    assert job.wait() == [76, 76], job.outputs()
    (end,) = job.ends()
    assert list(end["bad_nodes"]) == ["other"]
    off = re.fullmatch(r"its clock is (-[\d.]+) s off the others'", end["bad_nodes"]["other"])
    assert off and -100.1 < float(off[1]) < -50, end


def test_a_slow_first_node_does_not_take_clocks_for_wrong(two_nodes):
    """The others' words wait while it still looks at itself."""
    job = two_nodes("")
    slow = """
look = preflight.gather_facts
def late(*arguments, **options):
    time.sleep(0.5)
    return look(*arguments, **options)
preflight.gather_facts, preflight._LARGEST_SKEW = late, 0.05
"""
    job.launch(changed={"localhost": slow})
    assert job.wait() == [0, 0], job.outputs()


def test_strangers_are_not_listened_to(two_nodes):
    """Another job's launcher on the same port, a port scanner, an earlier start of this job."""
    job = two_nodes(LISTEN)
    job.launch_all()
    address = ("localhost", Allocation(job.job, "", 0, ("a",), 0).launcher_port)
    hello = {"type": "hello", "node": "other", "job_id": job.job + 1, "restart_count": 0, "facts": {}}
    for words in (b"GET / HTTP/1.0\r\n\r\n", json.dumps(hello).encode() + b"\n", b'{"type": "preempt"}\n'):
        with socket.create_connection(address, 10) as stranger:
            stranger.sendall(words)
            assert stranger.recv(1) == b"", "it hangs up"
    (job.run / "finish").touch()
    assert job.wait() == [0, 0], job.outputs()


def test_a_port_that_is_taken(two_nodes):
    job = two_nodes("")
    with socket.create_server(("", Allocation(job.job, "", 0, ("a",), 0).launcher_port)):
        job.launch("localhost")
        assert job.wait() == [2]
    assert "cannot listen on port" in job.outputs() and "Traceback" not in job.outputs()


def test_outside_of_a_job(tmp_path):
    command = [sys.executable, str(ROOT / "plt_megatron" / "launcher" / "in_job.py"), "node", str(tmp_path)]
    done = run(command, status=2, env={"PATH": "/usr/bin:/bin"})
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
