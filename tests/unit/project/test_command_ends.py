"""How `run_command` ends a command, also one whose output nobody reads to the end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from plt_megatron.errors import AttemptFailed, UserError, file_error, run_command
from tests.running import ROOT, run

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


class AnsweredError(Exception):
    """As an HTTP client's, such as huggingface_hub's: no error of the operating system."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}")
        self.response = Mock(status_code=status)


def test_what_a_server_may_answer_otherwise_later_is_tried_again():
    for status in (429, 500, 503, 401, 404):
        kind = UserError if status in (401, 404) else AttemptFailed
        assert type(file_error("no", AnsweredError(status))) is kind, status
    assert type(file_error("no", OSError(errno.EBUSY, "reduce your request rate"))) is AttemptFailed  # s3fs, of a 503
    with pytest.raises(ValueError, match="hidden") as raised:  # as httpcore hides it
        try:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        except ConnectionRefusedError:
            raise ValueError("hidden") from None
    assert type(file_error("no", raised.value)) is AttemptFailed


@pytest.mark.parametrize(("given", "raised"), [((40, 400), (400, 400)), ((50, 50), (50, 50))])
def test_the_limit_of_open_files_is_raised_for_a_command_and_what_it_starts(given, raised):
    """Every source of a run holds several files open, and shells start with a limit of 1,024."""
    asks = "import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), flush=True)"
    program = (
        f"import resource, subprocess, sys; resource.setrlimit(resource.RLIMIT_NOFILE, {given})\n"
        "from plt_megatron.errors import run_command\n"
        f"run_command(lambda: subprocess.call([sys.executable, '-c', {asks!r}]))"
    )
    assert run([sys.executable, "-c", program], ROOT).stdout == f"{raised}\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("one\ntwo"), "error: one\nerror: two\n"),
        (UserError("a\x1b]0;title\x07"), "error: a\\x1b]0;title\\x07\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "error: /a/file: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/file"), "error: /a/file: No space left on device\n"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "/a to /b"),
        (OSError(errno.EMFILE, "Too many open files", "/a/file"), "ulimit -Hn"),
        (ImportError("libtorch.so: cannot open shared object file: Too many open files"), "ulimit -Hn"),
    ],
)
def test_what_the_user_or_the_system_refuses_is_a_line_and_status_2(capsys, error, words):
    assert run_command(Mock(side_effect=error)) == 2
    assert words in capsys.readouterr().err


BUGS = [OSError("of a library"), ImportError("no module"), AssertionError(), ValueError()]


@pytest.mark.parametrize("error", [*BUGS, BrokenPipeError()], ids=repr)  # of a connection, not of the command's output
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(Mock(side_effect=error))


def test_an_interrupted_command_says_how_to_go_on(capsys):
    assert run_command(Mock(side_effect=KeyboardInterrupt), "interrupted: the same command goes on") == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on\n"


def test_ctrl_c_is_heard_while_an_object_is_freed():
    command = [sys.executable, "-c", IN_A_FINALIZER]
    assert run(command, status=130, timeout=59).stderr == "interrupted\n"


ESTIMATE = [sys.executable, "tools/estimate.py", "configs/runs/plt2_tiny.yaml", "model.vocab_size=99"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_left_ends_without_a_traceback(unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipe = subprocess.PIPE
    with subprocess.Popen(ESTIMATE, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")
