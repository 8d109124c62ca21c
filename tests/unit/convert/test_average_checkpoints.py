"""plt average: the mean of weights, to export and to start from; what cannot be averaged is one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from convert_helpers import VARIANTS, make_model, random_weights, save_run
from safetensors.torch import load_file

from plt_megatron.commands import average as command
from plt_megatron.errors import UserError
from plt_megatron.hf import arguments, averaging
from plt_megatron.hf.averaging import AverageOptions, average
from plt_megatron.hf.exporting import ExportOptions, export
from plt_megatron.train.checkpoint.reading import read_weights
from tests.files import update_json


def test_a_writer_that_has_failed_says_nothing_more_when_it_is_dropped(monkeypatch):
    """As torch's does on a full disk, after the command's error."""
    said = Mock()
    monkeypatch.setattr(sys, "unraisablehook", said)
    monkeypatch.setattr(signal, "signal", Mock())
    monkeypatch.setattr(arguments, "prepare_imports", Mock())
    arguments.prepare_conversion()
    sys.unraisablehook(SimpleNamespace(object=io.BytesIO()))
    assert not said.called
    sys.unraisablehook(SimpleNamespace(object=None))
    assert said.called


def quiet(sources, output, **options):
    return average(AverageOptions([str(source) for source in sources], output, **options), say=lambda line: None)


def saved(folder, seed, precision="fp32", steps=(0,), **model):
    """A run with checkpoints of weights at these steps; those of the last one."""
    weights = {}
    for step in steps:
        weights = random_weights(make_model(**model), seed=seed + step)
        save_run(folder, make_model(**model), weights, precision=precision, consumed_tokens=64 * step)
        if step:
            change((folder / "checkpoints/step_00000000").rename(folder / f"checkpoints/step_{step:08d}"), step=step)
    return weights


def change(checkpoint: Path, **progress: Any) -> None:
    """Change a checkpoint's progress, which its manifest then leaves out."""
    update_json(checkpoint / "progress.json", **progress)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    files.pop("progress.json", None)
    update_json(checkpoint / "manifest.json", files=files)


@pytest.mark.parametrize("name", ["plt3", "loopcoder", "experts, biased, dense first"])
def test_it_is_the_mean_of_each_tensor(tmp_path, name):
    parts = [saved(tmp_path / f"run{seed}", seed, **VARIANTS[name]) for seed in range(3)]
    result = quiet([tmp_path / f"run{seed}" / "checkpoints/step_00000000" for seed in range(3)], tmp_path / "out")
    ours = dict(read_weights(result.output))
    assert ours.keys() == parts[0].keys() and result.tensors == len(ours)
    for key, tensor in ours.items():
        expected = torch.stack([part[key] for part in parts]).double().mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=key)


def test_of_equal_checkpoints_it_is_each_of_them_in_bf16_too(tmp_path):
    saved(tmp_path / "run", 1, precision="bf16")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    paths = [tmp_path / run / "checkpoints/step_00000000" for run in ("run", "copy")]
    result = quiet(paths, tmp_path / "out", weights=[0.1, 0.2])
    assert result.precision == "bf16" and result.shares == pytest.approx([1 / 3, 2 / 3])
    theirs = dict(read_weights(paths[0]))
    for key, tensor in read_weights(tmp_path / "out"):
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs[key]), key


def test_it_is_exported_with_what_it_is_of(tmp_path, capsys):
    saved(tmp_path / "mine", 0, steps=(2, 4, 6))
    arguments = [str(tmp_path / "mine"), "--last", "2", "--output", str(tmp_path / "out"), "--dtype", "fp32"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}/checkpoints/step_00000006: " in printed and "with shares 0.5, 0.5" in printed
    assert f"checkpoint.load={tmp_path / 'out'} checkpoint.weights_only=true" in printed
    export(ExportOptions(tmp_path / "out", tmp_path / "hf"), say=lambda line: None)
    both = [random_weights(make_model(), seed=step) for step in (4, 6)]
    embedding = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    mean = sum(each["embedding.word_embeddings.weight"] for each in both) / 2
    torch.testing.assert_close(embedding, mean, rtol=1e-6, atol=1e-7)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| weights | the average of run@4, run@6 |" in card and "| steps | 6 |" in card and "layout" not in card
    assert "| precision |" not in card, "that of training is another"


@pytest.fixture
def runs(several, monkeypatch):
    """In a folder of runs to name wrongly: `mine` has the steps 2, 4 and 6, `wide` another model."""
    monkeypatch.chdir(several)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    with contextlib.chdir(folder):
        _save_several()
    return folder


