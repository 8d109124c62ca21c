"""Prose and mathematics that every machine has: the documentation that Python and the required packages ship.

- prose: the language reference that Python's `help` shows, and the documentation strings of numpy and matplotlib;
- mathematics: the documentation strings of sympy and mpmath, full of formulas.

One document per topic or source file. Complements the demo's corpus, whose domain is code, without changing it.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

from plt_megatron.data.demo_corpus import write_parts
from plt_megatron.errors import UserError

DOMAINS = {"prose": ("numpy", "matplotlib"), "mathematics": ("sympy", "mpmath")}
_SKIPPED_FOLDERS = {"test", "tests", "__pycache__"}
_SHORTEST = 200  # characters; shorter documentation strings are skipped


def domain_files(folder: Path, domain: str) -> dict[str, Path]:
    """Return a domain's files in the folder of a corpus, by part."""
    return {part: folder / f"{domain}_{part}.jsonl" for part in ("train", "validation")}


def write_domain(folder: Path, domain: str) -> None:
    """Write the domain's files by `write_parts`. Raises `UserError` if a package is not installed."""
    missing = f"no text of {domain} in the documentation of {', '.join(DOMAINS[domain])}"
    write_parts(sorted(_documents(domain)), domain_files(folder, domain), missing)


def _documents(domain: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document."""
    if domain == "prose":
        from pydoc_data.topics import topics

        yield from ((f"topics/{name}", text) for name, text in topics.items() if len(text) >= _SHORTEST)
    for package in DOMAINS[domain]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"no text of {domain}: {package} is not installed")
        root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not _SKIPPED_FOLDERS & set(inside.parts):
                text = "\n\n\n".join(_documentation(path))
                if text:
                    yield f"{package}/{inside.as_posix()}", text


def _documentation(path: Path) -> Iterator[str]:
    """Yield the documentation strings of a source file that are long enough."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in its strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    yield from (text for text in found if text is not None and len(text) >= _SHORTEST)
