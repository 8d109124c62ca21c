"""How a process ends before its first step, and who says what is wrong: each node's first rank, since a file may be
missing on one node alone."""

from __future__ import annotations

import errno
import os
from unittest.mock import Mock

import pytest
import torch

from plt_megatron.config.schema import ParallelConfig, RunConfig
from plt_megatron.errors import AttemptFailed, BadTokens, UserError, file_error
from plt_megatron.run_folder.attempts import ExitStatus
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train import main as module


@pytest.fixture(autouse=True)
def this_process(monkeypatch):
    """Hears interrupts as before."""
    for name in ("hear_every_interrupt", "go_on_without_readers"):
        monkeypatch.setattr(module, name, lambda: None)


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
    monkeypatch.setattr(module, "validate", lambda *_, **__: None)
    monkeypatch.setattr(module, "train", Mock(side_effect=error))
    run = RunFolder(tmp_path / "run")
    run.try_config(RunConfig(name="run", output_dir=str(tmp_path)))
    assert module.main([str(run.config_file)]) == status
    assert run.config_file.exists() == (status == ExitStatus.FAILED)


def test_without_a_configuration_it_says_how_it_is_used(capsys):
    assert module.main([]) == 2 and capsys.readouterr().err.startswith("usage: ")


@pytest.mark.parametrize(("local", "says"), [("0", True), ("1", False)])
def test_a_node_says_what_it_lacks(local, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local)
    assert module.main([str(tmp_path / "gone.yaml")]) == 2
    assert ("gone.yaml" in capsys.readouterr().err) == says


def test_the_rank_that_reads_bad_tokens_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "load_config", Mock(side_effect=BadTokens("token -5")))
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert module.main([str(tmp_path / "run.yaml")]) == 2
    assert "token -5" in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "have_te"), [("", False), ("0,1", None)])
def test_transformer_engine_is_not_used_without_a_gpu(gpus, have_te, monkeypatch, tmp_path):
    checked = Mock(side_effect=UserError("enough"))
    monkeypatch.setattr(module, "validate", checked)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    run = RunFolder(tmp_path / "run")
    run.try_config(RunConfig(name="run", output_dir=str(tmp_path), parallel=ParallelConfig(context_parallel_size=2)))
    assert module.main([str(run.config_file)]) == 2 and checked.call_args.kwargs["have_te"] is have_te


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(monkeypatch, tmp_path):
    """As with a driver that is older than torch's CUDA: the warning of torch is not shown."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    module._check_gpus()  # asked for
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="plt doctor"):
        module._check_gpus()
    monkeypatch.setattr(torch.version, "cuda", None)
    module._check_gpus()  # a CPU build was chosen
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver.unlink()
    module._check_gpus()


def test_fp32_is_not_tf32_whatever_an_image_sets(monkeypatch):
    """Those of NGC set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which torch reads as `high`."""

    class ReachedError(Exception):
        pass

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(module, "_check_gpus", lambda: None)
    monkeypatch.setattr(module, "quiet_streams", lambda: None)
    monkeypatch.setattr("plt_megatron.runtime.process_groups.init_process_groups", Mock(side_effect=ReachedError))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(ReachedError):
            module.train(RunConfig())
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