def _save_several() -> None:
    saved(Path("mine"), 0, steps=(2, 4, 6))
    saved(Path("wide"), 0, steps=(2,), ffn_hidden_size=64)
    saved(Path("looped"), 0, steps=(2,), loop_count=3)
    saved(Path("words"), 0, steps=(2,))
    change(Path("words/checkpoints/step_00000002"), vocab_size=116)
    saved(Path("spoken"), 0, steps=(2,))
    for run, digest in (("spoken", "a"), ("mine", "b")):
        change(Path(run, "checkpoints/step_00000002"), data_fingerprint={"tokenizer": digest})
    shutil.copytree("mine", "damaged")
    weights = next(Path("damaged/checkpoints/step_00000004").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    Path("damaged/checkpoints/step_00000006/manifest.json").write_text("{")
    Path("taken").mkdir()
    Path("file").write_text("")


REFUSED = {
    "one checkpoint": (["mine@4"], {}, "step_00000004 alone is its own average: name two or more"),
    "one twice": (["mine@4", "mine/checkpoints/step_00000004"], {}, "step_00000004 is named twice"),
    "no such step": (["mine@2", "mine@3"], {}, "mine has no checkpoint of step 3; it has 2, 4, 6"),
    "no such run": (["mine@2", "nobody@3"], {}, "nobody@3: there is no run nobody"),
    "no such folder": (["mine@2", "nobody"], {}, "nobody: no such checkpoint; give its folder, or RUN@STEP"),
    "a file": (["mine@2", "file"], {}, "file: no such checkpoint"),
    "a run": (["mine@2", "mine"], {}, "mine is not a checkpoint: name one of its own, as in mine@2000"),
    "no number": (["mine@2", "mine@last"], {}, "mine@last: no such checkpoint"),
    "another width": (["mine@4", "wide@2"], {}, "are of different models: model.ffn_hidden_size is 56 and 64"),
    "other loops": (["mine@4", "looped@2"], {}, "are of different models: model.loop_count is 2 and 3"),
    "another vocabulary": (["mine@4", "words@2"], {}, "have different vocabularies, of 117 and 116 entries"),
    "another tokenizer": (["mine@2", "spoken@2"], {}, "were trained with different tokenizers"),
    "damaged weights": (["damaged@2", "damaged@4"], {}, r"__0_0.distcp is damaged, its SHA-256"),
    "a damaged manifest": (["damaged@2", "damaged@6"], {}, r"step_00000006: manifest.json is damaged"),
    "too few weights": (["mine@2", "mine@4"], {"weights": [1]}, "--weights: 1 for 2 checkpoints; give one for each"),
    "a negative weight": (["mine@2", "mine@4"], {"weights": [1, -1]}, "--weights: -1 is not a positive number"),
    "no weight": (["mine@2", "mine@4"], {"weights": [float("nan"), 1]}, "--weights: nan is not a positive number"),
    "more than there are": (["mine"], {"last": 4}, "mine has 3 checkpoints, fewer than --last 4"),
    "the last one": (["mine"], {"last": 1}, "--last 1: an average needs two checkpoints or more"),
    "the last one of no moving average": (["mine"], {"last": 1, "ema": True}, "step_00000006 has no moving average"),
    "no digit of ours": (["mine@2", "mine@²"], {}, "mine@²: no such checkpoint"),
    "the last of two runs": (["mine", "wide"], {"last": 2}, "--last 2 takes the folder of one run, not mine, wide"),
    "the last of a step": (["mine@2"], {"last": 2}, "--last 2 takes the folder of one run, not mine@2"),
    "no moving average": (["mine@2", "mine@4"], {"ema": True}, "step_00000002 has no moving average of its weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_averaged_is_one_line(runs, case):
    sources, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        quiet(sources, Path("out"), **options)
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_nothing_is_overwritten_and_nothing_left_behind(runs, monkeypatch, capsys):
    with pytest.raises(UserError, match="taken exists"):
        quiet(["mine@2", "mine@4"], Path("taken"))
    monkeypatch.setattr(averaging, "_mean", Mock(side_effect=OSError(5, "Input/output error", "x")))
    before = sorted(Path().iterdir())
    Path(f".out.{os.getpid()}.partial").mkdir()  # as of a killed process of this id, and of one that is gone
    Path(f".out.{2**31 - 1}.partial").mkdir()
    assert command.main(["mine@2", "mine@4", "--output", "out"]) == 2
    assert capsys.readouterr().err == "error: x: Input/output error; nothing is written\n"
    assert sorted(Path().iterdir()) == before
