"""The Slurm cluster of the tests: started once per session where that is possible, shared by parallel sessions."""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from plt_megatron.config.schema import DataConfig
from tests.distributed.training_jobs import make_data
from tests.running import ROOT
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import make_config, train_locally


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The cluster, for tests that do not disturb other jobs; most use `slurm`."""
    reason = SlurmCluster.reason_for_none()
    if reason is not None:
        pytest.skip(f"no Slurm test cluster: {reason}")
    # One a checkout, so that what a killed session has left is found and cleared away by the next.
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    state = Path(tempfile.gettempdir()) / f"plt-slurm-{name}"
    state.mkdir(exist_ok=True)
    cluster = SlurmCluster(state)
    with (state / "users.lock").open("w") as users:
        join(cluster, users)
        # Whatever becomes of this process, the kernel lets go of its lock, and the cluster is taken down.
        cluster.control("stop-after", users.name)
        yield cluster
        leave(cluster, users)


def join(cluster: SlurmCluster, users: IO[str]) -> None:
    """Take a share in the cluster: `users` is locked, the cluster is up."""
    with (cluster.state / "start.lock").open("w") as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        while True:
            if not in_use(users):  # what runs is a leftover
                fcntl.flock(users, fcntl.LOCK_EX)
                cluster.control("start")
            # Between the two locks, or while the second was waited for, somebody may have taken it down.
            fcntl.flock(users, fcntl.LOCK_SH)
            if cluster.is_running():
                return
            fcntl.flock(users, fcntl.LOCK_UN)


def leave(cluster: SlurmCluster, users: IO[str]) -> None:
    """Give the share up; the last one takes the cluster down."""
    with (cluster.state / "start.lock").open("w") as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody else has one
            return
        cluster.control("stop")


def in_use(users: IO[str]) -> bool:
    """Whether another process has a share in the cluster, or is taking it down."""
    with open(users.name, "w") as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster for one test alone; what it leaves behind is cleared away."""
    with (slurm_cluster.state / "test.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield slurm_cluster
        slurm_cluster.clear()


@pytest.fixture(scope="session")
def slurm_data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Tokenized text, and its tokenizer."""
    return make_data(tmp_path_factory.mktemp("slurm_data"))


@pytest.fixture(scope="session")
def undisturbed(
    slurm_data: DataConfig, tmp_path_factory: pytest.TempPathFactory, warm_python: str
) -> list[dict[str, Any]]:
    """The metrics of the tests' configuration, run locally and undisturbed."""
    return train_locally(make_config("local", tmp_path_factory.mktemp("local"), slurm_data), warm_python)
