"""How a process ends before its first step, and who says what is wrong: each node's first rank, since a file may be
missing on one node alone."""

from __future__ import annotations

import errno

import pytest

from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import AttemptFailed, UserError, file_error
from plt_megatron.run_folder.attempts import ExitStatus
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train import main as module


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no"), ExitStatus.USER_ERROR),
        (AttemptFailed("away"), ExitStatus.FAILED),
        (file_error("gone", FileNotFoundError(errno.ENOENT, "")), ExitStatus.USER_ERROR),
        (file_error("away", OSError(errno.ESTALE, "")), ExitStatus.FAILED),
    ],
    ids=str,
)
def test_a_disk_that_does_not_answer_leaves_the_run_to_the_next_attempt(error, status, monkeypatch, tmp_path):
    def fail(config):
        raise error

    for name in ("hear_every_interrupt", "go_on_without_readers", "validate"):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(module, "train", fail)
    run = RunFolder(tmp_path / "run")
    run.try_config(RunConfig(name="run", output_dir=str(tmp_path)))
    assert module.main([str(run.config_file)]) == status
    assert run.config_file.exists() == (status == ExitStatus.FAILED)


@pytest.mark.parametrize(("local", "says"), [("0", True), ("1", False)])
def test_a_node_says_what_it_lacks(local, says, monkeypatch, tmp_path, capsys):
    for name in ("hear_every_interrupt", "go_on_without_readers"):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local)
    assert module.main([str(tmp_path / "gone.yaml")]) == 2
    assert ("gone.yaml" in capsys.readouterr().err) == says
