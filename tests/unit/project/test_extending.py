"""The worked examples of docs/extending.md apply to the tree, or are in it; they touch as many files as they say, and
work."""

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


@dataclass(frozen=True)
class Example:
    """A section of the document: its title, what it says, its change as one patch, and its check.

    A change that is in the tree ("as the tree has it") is taken back to try it; its new files are named, not shown.
    """

    title: str
    prose: str
    patch: str
    check: str

    @property
    def files(self) -> list[str]:
        """Files that the change touches, new ones included, removed ones not."""
        return sorted({*re.findall(r"^\+\+\+ b/(.+)$", self.patch, re.MULTILINE), *self.named})

    @property
    def in_tree(self) -> bool:
        return "as the tree has it" in self.prose

    @property
    def named(self) -> list[str]:
        """New files that the prose names."""
        return re.findall(r"new:\s+`([^`]+)`", self.prose)


def examples(document: str) -> list[Example]:
    """The sections (`## Title`) of a document."""
    found = []
    for section in re.split(r"^## ", document, flags=re.MULTILINE)[1:]:
        title, body = section.split("\n", 1)
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        patch = "".join(text for kind, text in blocks if kind == "diff")
        checks = [text for kind, text in blocks if kind == "python"]
        assert patch and len(checks) == 1, f"{title}: a section has a change and one check"
        found.append(
            Example(title, re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL), patch, checks[0])
        )
    return found


def try_out(example: Example, tree: Path, *, check: bool = True) -> None:
    """Apply a change to a copy of the tree and, unless told otherwise, run its check."""
    stated = re.search(r"It touches (\d+) files?\b", example.prose)
    assert stated is not None, "It touches how many files?"
    assert len(example.files) == int(stated[1]), f"it touches {len(example.files)} files: {', '.join(example.files)}"
    if not example.in_tree:
        apply(example, tree)
    lint = ["-m", "ruff", "check", "--no-cache", *(name for name in example.files if name.endswith(".py"))]
    for command in (lint, ["-c", example.check]) if check else (lint,):
        done = _run([sys.executable, *command], tree)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def apply(example: Example, tree: Path, *options: str) -> None:
    applied = _run(["git", "apply", "--recount", *options, "-"], tree, example.patch)
    assert applied.returncode == 0, applied.stderr


def take_back(example: Example, tree: Path) -> None:
    """Leave the tree without a change that it has."""
    apply(example, tree, "--reverse")
    for name in example.named:
        (tree / name).unlink()


def check_without(example: Example, tree: Path) -> None:
    """The check fails without the change."""
    if example.in_tree:
        take_back(example, tree)
    assert _run([sys.executable, "-c", example.check], tree).returncode != 0, "the check passes without the change"


def _run(command: list[str], tree: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "GIT_CEILING_DIRECTORIES": str(tree.parent),  # not the repository around it, if there is one
    }
    return run(command, tree, status=None, timeout=600, env=environment, input=text)


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


EXAMPLES = examples((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))
SETTINGS = (
    *("key_shift", "share_values", "full_attention"),
    *("trainable", "z_loss_coeff", "num_layers_in_first_pipeline_stage"),
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_told_in_at_most_eight_files(setting):
    """Others read a table's row or a property that follows from it."""
    word = re.compile(rf"\b{setting}\b")
    told = [
        path.name for path in (ROOT / "plt_megatron").rglob("*.py") if word.search(path.read_text(encoding="utf-8"))
    ]
    assert 1 < len(told) <= 8, told


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_the_example_applies(example, tree):
    try_out(example, tree, check=False)
    if example.in_tree:
        take_back(example, tree)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_the_example_applies_and_works(example, tree):
    try_out(example, tree)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_the_check_notices_that_the_change_is_missing(example, tree):
    check_without(example, tree)


# The mechanism itself, on a document of its own.

SOUND = """# Title

## A constant

It touches 2 files: one has the constant, one says so.

```diff
diff --git a/settings.py b/settings.py
--- a/settings.py
+++ b/settings.py
@@ -1,2 +1,3 @@
 first = 1
+second = 2
 last = 9
```

and

```diff
diff --git a/settings.txt b/settings.txt
new file mode 100644
--- /dev/null
+++ b/settings.txt
@@ -0,0 +1 @@
+There is a second.
```

```python
import settings

assert settings.second == 2
```
"""


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "settings.py").write_text("first = 1\nlast = 9\n")
    return tmp_path / "tree"


def test_a_sound_example_passes(small_tree):
    (example,) = examples(SOUND)
    check_without(example, small_tree)
    try_out(example, small_tree)
    assert (small_tree / "settings.txt").read_text() == "There is a second.\n"


def test_a_change_of_the_tree_is_taken_back(small_tree):
    """Shown in part: the new file is only named."""
    shown, _, rest = SOUND.partition("and\n")
    text = shown.replace("one has the constant", "as the tree has it, one new: `settings.txt`")
    (example,) = examples(text + rest[rest.index("```python") :])
    (small_tree / "settings.txt").write_text("There is a second.\n")
    with pytest.raises(AssertionError, match="patch does not apply"):
        check_without(example, small_tree)
    (small_tree / "settings.py").write_text("first = 1\nsecond = 2\nlast = 9\n")
    try_out(example, small_tree)
    check_without(example, small_tree)
    assert not (small_tree / "settings.txt").exists()


@pytest.mark.parametrize(
    ("written", "instead", "complaint"),
    [
        (" last = 9", " last = 8", "patch does not apply"),
        ("2 files", "1 file", "it touches 2 files: settings.py, settings.txt"),
        ("It touches 2 files", "Few files", "how many files"),
        ("+second = 2", "+second = 3", "AssertionError"),
        ("+second = 2", "+import os; second = 2", "F401"),
        ("```python", "```text", "one check"),
    ],
)
def test_a_rotten_example_is_noticed(small_tree, written, instead, complaint):
    assert written in SOUND
    with pytest.raises(AssertionError, match=complaint):
        try_out(examples(SOUND.replace(written, instead))[0], small_tree)


def test_a_check_of_nothing_is_noticed(small_tree):
    (example,) = examples(SOUND.replace("settings.second == 2", "settings.first == 1"))
    with pytest.raises(AssertionError, match="passes without the change"):
        check_without(example, small_tree)
