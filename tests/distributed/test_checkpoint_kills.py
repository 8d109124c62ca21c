"""A run whose ranks are killed at random moments, even while saving, ends like an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.pool import DistributedFailure


def _run(directory: Path, config, steps: int, kill: tuple[int, float] | None = None):
    """Go on to step `steps`, saving after each; `kill`: the rank to die, and after how many seconds."""
    from plt_megatron.train.checkpoint.store import CheckpointStore

    if kill is not None and kill[0] == int(os.environ["RANK"]):
        timer = threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    store, engine = CheckpointStore(directory, config, {"sha256": "a"}), jobs.build(config)
    progress = store.load(engine) or {"step": 0, "losses": []}
    losses = progress["losses"]
    for step in range(progress["step"] + 1, steps + 1):
        losses += [list(numbers) for numbers in jobs.train(engine, step, step)]
        store.save(engine, {"step": step, "losses": losses})
        store.poll()
    store.close()
    if kill is not None:
        threading.Event().wait()  # it dies, however fast it was
    return losses, jobs.digest(engine)


@pytest.mark.parametrize(("kills", "seed"), [(3, 1), (20, 2)])
@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_where_an_undisturbed_one_does(run_distributed, tmp_path, kills, seed):
    from plt_megatron.run_folder import checkpoints
    from plt_megatron.train.checkpoint import publishing

    config = jobs.run_config({"pipeline_model_parallel_size": 2})
    config.checkpoint.keep_last = 3
    steps = 4 * kills
    expected = run_distributed(_run, 2, tmp_path / "whole", config, steps, all_ranks=True)
    directory, draw = tmp_path / "killed", random.Random(seed)
    for kill in range(kills):
        config.checkpoint.async_save = kill % 2 == 1
        with pytest.raises(DistributedFailure, match="died|gloo"):  # nothing of ours
            run_distributed(_run, 2, directory, config, steps, (draw.randrange(2), draw.uniform(0.05, 1.5)))
        publishing.recover(directory)
        for path in checkpoints.checkpoint_folders(directory):
            assert checkpoints.damage(path) is None  # what is listed is whole
    assert run_distributed(_run, 2, directory, config, steps, all_ranks=True) == expected
