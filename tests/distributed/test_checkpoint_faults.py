"""Damaged and half-written checkpoints, full disks: one line that names it, and the last whole one serves."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest

from plt_megatron.errors import UserError
from plt_megatron.run_folder import checkpoints
from tests.checkpoints import save_checkpoint
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.pool import DistributedFailure

PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
DP2: dict = {}


def _save_twice(directory, config):
    engine = jobs.build(config)
    for step in (1, 2):
        jobs.train(engine, step, step)
        save_checkpoint(engine, directory, {"step": step}, keep_last=5)


@pytest.fixture(scope="module")
def saved_once(run_distributed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    run_distributed(_save_twice, 2, directory, jobs.run_config(PP2))
    return directory


@pytest.fixture
def saved(saved_once, tmp_path):
    """A run's folder with whole checkpoints of steps 1 and 2, from two ranks."""
    shutil.copytree(saved_once, tmp_path / "checkpoints")
    return tmp_path


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("__1_0.distcp", _flip, r"__1_0.distcp is damaged, its SHA-256 is not the manifest's"),
        ("manifest.json", Path.unlink, r"manifest\.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_last_whole_one_used(run_distributed, saved, name, harm, message):
    damaged = saved / "checkpoints" / "step_00000002"
    harm(damaged / name)
    seen = run_distributed(_load_run_and_checkpoint, 2, saved, damaged, jobs.run_config(PP2), all_ranks=True)
    assert [rank["progress"]["step"] for rank, _ in seen] == [1, 1]
    named, used = seen[0][0]["log"]
    with pytest.raises(AssertionError, match=rf"^checkpoint \S+step_00000002: {message}$"):
        raise AssertionError(named)
    assert used == f"using {saved}/checkpoints/step_00000001 instead"
    # Asked for by its own name, there is nothing to fall back on.
    assert [error for _, error in seen] == [named, named]


def _load_run_and_checkpoint(run, checkpoint, config):
    return jobs.load_and_train(run, config, then=0), jobs.error_of_load(checkpoint, config)


def test_no_whole_checkpoint_left_is_an_error_not_a_fresh_start(run_distributed, saved):
    for step in (1, 2):
        _flip(saved / "checkpoints" / f"step_0000000{step}" / ".metadata")
    error = run_distributed(jobs.error_of_load, 2, saved, jobs.run_config(PP2), all_ranks=True)
    assert error == [f"{saved}: no complete checkpoint there"] * 2


def _kinds_of_io_errors(run, config):
    """What loading raises where the disk answers with errors: to reading the last one's files, and to listing all."""
    from plt_megatron.train.checkpoint.loading import load_checkpoint

    def read(path):
        if path.parent.name == "step_00000001":
            return sha256(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    engine, kinds, sha256 = jobs.build(config), [], checkpoints.sha256
    for name in ("sha256", "candidates"):
        with mock.patch.object(checkpoints, name, read), pytest.raises(UserError) as raised:
            load_checkpoint(engine, run)
        kinds.append(raised.type.__name__)
    return kinds


def test_a_disk_that_does_not_answer_fails_the_attempt_and_not_the_run(run_distributed, saved):
    seen = run_distributed(_kinds_of_io_errors, 2, saved, jobs.run_config(PP2), all_ranks=True)
    assert seen == [["AttemptFailed", "AttemptFailed"]] * 2


def _die_while_writing(directory, config):
    from plt_megatron.train.checkpoint.saving import begin_save

    engine = jobs.build(config)
    save = begin_save(engine, directory, {"step": 3})
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    save.write()
    save.publish(2, 0)


def test_a_rank_killed_while_writing_leaves_the_last_checkpoint_and_rubbish_the_next_save_clears(
    run_distributed, saved
):
    directory = saved / "checkpoints"
    with pytest.raises(DistributedFailure, match="rank 1 died"):
        run_distributed(_die_while_writing, 2, directory, jobs.run_config(PP2))
    assert [path.is_dir() for path in directory.glob("step_00000003.*.tmp")] == [True]
    seen = run_distributed(jobs.load_and_train, 2, saved, jobs.run_config(PP2), then=0)
    assert seen["progress"]["step"] == 2
    run_distributed(jobs.train_and_save, 2, directory, jobs.run_config(PP2))
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000002", "step_00000003"]


def _save_with_fault(engine, directory, fault=None):
    """Save step 3 with a fault, which says where a rank cannot write; return the error."""
    rank = int(os.environ["RANK"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_json = checkpoints.write_json
    if fault == "writer" and rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    if fault == "publisher" and rank == 0:
        write_json = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    try:
        with mock.patch.object(checkpoints, "write_json", write_json):
            save_checkpoint(engine, directory, {"step": 3}, keep_last=1)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


def _run_into_fault(directory, config, fault):
    """(the error, what lies in the folder then, the step a load finds, what the next save ends with)"""
    from plt_megatron.train.checkpoint.loading import load_checkpoint

    _save_twice(directory, config)
    engine = jobs.build(config)
    error = _save_with_fault(engine, directory, fault)
    names = sorted(path.name for path in directory.iterdir())
    return error, names, load_checkpoint(engine, directory)["step"], _save_with_fault(engine, directory)


@pytest.mark.parametrize(
    ("layout", "fault", "reason"),
    [(PP2, "writer", "File too large (rank 1)"), (DP2, "publisher", "No space left on device")],
    ids=["writer", "publisher"],
)
def test_a_disk_that_takes_no_more_is_one_line_on_all_ranks_and_harms_nothing(
    run_distributed, tmp_path, layout, fault, reason
):
    directory = tmp_path / "checkpoints"
    seen = run_distributed(_run_into_fault, 2, directory, jobs.run_config(layout), fault, all_ranks=True)
    assert seen[0][0] == seen[1][0]
    error, names, step, next_save = seen[0]
    assert "\n" not in error and error.startswith("cannot save step 3: ") and reason in error
    assert error.endswith(f"; the last checkpoint is intact: {directory}/step_00000002")
    assert names == ["latest", "step_00000001", "step_00000002"]
    assert step == 2 and next_save == "saved"


def test_a_folder_that_cannot_be_made_is_one_line(run_distributed, tmp_path):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("in the way")
    errors = run_distributed(_save_fresh, 2, blocked, jobs.run_config(PP2), all_ranks=True)
    assert errors == [f"cannot save step 3: {blocked}: File exists; there is no earlier checkpoint"] * 2


def _save_fresh(directory, config):
    return _save_with_fault(jobs.build(config), directory)


def _children_after_saving(directory, config):
    import psutil

    jobs.train_and_save(directory, config)
    return [process.name() for process in psutil.Process().children(recursive=True)]


def test_saving_starts_no_process(run_distributed, tmp_path):
    """One would outlive a killed rank and keep its connections open, so that the others wait instead of failing."""
    children = run_distributed(_children_after_saving, 2, tmp_path, jobs.run_config(PP2), all_ranks=True)
    assert children == [[], []]


def _save_copies_that_differ(directory, config, name, main):
    """Save after rank 1 has come to hold another value, in a weight or in the optimizer's copy; return the error."""
    import torch

    engine = jobs.build(config)
    jobs.train(engine, 1, 1)
    save_checkpoint(engine, directory, {"step": 2})
    if os.environ["RANK"] == "1":
        tensor = dict(engine.stage.named_parameters())[name]
        tensor = engine.state.parts[0].main_parameter(tensor) if main else tensor
        with torch.no_grad():
            tensor.view(-1)[5] += 0.01
    return _save_with_fault(engine, directory)


EMBEDDING = "embedding.word_embeddings.weight"
GATE = "decoder.layers.1.self_attention.core_attention.plt_gate.weight"


@pytest.mark.parametrize(
    ("layout", "name", "main", "named"),
    [
        (PP2, "output_layer.weight", False, EMBEDDING),
        (PP2, "output_layer.weight", True, f"optimizer.state.param.{EMBEDDING}"),
        (TP2, "decoder.layers.1.mlp.linear_fc1.layer_norm_weight", False, "decoder.layers.mlp.linear_fc1."),
        (TP2, GATE, False, "decoder.layers.self_attention.core_attention.plt_gate."),
    ],
    ids=["embedding", "main weights", "norm", "gate on hidden states"],
)
def test_copies_that_differ_are_not_written(run_distributed, tmp_path, layout, name, main, named):
    """One element of one rank does; in bf16, where a weight may not show yet what the optimizer has."""
    config = jobs.run_config(layout, "bf16", gate_input="hidden")
    errors = run_distributed(_save_copies_that_differ, 2, tmp_path, config, name, main, all_ranks=True)
    assert errors[0] == errors[1] and "\n" not in errors[0]
    assert errors[0].startswith(f"cannot save step 3: ranks 0 and 1 hold different copies of {named}")
    assert errors[0].endswith(f"; the last checkpoint is intact: {tmp_path}/step_00000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


def test_what_ranks_share_out_may_differ(run_distributed, tmp_path):
    config = jobs.run_config(TP2)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert run_distributed(_save_copies_that_differ, 2, tmp_path, config, name, False) == "saved"
