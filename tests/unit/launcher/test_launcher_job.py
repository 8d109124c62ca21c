"""The job's nodes from Slurm's environment, and where the launchers meet."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from plt_megatron.errors import UserError
from plt_megatron.launcher.job import expand_nodes, read_allocation

JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[08-10]", "SLURMD_NODENAME": "gpu09"}

LISTS = {
    "node1": ["node1"],
    "a,b": ["a", "b"],
    "gpu[08-10,12],login": ["gpu08", "gpu09", "gpu10", "gpu12", "login"],
    "n[1-2]-ib[0-1]": ["n1-ib0", "n1-ib1", "n2-ib0", "n2-ib1"],
    "r[1,3]c[098-101]": [f"r{r}c{c:03d}" for r in (1, 3) for c in range(98, 102)],
    "x[9-11]y": ["x9y", "x10y", "x11y"],
}


@pytest.mark.parametrize("text", LISTS)
def test_lists_of_nodes(text):
    assert expand_nodes(text) == LISTS[text]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no Slurm on this machine")
@pytest.mark.parametrize("text", LISTS)
def test_slurm_reads_lists_in_the_same_way(text, tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    command = ["scontrol", "show", "hostnames", text]
    env = {"PATH": "/usr/bin:/bin", "SLURM_CONF": str(tmp_path / "slurm.conf")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip())
    assert done.stdout.split() == LISTS[text]


@pytest.mark.parametrize("text", ["n[1-", "n[a-b]", "n[]", "n[1-2", ""])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(UserError, match="is not a list of nodes"):
        expand_nodes(text)


def test_a_job():
    allocation = read_allocation(JOB)
    assert allocation.nodes == ("gpu08", "gpu09", "gpu10")
    assert (allocation.node, allocation.first_node, allocation.node_index) == ("gpu09", "gpu08", 1)
    assert (allocation.scheduler_id, allocation.restart_count) == ("4711", 0)


def test_the_steps_nodes_come_before_the_jobs():
    """A step may run on some of them only."""
    allocation = read_allocation(JOB | {"SLURM_STEP_NODELIST": "gpu[09-10]", "SLURM_RESTART_COUNT": "3"})
    assert allocation.nodes == ("gpu09", "gpu10") and allocation.node_index == 0 and allocation.restart_count == 3


def test_a_member_of_an_array_is_named_by_array_and_task():
    """The last member has the array's own number: naming it by that would mean all of them."""
    allocation = read_allocation(JOB | {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "4"})
    assert allocation.scheduler_id == "4711_4"


def test_outside_of_a_job():
    with pytest.raises(UserError, match="SLURM_JOB_ID is not set: this runs inside a Slurm job"):
        read_allocation({})


def test_ports_follow_from_the_job_and_collide_with_nobodys():
    ports: dict[int, str] = {}
    for job in range(1000, 1200):
        allocation = read_allocation(JOB | {"SLURM_JOB_ID": str(job)})
        own = {allocation.launcher_port, *map(allocation.rendezvous_port, range(1, 7))}
        assert len(own) == 4 and all(1024 < port < 32768 for port in own)
        assert allocation.rendezvous_port(1) != allocation.rendezvous_port(2)
        assert not own & ports.keys()
        ports |= dict.fromkeys(own, str(job))
    again = read_allocation(JOB | {"SLURM_JOB_ID": "1000"})
    assert ports[again.launcher_port] == "1000"
