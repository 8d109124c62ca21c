"""A run's use of checkpoints: start, resume, start from another run, other data, saving in the background."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from unittest import mock

import pytest

from plt_megatron.errors import UserError
from plt_megatron.run_folder.checkpoints import checkpoint_folders, latest_checkpoint
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.params import slow

PP2 = {"pipeline_model_parallel_size": 2}


def _config(layout=PP2, **checkpoint):
    config = jobs.run_config(layout)
    for name, value in checkpoint.items():
        assert hasattr(config.checkpoint, name)
        setattr(config.checkpoint, name, value)
    return config


def _store(directory, config, sha256="a"):
    from plt_megatron.train.checkpoint.store import CheckpointStore

    return CheckpointStore(Path(directory), config, {"sha256": sha256, "split": f"of {sha256}"})


def _run(directory, config, to_step, sha256="a"):
    """Continue a run to `to_step`, saving after every step; returns where it started."""
    store, engine = _store(directory, config, sha256), jobs.build(config)
    progress = store.load(engine)
    start = progress["step"] if progress else 0
    for step in range(start + 1, to_step + 1):
        jobs.train(engine, step, step)
        store.save(engine, {"step": step, "tokens": 100 * step})
        store.poll()
    store.close()
    return start, jobs.digest(engine), latest_checkpoint(store.directory, verify=False)


def _error_of(*args):
    try:
        return _run(*args)
    except UserError as error:
        return str(error)


def test_a_run_starts_and_goes_on_and_keeps_what_it_should(run_distributed, tmp_path):
    config = _config(keep_last=2, keep_every=2)
    assert run_distributed(_run, 2, tmp_path / "cut", config, 3)[0] == 0
    resumed = run_distributed(_run, 2, tmp_path / "cut", config, 5, all_ranks=True)
    whole = run_distributed(_run, 2, tmp_path / "whole", config, 5, all_ranks=True)
    assert [start for start, *_ in resumed] == [3, 3]
    assert [digest for _, digest, _ in resumed] == [digest for _, digest, _ in whole]
    assert resumed[0][2] == tmp_path / "cut" / "step_00000005"
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == ["latest", "step_00000002", "step_00000004", "step_00000005"]


def _present_when_told(directory, config):
    """The checkpoints that are there when each is told to have been published."""
    engine, store, present = jobs.build(config), _store(directory, config), []
    store._on_publish = lambda checkpoint: present.append([path.name for path in checkpoint_folders(directory)])
    for step in (1, 2):
        store.save(engine, {"step": step})
    return present


def test_a_checkpoint_is_told_before_older_ones_are_removed(run_distributed, tmp_path):
    """Removing takes long where they are large, and a run that is killed meanwhile has queued its export."""
    present = run_distributed(_present_when_told, 1, tmp_path, _config({}, keep_last=1))
    assert present == [["step_00000001"], ["step_00000001", "step_00000002"]]


def test_other_data_only_when_asked_explicitly(run_distributed, tmp_path):
    config = _config()
    run_distributed(_run, 2, tmp_path, config, 1)
    errors = run_distributed(_error_of, 2, tmp_path, config, 2, "b", all_ranks=True)
    assert errors[0] == errors[1]
    assert 'step 1 was trained on other data (split was "of a", is "of b")' in errors[0]
    assert "checkpoint.allow_other_data=true" in errors[0]
    assert run_distributed(_run, 2, tmp_path, _config(allow_other_data=True), 2, "b")[0] == 1
    assert run_distributed(_run, 2, tmp_path, config, 2, "b")[0] == 2


@pytest.mark.parametrize("weights_only", [slow(False), True])
def test_a_new_run_starts_from_another_and_then_goes_on_with_its_own(run_distributed, tmp_path, weights_only):
    run_distributed(_run, 2, tmp_path / "old" / "checkpoints", _config(), 2)
    config = _config(load=str(tmp_path / "old"), weights_only=weights_only)
    starts = [run_distributed(_run, 2, tmp_path / "new", config, step)[0] for step in (3, 4)]
    assert starts == ([0, 3] if weights_only else [2, 3])


def _rolled_back(directory, old, config):
    """Where a run starts, and where again: after the other run has saved once more, and has removed the first one."""
    store, engine, starts = _store(directory, config), jobs.build(config), []
    for step in (1, 2):
        (old / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
        starts.append(store.load(engine)["step"])
    shutil.rmtree(old / "checkpoints" / "step_00000001")
    return [*starts, store.load(engine)["step"]]


def test_a_rollback_returns_to_the_step_of_another_run_that_it_started_from(run_distributed, tmp_path):
    run_distributed(_run, 1, tmp_path / "old" / "checkpoints", _config({}), 2)
    config = _config({}, load=str(tmp_path / "old"))
    assert run_distributed(_rolled_back, 1, tmp_path / "new", tmp_path / "old", config) == [1, 1, 2]


def test_a_switched_off_store_loads_nothing(run_distributed, tmp_path):
    run_distributed(_run, 2, tmp_path, _config(), 1)
    assert run_distributed(_run, 2, tmp_path, _config(enabled=False), 1)[0] == 0


def _loaded(directory, config):
    """Where a run starts, and what with."""
    store, engine = _store(directory, config), jobs.build(config)
    progress = store.load(engine)
    return progress["step"] if progress else 0, jobs.digest(engine) if progress else jobs.evaluate(engine, 2)


@pytest.mark.parametrize("weights_only", [False, slow(True)])
def test_a_run_that_saves_nothing_starts_from_another_all_the_same(run_distributed, tmp_path, weights_only):
    run_distributed(_run, 1, tmp_path / "old" / "checkpoints", _config({}), 2)
    outcomes = [
        run_distributed(
            _loaded, 1, tmp_path / "new", _config({}, load=load, weights_only=weights_only, enabled=enabled)
        )
        for load, enabled in ((str(tmp_path / "old"), True), (str(tmp_path / "old"), False), (None, False))
    ]
    assert outcomes[0] == outcomes[1] != outcomes[2]


def _save_in_background(directory, config):
    """Digests when saving, after training on, and loaded; what was published while the writer was held, and after."""
    from plt_megatron.train.checkpoint.saving import PendingSave

    write, gate = PendingSave.write, directory / "go"

    def held(self):
        while not gate.exists():
            time.sleep(0.01)
        write(self)

    with mock.patch.object(PendingSave, "write", held):
        store, engine = _store(directory, config), jobs.build(config)
        jobs.train(engine, 1, 2)
        saved = jobs.digest(engine)
        store.save(engine, {"step": 2})
        jobs.train(engine, 3, 3)
        early = store.poll(), latest_checkpoint(store.directory, verify=False)
        gate.touch()
        published = None
        for _ in range(1000):
            published = published or store.poll()
            time.sleep(0.01)
            if published:
                break
    later = jobs.digest(engine)
    store.load(engine)  # back to what was saved
    return saved, later, early, published, jobs.digest(engine)


@pytest.mark.parametrize(
    ("layout", "precision"), [slow(PP2, "fp32", id="PP2 fp32"), pytest.param({}, "bf16", id="DP2 bf16")]
)
def test_saving_in_the_background_saves_the_step_it_was_asked_at(run_distributed, tmp_path, layout, precision):
    config = _config(layout, async_save=True)
    config.training.precision = precision
    seen = run_distributed(_save_in_background, 2, tmp_path, config, all_ranks=True)
    for saved, later, early, published, loaded in seen:
        assert early == (None, None)
        assert published == tmp_path / "step_00000002"
        assert saved == loaded != later


def _background_fault(directory, config, fault):
    from plt_megatron.train.checkpoint import saving

    release = directory / "release"

    def stuck(self):
        while not release.exists():
            time.sleep(0.01)

    def broken(self):
        self.error = saving.describe(OSError(28, "No space left on device", "somewhere"))

    store, engine = _store(directory, config), jobs.build(config)
    jobs.train(engine, 1, 1)
    with mock.patch.object(saving.PendingSave, "write", {"stuck": stuck, "broken": broken}[fault]):
        try:
            store.save(engine, {"step": 1})
            store.close()
        except UserError as error:
            return str(error), store.close()
        finally:
            release.touch()
    return "saved", None


@pytest.mark.parametrize(
    ("fault", "message"),
    [("stuck", "writing took longer than 0.009 minutes"), ("broken", "somewhere: No space left on device")],
)
def test_a_background_save_that_fails_or_hangs_is_an_error_on_all_ranks(run_distributed, tmp_path, fault, message):
    config = _config(async_save=True)
    config.parallel.distributed_timeout_minutes = 0.01
    seen = run_distributed(_background_fault, 2, tmp_path, config, fault, all_ranks=True)
    assert seen[0] == seen[1]
    assert seen[0][0].startswith(f"cannot save step 1: {message}") and seen[0][1] is None
    assert not list(tmp_path.glob("step_*"))
