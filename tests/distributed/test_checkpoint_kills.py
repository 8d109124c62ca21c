"""A run whose ranks are killed at random moments, saves included, ends where one does that was left alone."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.pool import DistributedFailure, WorkerPool

STEPS = 12


@pytest.fixture
def own_pool():
    """Killed workers are no use to other tests."""
    pool = WorkerPool()
    yield pool
    pool.close()


def _run(directory: str, config, kill: tuple[int, float] | None = None):
    """Go on to the last step, saving after each; `kill`: the rank to die, and after how many seconds."""
    from plt_megatron.train.checkpoint import CheckpointStore

    if kill is not None and kill[0] == int(os.environ["RANK"]):
        timer = threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    store, engine = CheckpointStore(Path(directory), config, {"sha256": "a"}), jobs.build(config)
    progress = store.load(engine) or {"step": 0, "losses": []}
    losses = progress["losses"]
    for step in range(progress["step"] + 1, STEPS + 1):
        losses += [list(numbers) for numbers in jobs.train(engine, step, step)]
        store.save(engine, {"step": step, "losses": losses})
        store.poll()
    store.close()
    if kill is not None:
        threading.Event().wait()  # it dies, however fast it was
    return losses, jobs.digest(engine)


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_killed_runs_end_bit_for_bit_where_an_undisturbed_one_does(own_pool, tmp_path, kills, seed):
    from plt_megatron.train.checkpoint import folder

    config = jobs.run_config({"tensor_model_parallel_size": 2})
    config.checkpoint.keep_last = 3
    expected = own_pool.run(_run, 2, str(tmp_path / "whole"), config)
    directory, draw = tmp_path / "killed", random.Random(seed)
    for kill in range(kills):
        config.checkpoint.async_save = kill % 2 == 1
        with pytest.raises(DistributedFailure, match="died|gloo"):  # nothing of ours
            own_pool.run(_run, 2, str(directory), config, (draw.randrange(2), draw.uniform(0.05, 1.5)))
        folder.recover(directory)
        for path in folder.checkpoint_folders(directory):
            assert folder.damage(path) is None  # what is listed is whole
    assert own_pool.run(_run, 2, str(directory), config) == expected
