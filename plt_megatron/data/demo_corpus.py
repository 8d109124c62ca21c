"""Corpora that every machine has: Python sources, prose and mathematics.

- the demo's: the sources of Python's standard library, one document per file;
- torch: its sources, which a run of five million tokens does not repeat;
- manuals: the documentation strings of scientific packages, long enough for such a run, too;
- prose: the language reference that Python's `help` shows, and the documentation strings of numpy and matplotlib;
- mathematics: the documentation strings of sympy and mpmath, full of formulas.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.run_folder.files import write_bytes

_TESTS = {"test", "tests", "__pycache__"}
# Neither prose nor code worth continuing: tests, generated tables, and what pip installed.
_SKIPPED_FOLDERS = _TESTS | {"idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data"}
_HELD_OUT = 16  # one document in this many is for validation


def write_demo_corpus(folder: Path) -> tuple[int, int]:
    """Write `train.jsonl` and `validation.jsonl` to `folder`, in an order that only Python's version decides.

    Returns the number of documents and the bytes of their text.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = {part: folder / f"{part}.jsonl" for part in ("train", "validation")}
    documents = sorted(_sources(library, _SKIPPED_FOLDERS), key=lambda document: (_hash(document[0]), document[0]))
    return write_parts(documents, files, f"no text for the demo corpus in {library}")


def write_parts(documents: Iterable[tuple[str, str]], files: Mapping[str, Path], missing: str) -> tuple[int, int]:
    """Write documents, (name, text), as the JSONL files (fields `text`, `source`) of the parts train and validation.

    One document in 16 is held out for validation, by the hash of its name. A file that already has the right content
    is not touched. Returns the number of documents and the bytes of their text.

    Raises:
        UserError: `missing`, if a part has no document, or a file cannot be written.
    """
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    size = 0
    for name, text in documents:
        part = "validation" if int(_hash(name)[:8], 16) % _HELD_OUT == 0 else "train"
        lines[part].append(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")
        size += len(text.encode("utf-8"))
    if not all(lines.values()):
        raise UserError(missing)
    for part, path in files.items():
        content = "".join(lines[part]).encode("utf-8")
        try:
            if not path.is_file() or path.read_bytes() != content:
                write_bytes(path, content)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return sum(map(len, lines.values())), size


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


def _sources(root: Path, skipped: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of every usable source file that is not in a folder of a name in `skipped`."""
    for parent, folders, files in root.walk():
        folders[:] = [folder for folder in folders if folder not in skipped]
        for path in (parent / file for file in files if file.endswith(".py")):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = path.read_text(encoding="utf-8")
                if text.strip():
                    yield path.relative_to(root).as_posix(), text


DOMAINS = {
    "torch": ("torch",),
    "manuals": ("torch", "scipy", "sympy", "networkx", "numpy", "matplotlib", "mpmath"),
    "prose": ("numpy", "matplotlib"),
    "mathematics": ("sympy", "mpmath"),
}
SOURCES = {"torch"}  # domains of whole files; the others are their documentation strings
_SHORTEST = 200  # characters; shorter documentation strings are skipped
_LONGEST = 400_000  # characters; longer files are tables


def domain_files(folder: Path, domain: str) -> dict[str, Path]:
    """Return a domain's files in the folder of a corpus, by part."""
    return {part: folder / f"{domain}_{part}.jsonl" for part in ("train", "validation")}


def write_domain(folder: Path, domain: str) -> None:
    """Write the domain's files by `write_parts`. Raises `UserError` if a package is not installed."""
    missing = f"no text of {domain} in the documentation of {', '.join(DOMAINS[domain])}"
    write_parts(sorted(_domain_documents(domain)), domain_files(folder, domain), missing)


def _domain_documents(domain: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document."""
    if domain == "prose":
        from pydoc_data.topics import topics

        yield from ((f"topics/{name}", text) for name, text in topics.items() if len(text) >= _SHORTEST)
    for package in DOMAINS[domain]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"no text of {domain}: {package} is not installed")
        for name, source in _sources(Path(spec.origin).parent, _TESTS):
            if domain not in SOURCES:
                text = "\n\n\n".join(_documentation(source))
            else:
                text = source if len(source) <= _LONGEST else ""
            if text.strip():
                yield f"{package}/{name}", text


def _documentation(source: str) -> Iterator[str]:
    """Yield the documentation strings of a source file that are long enough."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in its strings
            tree = ast.parse(source)
    except SyntaxError:
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    yield from (text for text in found if text is not None and len(text) >= _SHORTEST)
