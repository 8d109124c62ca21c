"""The cluster that the tests start: where it cannot run, and what is left of it when the tests are killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, wait_for
from tests.slurm.cluster import SCRIPT, SlurmCluster, processes

REASON = SlurmCluster.reason_for_none()
needs_cluster = pytest.mark.skipif(REASON is not None, reason=f"no Slurm test cluster: {REASON}")

# Starts a cluster as the fixture does, says so, and never ends by itself.
SESSION = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import join
cluster = SlurmCluster(Path(sys.argv[1]))
with (cluster.state / "users.lock").open("w") as users:
    join(cluster, users)
    cluster.control("stop-after", users.name)
    print(cluster.run("sinfo", "--noheader", "--format=%N %G"), end="", flush=True)
    time.sleep(600)
"""


def ip(*words: str) -> list[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout.splitlines()


def processes_of(state: Path) -> list[str]:
    """Command lines of all processes that have to do with the cluster."""
    found = processes().values()
    return [b" ".join(words).decode() for words, env in found if str(state).encode() in b"".join([*words, *env])]


@needs_cluster
def test_killed_tests_leave_no_cluster_behind(tmp_path):
    env = os.environ | {"CLUSTER_NODES": "1", "PYTHONPATH": str(ROOT)}
    session = subprocess.Popen([sys.executable, "-c", SESSION, str(tmp_path)], env=env, stdout=subprocess.PIPE)
    try:
        assert session.stdout is not None
        assert session.stdout.readline() == b"node1 gpu:h100:2\n"
        address = re.search(r"SlurmctldHost=ctl\((.*)\)", (tmp_path / "slurm.conf").read_text())[1]
        (bridge,) = (line.split()[1] for line in ip("-o", "address") if f" {address}/" in line)
        name = bridge.removeprefix("plt")

        def left() -> list[str]:
            return [*processes_of(tmp_path), *(line for line in ip("netns") + ip("-o", "link") if name in line)]

        daemons = ("munged", "slurmctld", "slurmd -D -N node1")
        assert all(any(daemon in line for line in left()) for daemon in daemons), left()
        session.kill()
        session.wait()
        wait_for(lambda: not left(), "the cluster to be gone", 30, left)
    finally:
        session.kill()
        session.wait()
        SlurmCluster(tmp_path).control("stop")


def check(*prefix: str, **options: Any) -> tuple[int, str]:
    """Status and words of `cluster.sh check`, which is read from here: not every user may look into a checkout."""
    with SCRIPT.open() as script:
        command = [*prefix, "bash", "-s", "check"]
        done = subprocess.run(command, stdin=script, capture_output=True, text=True, check=False, cwd="/", **options)
    return done.returncode, done.stdout


@needs_cluster
def test_where_no_cluster_can_run_one_line_says_why():
    assert check() == (0, "")
    assert check(user=65534, extra_groups=[]) == (1, "a Slurm test cluster needs root\n")
    hidden = ("unshare", "--mount", "bash", "-c", 'mount -t tmpfs none /usr/sbin && exec "$@"', "bash")
    status, words = check(*hidden)
    assert status == 1 and re.fullmatch(r"not installed: munged .*slurmctld slurmd.* \(apt-get install .*\)\n", words)
    status, words = check("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    assert status == 1 and re.fullmatch(r"no namespaces may be made here .*\n", words)
