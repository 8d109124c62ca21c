"""How `run_command` ends a command: what of it needs no command."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from plt_megatron.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[3]
# Ctrl-C in the middle of an object's end, where Python would only report it.
IN_A_FINALIZER = """
import os, signal, time
from plt_megatron.errors import hear_every_interrupt, run_command
hear_every_interrupt()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job's children ignore
class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
def main():
    Freed()
    time.sleep(60)
raise SystemExit(run_command(main))
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("one\ntwo"), "error: one\nerror: two\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "error: /a/file: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/file"), "error: /a/file: No space left on device\n"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "/a to /b"),
        (OSError(errno.EMFILE, "Too many open files", "/a/file"), "ulimit -n"),
        (ImportError("libtorch.so: cannot open shared object file: Too many open files"), "ulimit -n"),
    ],
)
def test_what_the_user_or_the_system_refuses_is_a_line_and_status_2(capsys, error, words):
    def fail() -> None:
        raise error

    assert run_command(fail) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("of a library"), ImportError("no module"), AssertionError(), ValueError()])
def test_a_bug_keeps_its_traceback(error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(fail)


def test_an_interrupted_command_says_how_to_go_on(capsys):
    def stop() -> None:
        raise KeyboardInterrupt

    assert run_command(stop, "interrupted: the same command goes on") == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on\n"


def test_ctrl_c_is_heard_while_an_object_is_freed():
    command = [sys.executable, "-c", IN_A_FINALIZER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=59)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
