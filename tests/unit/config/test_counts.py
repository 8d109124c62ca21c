"""How much there is to know of the configuration: upper bounds, to be lowered when something goes.

`python -m tests.unit.config.test_counts` prints the numbers.
"""

from __future__ import annotations

import ast
from pathlib import Path

import plt_megatron.config
from tests.fuzz import draw
from tests.fuzz.sections import optional_sections

SETTINGS = 183
ALWAYS_THERE = 140  # of them outside of sections that are off by default
REFUSALS = 117


def settings() -> list[str]:
    """The dotted keys of all settings; a list is one, whatever it holds."""
    return [key for key, _ in draw.leaves()]


def always_there() -> list[str]:
    """Those in no section that may be off."""
    sections = tuple(f"{section}." for section in optional_sections())
    return [key for key in settings() if not key.startswith(sections)]


def refusals() -> dict[str, int]:
    """Lines that say what does not fit together, by the file that has them: texts that checks yield."""
    folder, found = Path(plt_megatron.config.__file__).parent, {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yielded = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Yield)]
        texts = [value for value in yielded if isinstance(value, ast.JoinedStr | ast.Constant | ast.Call)]
        if "_problems(" in text and texts:
            found[str(path.relative_to(folder))] = len(texts)
    return found


def test_nothing_grew():
    assert len(settings()) <= SETTINGS
    assert len(always_there()) <= ALWAYS_THERE
    assert sum(refusals().values()) <= REFUSALS


if __name__ == "__main__":
    print(
        f"{len(settings())} settings, {len(always_there())} of them always there; {sum(refusals().values())} refusals"
    )
    print(*(f"{count:4} {name}" for name, count in refusals().items()), sep="\n")
