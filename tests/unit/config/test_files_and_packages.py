"""What a configuration needs beside itself: files, folders that can be written, packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from plt_megatron.config import validation
from plt_megatron.config.derived import run_folder
from plt_megatron.config.schema import DataSource
from plt_megatron.config.validation import find_problems, validate
from tests.unit.config.run_files import TOKENIZER, write_run_files
from tests.unit.config.test_validation import change, good


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_run_files(tmp_path)
    return tmp_path


def test_files_that_are_there(here):
    validate(good())


def test_missing_files_are_named(here):
    config = good()
    config.data.sources += [DataSource("gone"), DataSource("corpus.bin")]
    config.data.tokenizer = "nope.json"
    config.checkpoint.load = "other-run"
    Path("half.bin").touch()
    config.data.sources.append(DataSource("half"))
    lines = find_problems(config)
    for line, expected in zip(
        lines,
        [
            "data.sources[1].path: gone.bin and gone.idx not found",
            "data.sources[2].path: give the prefix without .bin: corpus",
            "data.sources[3].path: half.idx not found",
            "data.tokenizer: nope.json not found",
            "checkpoint.load: other-run not found",
        ],
        strict=True,
    ):
        assert expected in line


def test_a_protocol_whose_package_is_missing_is_found_before_training(here):
    config = good()
    config.checkpoint.load = "gs://bucket/run"
    (line,) = find_problems(config)
    assert "checkpoint.load cannot use gs://" in line and "gcsfs" in line
    (run_folder(config) / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert find_problems(config) == [], "it reads its own"


def test_a_run_with_checkpoints_of_its_own_needs_no_longer_what_it_started_from(here):
    config = good()
    config.checkpoint.load = "other-run"
    (run_folder(config) / "checkpoints" / "step_00000010.tmp").mkdir(parents=True)
    assert any("other-run" in line for line in find_problems(config))
    (run_folder(config) / "checkpoints" / "step_00000010").mkdir()
    assert not any("other-run" in line for line in find_problems(config))
    config.name = "a\0b"
    assert any("name must be" in line for line in find_problems(config))
    config.name, config.checkpoint.enabled = good().name, False
    assert any("other-run" in line for line in find_problems(config))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.model", b"", "is not a sentencepiece model"),
        ("t.model", b"Once upon a time\n", "is not a sentencepiece model"),
        ("t.model", TOKENIZER[:-1], "is not a sentencepiece model"),
        ("t.model", b"{}", "is not a sentencepiece model"),
        ("t.json", TOKENIZER, "not a Hugging Face tokenizer.json"),
        ("t.json", b"{}", "not a Hugging Face tokenizer.json (Model missing"),
        ("t.json", b'{"model": {"type": "BPE", "vocab": {', "not a Hugging Face tokenizer.json"),
        ("folder/tokenizer.json", b"[]", "folder/tokenizer.json is not a Hugging Face tokenizer.json"),
        ("folder/other.model", TOKENIZER, "the folder folder holds neither tokenizer.model nor tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_none_is_told_from_one(here, name, content, expected):
    path = here / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (line,) = find_problems(change(good(), data__tokenizer=name.partition("/")[0]))
    assert line.startswith("data.tokenizer: ") and expected in line and "\n" not in line


def test_tokenizers_that_are_some(here):
    (here / "folder").mkdir()
    (here / "folder" / "tokenizer.model").write_bytes(TOKENIZER)
    (here / "t.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    for name in ("folder", "t.json"):
        assert find_problems(change(good(), data__tokenizer=name)) == []


def test_the_run_folder_must_be_possible(here):
    Path("file").touch()
    (line,) = find_problems(change(good(), output_dir="file"))
    assert "file is not a folder" in line
    (line,) = find_problems(change(good(), output_dir="file/deeper"))
    assert "file is not a folder" in line
    assert find_problems(change(good(), output_dir="new/deeper")) == []


@pytest.mark.parametrize("path", ["~/runs", "$SCRATCH/runs"])
def test_what_only_a_shell_reads_is_no_path(here, path):
    for setting in ("output_dir", "data__index_cache"):
        (line,) = find_problems(change(good(), **{setting: path}))
        assert setting.replace("__", ".") in line and path in line


def test_the_run_folder_must_be_writable(here, monkeypatch):
    Path("closed").mkdir()
    monkeypatch.setattr(validation.os, "access", lambda path, mode: str(path) != "closed")  # root may all
    (line,) = find_problems(change(good(), output_dir="closed"))
    assert "no permission" in line


def test_transformer_engine_is_asked_for_only_where_needed(here, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "transformer_engine" else True)
    config = change(good(), model__backend="te")
    (line,) = find_problems(config)
    assert "model.backend te needs the package transformer_engine" in line
    assert find_problems(config, have_te=True) == []
    assert find_problems(change(good(), model__backend="auto"), have_te=False) == []


def test_slow_gpus_take_a_package_of_their_own_and_no_profiler(here, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "nvidia_resiliency_ext" else True)
    (line,) = find_problems(change(good(), logging__straggler__interval=100))
    assert "logging.straggler needs the package nvidia_resiliency_ext" in line
    traced = change(good(), logging__straggler__interval=100, logging__profile__step_end=3)
    (line,) = find_problems(traced, check_packages=False)
    assert "logging.straggler and logging.profile: both" in line


def test_wandb_must_be_installed_when_used(here, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = find_problems(change(good(), logging__wandb_project="p"))
    assert "logging.wandb_project needs the package wandb" in line
