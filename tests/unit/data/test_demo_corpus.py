from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from plt_megatron.data import demo_corpus
from plt_megatron.data.demo_corpus import write_demo_corpus
from plt_megatron.errors import UserError


def read(path: Path) -> dict[str, str]:
    return {entry["source"]: entry["text"] for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_the_standard_library_twice(tmp_path: Path) -> None:
    """The second time, nothing is touched."""
    made = write_demo_corpus(tmp_path)
    files = [tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]
    train, validation = map(read, files)
    assert train and validation and not set(train) & set(validation)
    texts = [*train.values(), *validation.values()]
    assert made == (len(texts), sum(len(text.encode()) for text in texts)) and made[1] > 1_000_000
    root = Path(sysconfig.get_path("stdlib"))
    for name, text in list(train.items())[:20]:
        assert text == (root / name).read_text(encoding="utf-8")
    assert not any("test" in Path(name).parts or "site-packages" in name for name in train)
    stamps = [path.stat().st_mtime_ns for path in files]
    assert write_demo_corpus(tmp_path) == made
    assert stamps == [path.stat().st_mtime_ns for path in files]


def test_odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    for number in range(64):
        (root / f"m{number}.py").write_text(f"x = {number}\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "empty.py").write_text("\n")
    (root / "test" / "test_a.py").write_text("assert True\n")
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _: str(root))
    write_demo_corpus(tmp_path / "out")
    found = [read(tmp_path / f"out/{part}.jsonl") for part in ("train", "validation")]
    assert set().union(*found) == {f"m{number}.py" for number in range(64)}
    monkeypatch.setattr(demo_corpus, "_HELD_OUT", 10**30)
    with pytest.raises(UserError, match="no text for the demo corpus"):
        write_demo_corpus(tmp_path / "out")
