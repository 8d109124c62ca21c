"""`plt completion`: what its scripts make of keys that are typed in real shells."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import run

SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
# What is typed, and what `plt` is started with.
TYPED = [
    ("stu\t", "study"),
    ("train-\t", "train-tokenizer"),
    ("--ver\t", "--version"),
    ("export --che\t", "export|--checkpoint"),
    ("train --pr\t", "train|--print-config"),
    ("train run.yaml model.loop_c\t3", "train|run.yaml|model.loop_count=3"),  # no space after an equals sign
    ("export model.loop_c\t", "export|model.loop_c"),  # takes none
    ("train run.yaml data.tokenizer=mod\ttok\t", "train|run.yaml|data.tokenizer=model/tokenizer.json"),  # a value
    ("train run.yaml data.tokenizer=\t", "train|run.yaml|data.tokenizer="),  # any of several files
    ("train ru\t", "train|run.yaml"),
    ("status fol\tin\t", "status|folder/inner.txt"),
    ("nonsense --\t", "nonsense|--"),
]


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param}")
    made = Shell(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.close()


class Shell:
    """One at a terminal, in a folder with a few files, whose `plt` prints its arguments."""

    def __init__(self, name: str, folder: Path) -> None:
        for path in ("run.yaml", "folder/inner.txt", "model/tokenizer.json"):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).touch()
        command = [sys.executable, "-m", "plt_megatron", "completion", name]
        (folder / ".script").write_text(run(command).stdout)
        self._terminal, theirs = pty.openpty()
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "LC_ALL": "C"}
        self._process = subprocess.Popen(
            SHELLS[name], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=env, start_new_session=True
        )
        os.close(theirs)
        if name == "zsh":
            self.type("autoload -U compinit; compinit -u -D; echo 'end'd", until="endd")
        self.type("plt() { local IFS='|'; echo \"start$*end\"; }; source .script; echo 'end'd", until="endd")

    def type(self, keys: str, until: str = "end\r") -> str:
        """Type keys and a line's end; return what is shown up to `until`."""
        os.write(self._terminal, f"{keys}\n".encode())
        shown, deadline = "", time.monotonic() + 60
        while until not in shown:
            assert select.select([self._terminal], [], [], deadline - time.monotonic())[0], shown
            shown += os.read(self._terminal, 4096).decode()
        return shown

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@pytest.mark.parametrize(("keys", "started"), TYPED)
def test_what_is_typed_is_completed(shell, keys, started):
    shown = shell.type(f"plt {keys}")
    assert shown.rpartition("start")[2].partition("end")[0] == started, shown
