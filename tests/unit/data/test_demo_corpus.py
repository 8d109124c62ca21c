from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from data_helpers import ROOT, tool_environment

from plt_megatron.data import demo_corpus
from plt_megatron.data.demo_corpus import write_demo_corpus
from plt_megatron.errors import UserError


def read(path: Path) -> dict[str, str]:
    return {entry["source"]: entry["text"] for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_the_standard_library(tmp_path: Path) -> None:
    corpus = write_demo_corpus(tmp_path, 1_000_000)
    train, validation = read(corpus.train), read(corpus.validation)
    assert train and validation and not set(train) & set(validation)
    assert corpus.documents == len(train) + len(validation)
    size = sum(len(text.encode()) for text in [*train.values(), *validation.values()])
    assert size == corpus.bytes and 900_000 < size <= 1_000_000
    root = Path(sysconfig.get_path("stdlib"))
    for name, text in list(train.items())[:20]:
        assert text == (root / name).read_text(encoding="utf-8")
    assert not any("test" in Path(name).parts or "site-packages" in name for name in train)


def test_again_is_the_same_and_touches_nothing(tmp_path: Path) -> None:
    first = write_demo_corpus(tmp_path, 300_000)
    stamps = [path.stat().st_mtime_ns for path in (first.train, first.validation)]
    assert write_demo_corpus(tmp_path, 300_000) == first
    assert stamps == [path.stat().st_mtime_ns for path in (first.train, first.validation)]


def test_odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    for number in range(64):
        (root / f"m{number}.py").write_text(f"x = {number}\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "empty.py").write_text("\n")
    (root / "test" / "test_a.py").write_text("assert True\n")
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _: str(root))
    corpus = write_demo_corpus(tmp_path / "out")
    assert set(read(corpus.train)) | set(read(corpus.validation)) == {f"m{number}.py" for number in range(64)}
    with pytest.raises(UserError, match="no text for the demo corpus"):
        write_demo_corpus(tmp_path / "out", 3)


def test_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "plt_megatron.data.demo_corpus",
        "--output",
        str(tmp_path / "c"),
        "--max-mb",
        "0.3",
    ]
    environment = {**tool_environment(), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert " kB of Python sources" in result.stdout
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["train.jsonl", "validation.jsonl"]
