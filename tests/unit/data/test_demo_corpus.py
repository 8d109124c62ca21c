"""The corpora that every machine has: equal files wherever they are written, and nothing in them that is not text."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from plt_megatron.data import demo_corpus
from plt_megatron.data.demo_corpus import domain_files, write_demo_corpus, write_domain
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


LONG = "The gamma function extends the factorial to complex numbers. " * 5
SOURCE = f'''"""{LONG}"""
x = "{LONG}"


class A:
    """{LONG}A"""

    def f(self):
        """Short."""

        async def g():
            r"""{LONG}\\\\Gamma"""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of forty documented files, and some that have nothing to say."""
    root = tmp_path / "site/documented"
    (root / "tests").mkdir(parents=True)
    for number in range(40):
        (root / f"m{number}.py").write_text(SOURCE)
    for name, text in {"__init__": "", "plain": "x = 1", "broken": "def", "tests/test_m": SOURCE}.items():
        (root / f"{name}.py").write_text(text)
    (root / "latin.py").write_bytes(b'"""caf\xe9"""')
    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.setitem(demo_corpus.DOMAINS, "mathematics", ("documented",))
    yield root
    sys.modules.pop("documented", None)


def test_documentation_alone_and_of_each_file_once(package: Path, tmp_path: Path) -> None:
    write_domain(tmp_path / "corpus", "mathematics")
    files = domain_files(tmp_path / "corpus", "mathematics")
    train, validation = (read(files[part]) for part in ("train", "validation"))
    assert validation and len(train) > len(validation) and not set(train) & set(validation)
    assert set(train) | set(validation) == {f"documented/m{number}.py" for number in range(40)}
    assert all(text.count("The gamma function") == 15 for text in train.values()), "three strings, not the fourth"
    assert all("Gamma" in text and "Short" not in text and "x =" not in text for text in train.values())
    stamps = [path.stat().st_mtime_ns for path in files.values()]
    write_domain(tmp_path / "corpus", "mathematics")
    assert stamps == [path.stat().st_mtime_ns for path in files.values()]


def test_sources_are_whole_files(package: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(demo_corpus.DOMAINS, "torch", ("documented",))
    monkeypatch.setattr(demo_corpus, "_LONGEST", len(SOURCE))
    (package / "table.py").write_text(SOURCE + "#")
    write_domain(tmp_path, "torch")
    texts = {name: text for path in domain_files(tmp_path, "torch").values() for name, text in read(path).items()}
    assert texts.pop("documented/plain.py") == "x = 1" and texts.pop("documented/broken.py") == "def"
    assert texts == {f"documented/m{number}.py": SOURCE for number in range(40)}


def test_prose_begins_with_the_language_reference(package: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(demo_corpus.DOMAINS, "prose", ("documented",))
    write_domain(tmp_path, "prose")
    sources = [name for path in domain_files(tmp_path, "prose").values() for name in read(path)]
    assert "topics/assert" in sources and "documented/m0.py" in sources


@pytest.mark.parametrize(
    ("packages", "said"),
    [(("nowhere_to_be_found",), "nowhere_to_be_found is not installed"), (("xdist",), "no text of mathematics in the")],
)
def test_no_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], said: str
) -> None:
    monkeypatch.setitem(demo_corpus.DOMAINS, "mathematics", packages)
    monkeypatch.setattr(demo_corpus, "_SHORTEST", 10**6)
    with pytest.raises(UserError, match=said):
        write_domain(tmp_path, "mathematics")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_the_required_packages_ship(tmp_path: Path) -> None:
    for domain in demo_corpus.DOMAINS:
        write_domain(tmp_path, domain)
        train, validation = (path.stat().st_size for path in domain_files(tmp_path, domain).values())
        assert train > 2e6 and validation > 1e5
