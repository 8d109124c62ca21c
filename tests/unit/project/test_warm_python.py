"""The stand-in for the interpreter behaves as one: arguments, streams, exit statuses, signals, and nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests import running
from tests.running import wait_until_gone
from tests.warm_python import _CLIENT, WarmPython, _receive

SLEEPER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print(os.getpid(), flush=True)
time.sleep(1000)
"""


@pytest.fixture
def run(warm_python, tmp_path):
    """Run a program's text as a script."""

    def run(text: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        (tmp_path / "script.py").write_text(text)
        return running.run([warm_python, tmp_path / "script.py", *arguments], tmp_path, status=None, **options)

    return run


def test_arguments_folder_environment_streams_and_modules(run, tmp_path):
    text = (
        "import os, sys\n"
        "print(sys.argv[1:], os.getcwd(), os.environ['ONLY'], 'HOME' in os.environ, sys.stdin.read())\n"
        "print('torch' in sys.modules)"
    )
    done = run(text, "a", "b c", env={"PATH": os.environ["PATH"], "ONLY": "this"}, input="typed")
    assert done.stdout == f"['a', 'b c'] {tmp_path} this False typed\nTrue\n"
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import atexit, sys; atexit.register(print, 'bye', file=sys.stderr)", 0, "bye\n"),
        ("import sys, weakref; weakref.finalize(weakref, print, 'bye', file=sys.stderr)", 0, "bye\n"),
        ("import logging; logging.basicConfig(level='INFO', format='%(message)s'); logging.info('told')", 0, "told\n"),
    ],
)
def test_exit_statuses(run, text, status, said):
    done = run(text)
    assert done.returncode == status and done.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_modules_run_and_what_they_start_is_warm_too(run, warm_python):
    assert "Linux" in running.run([warm_python, "-m", "platform"]).stdout
    started = "subprocess.run([sys.executable, '-m', 'platform']).returncode"
    done = run(f"import subprocess, sys; print(sys.executable, {started})")
    assert done.stdout.splitlines()[-1] == f"{warm_python} 0"


@pytest.mark.parametrize(("options", "status"), [([], 0), (["-P"], 1)])
def test_modules_of_the_folder_are_found_unless_the_path_is_safe(warm_python, tmp_path, options, status):
    (tmp_path / "of_the_folder.py").write_text("import sys; print('torch' in sys.modules)")
    done = running.run([warm_python, *options, "-m", "of_the_folder"], tmp_path, status=status)
    assert done.stdout == ("" if status else "True\n")
    assert running.run([warm_python, *options, "of_the_folder.py"], tmp_path).stdout == "True\n"


def test_other_options_go_to_the_interpreter_itself(warm_python):
    text = "import sys; print(sys.executable, 'torch' in sys.modules)"
    assert running.run([warm_python, "-c", text]).stdout == f"{sys.executable} False\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_signals_reach_the_command(warm_python, tmp_path, number, status):
    """SIGKILL cannot be passed on: the command ends since its caller is gone."""
    (tmp_path / "script.py").write_text(SLEEPER)
    with subprocess.Popen([warm_python, str(tmp_path / "script.py")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        command = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(60) == status
    wait_until_gone(command)


def test_a_signal_that_comes_after_the_commands_end_changes_nothing(tmp_path):
    """The server has sent the status and gone; the caller gets SIGTERM before it has read it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        command = [sys.executable, "-IS", _CLIENT, str(tmp_path / "socket"), "script.py"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as client:
            caller, _ = listener.accept()
            request, streams = _receive(caller)
            assert request["arguments"] == ["script.py"]
            for stream in streams:
                os.close(stream)
            client.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, client.pid, os.WSTOPPED)
            caller.send(b"75")
            caller.close()
            client.send_signal(signal.SIGTERM)
            client.send_signal(signal.SIGCONT)
            assert client.communicate(timeout=60) == (None, "")
        assert client.returncode == 75


def test_the_server_ends_with_the_last_who_holds_it(tmp_path):
    """Shared, held by two, by one after the first has gone, and a new one when all have."""
    first, second = (WarmPython(tmp_path / "cold", preloaded=()) for _ in range(2))
    assert first.executable == second.executable
    (tmp_path / "script.py").write_text("import os; print(os.getppid())")
    command = [str(second.executable), str(tmp_path / "script.py")]
    server = lambda: int(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)  # noqa: E731
    before = server()
    first.close()
    assert server() == before
    second.close()
    wait_until_gone(before)
    third = WarmPython(tmp_path / "cold", preloaded=())
    assert server() != before
    third.close()
