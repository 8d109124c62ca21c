"""docs/extending.md shows a change that the tree has: it can be taken back, touches as many files as it says, and its
check fails without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.running import ROOT, run

COPIED = ("plt_megatron", "configs", "docs", "launch", "tools", "tests", "benchmarks", "README.md", "pyproject.toml")
SETTINGS = (
    *("key_shift", "share_values", "full_attention"),
    *("trainable", "z_loss_coeff", "num_layers_in_first_pipeline_stage"),
)


@dataclass(frozen=True)
class Example:
    """A section of the document: its title, what it says, its change as one patch, its new files and its check."""

    title: str
    prose: str
    patch: str
    new: list[str]  # named, not shown
    check: str

    @property
    def files(self) -> list[str]:
        return sorted({*re.findall(r"^\+\+\+ b/(.+)$", self.patch, re.MULTILINE), *self.new})


def examples() -> list[Example]:
    """The sections (`## Title`) of the document."""
    document = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", document, flags=re.MULTILINE)[1:]:
        title, body = section.split("\n", 1)
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        (check,) = (text for kind, text in blocks if kind == "python")
        prose = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
        new = re.findall(r"new:\s+`([^`]+)`", prose)
        found.append(Example(title, prose, "".join(text for kind, text in blocks if kind == "diff"), new, check))
    assert found
    return found


def in_tree(tree: Path, *command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    ours = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    ours["GIT_CEILING_DIRECTORIES"] = str(tree.parent)  # not the repository around it, if there is one
    return run(command, tree, status=None, timeout=600, env=os.environ | ours, input=text)


def take_back(example: Example, tree: Path) -> None:
    """Leave the tree without a change that it has."""
    taken_back = in_tree(tree, "git", "apply", "--recount", "--reverse", "-", text=example.patch)
    assert taken_back.returncode == 0, taken_back.stderr
    for name in example.new:
        (tree / name).unlink()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is in the repository."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_told_in_at_most_eight_files(setting):
    """Others read a table's row or a property that follows from it."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "plt_megatron").rglob("*.py")}
    told = [path.name for path, text in texts.items() if re.search(rf"\b{setting}\b", text)]
    assert 1 < len(told) <= 8, told


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.title)
def test_the_change_touches_the_files_that_it_says_and_can_be_taken_back(example, tree):
    stated = re.search(r"It touches (\d+) files?\b", example.prose)
    assert stated is not None and int(stated[1]) == len(example.files), example.files
    take_back(example, tree)


@pytest.mark.slow
@pytest.mark.parametrize("example", examples(), ids=lambda example: example.title)
def test_the_check_passes_with_the_change_and_fails_without_it(example, tree):
    passed = in_tree(tree, sys.executable, "-c", example.check)
    assert passed.returncode == 0, passed.stdout + passed.stderr[-3000:]
    take_back(example, tree)
    assert in_tree(tree, sys.executable, "-c", example.check).returncode != 0
