"""Exports are verified, appear whole or not at all, and are refused where they cannot be right."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from convert_helpers import (
    LOOPCODER,
    VARIANTS,
    make_model,
    make_tokens,
    megatron_logits,
    quiet,
    random_weights,
    save_random,
    save_run,
)

from plt_megatron.errors import UserError
from plt_megatron.hf import exporting, verification
from plt_megatron.hf.arguments import published_folder
from plt_megatron.hf.sources import saved_model
from tests.files import contents


@pytest.mark.usefixtures("warm_starts")
def test_the_verification_sees_a_wrong_export(tmp_path, run, monkeypatch):
    folder, _, _ = run
    right = exporting.to_hf

    def wrong(weights, rules):
        for name, tensor in right(weights, rules):
            yield name, tensor + 0.01 if name.endswith("layers.1.self_attn.plt_gate.weight") else tensor

    monkeypatch.setattr(exporting, "to_hf", wrong)
    with pytest.raises(UserError, match=r"logits differ by up to \d\.\d+e-\d+ of .*, more than 2e-05; nothing is wri"):
        quiet((folder, tmp_path / "out"), verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_verification_leaves_the_calling_process_and_the_home_folder_alone(tmp_path, run, monkeypatch):
    monkeypatch.setattr(verification, "single_process", None)  # of this process
    for name in ("HF_MODULES_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    random, hook = torch.get_rng_state(), sys.excepthook
    assert quiet((run[0], tmp_path / "out"), verify=True).difference < 1e-5
    assert torch.equal(torch.get_rng_state(), random) and sys.excepthook is hook
    assert [path.parent.name for path in tmp_path.rglob("modeling_plt.py")] == ["out"]


@pytest.mark.usefixtures("warm_starts")
def test_the_verification_allows_for_the_size_of_logits(tmp_path):
    """Rounding grows with them: those of public models reach 40."""
    model = make_model()
    weights = random_weights(model)
    weights["final_layernorm.weight"] *= 1000
    save_run(tmp_path / "run", model, weights)
    result = quiet((tmp_path / "run", tmp_path / "out"), verify=True)
    assert megatron_logits(model, weights, make_tokens()).abs().max() > 100 and result.difference < 1e-5


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Stopped(), SystemExit(143)])
def test_nothing_half_written(tmp_path, run, monkeypatch, error):
    folder, _, _ = run
    right = exporting.to_hf

    def stopping(weights, rules):
        yield from list(right(weights, rules))[:3]
        raise error

    monkeypatch.setattr(exporting, "to_hf", stopping)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
        quiet((folder, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    if isinstance(error, OSError):
        assert "No space left on device; nothing is written" in str(caught.value)


def test_an_output_that_cannot_be_written_is_not_called_a_full_disk(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full, pytest.raises(OSError):
        monkeypatch.setattr("sys.stdout", full)
        try:
            with published_folder(tmp_path / "out"):
                print("exporting", flush=True)
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # to close it
    assert not list(tmp_path.iterdir())


def test_a_writer_of_a_longer_name_keeps_its_files(tmp_path, monkeypatch):
    """In another container, where its process id is not known."""
    with published_folder(tmp_path / "model.v2") as kept:
        (kept / "config.json").write_text("v2")
        monkeypatch.setattr(os, "getpid", lambda: 1 << 30)
        monkeypatch.setattr("psutil.pid_exists", lambda _: False)
        with published_folder(tmp_path / "model") as other:
            (other / "config.json").write_text("v1")
        assert (kept / "config.json").read_text() == "v2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.v2"]


def test_a_writer_of_the_same_folder_in_another_container_mixes_nothing(tmp_path):
    """Both may be process 1 there: one of them fails, and the folder is the other's alone."""
    target = tmp_path / "out"
    with pytest.raises(UserError, match="out exists"), published_folder(target) as lost:
        (lost / "config.json").write_text("first")
        with published_folder(target) as kept:
            (kept / "weights").write_text("second")
            with pytest.raises(FileNotFoundError):
                (lost / "weights").write_text("first")
    assert contents(target) == {"weights": b"second"} and list(tmp_path.iterdir()) == [target]


def test_all_files_reach_the_disk_before_the_folder_has_its_name(tmp_path, run, monkeypatch):
    synced, fsync = set(), os.fsync

    def noted(descriptor: int) -> None:
        if not (tmp_path / "out").exists():
            synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    quiet((run[0], tmp_path / "out"))
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*")} <= synced


def test_targets_and_checkpoints_that_cannot_be_used(tmp_path, run):
    folder, model, weights = run
    out, there, empty = (tmp_path / name for name in ("out", "there", "empty"))
    there.mkdir()
    empty.mkdir()
    gateless = {name: tensor for name, tensor in weights.items() if not name.endswith("plt_gate.bias")}
    gates = r"lack tensors decoder\.layers\.0\..*plt_gate\.bias, decoder\.layers\.1\."
    for source, target, message, options in (
        (folder, there, "there exists: remove it, or choose another --output", {}),
        (folder, tmp_path / "caf\udce9\U0001f600", "not UTF-8", {}),
        (folder, out, "'many' is not a size", {"max_shard_size": "many"}),
        (tmp_path / "nowhere", out, "nowhere: no such run or checkpoint", {}),
        (empty, out, "empty: no complete checkpoint there", {}),
        (save_run(tmp_path / "gateless", model, gateless), out, gates, {}),
    ):
        with pytest.raises(UserError, match=message):
            quiet((source, target), **options)
    tensors = folder / "checkpoints" / "step_00000000" / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(UserError, match="run: no complete checkpoint there"):
        quiet((folder, out))
    assert not out.exists()


def test_a_checkpoint_of_a_newer_program(tmp_path):
    with pytest.raises(UserError, match=r"model\.router is a setting of a newer version"):
        saved_model({"router": 1}, tmp_path)
    assert saved_model({"num_layers": 3}, tmp_path).num_layers == 3


def test_the_loopcoder_format_says_when_it_cannot(tmp_path):
    several = r"model\.qk_layernorm is True, model\.rope_scaling\.yarn is set; use --format plt"
    for name, settings, what in (
        ("run", LOOPCODER | VARIANTS["yarn rope"] | {"qk_layernorm": True}, several),
        ("plain", {"loop_count": 1}, r"model\.loop_count is 1"),
    ):
        save_random(tmp_path / name, **settings)
        with pytest.raises(UserError, match=f"cannot express that {what}"):
            quiet((tmp_path / name, tmp_path / "out"), style="loopcoder")
    assert not (tmp_path / "out").exists()
