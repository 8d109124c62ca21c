"""A `python` for tests that runs commands without their seconds of imports.

A server process has torch, megatron-core and the package imported, on the CPU runtime, and forks for each command.
`WarmPython.executable` stands in for the interpreter: `-m MODULE` and scripts, also after `-P`, run in a fork, with the
arguments, folder, environment and standard streams of the caller; the processes that they start by `sys.executable` do
so too.
Signals are passed on, and its exit status is the command's. `-c` is run like that after `-P` alone, with which the
package starts its own processes; this and anything else goes to the real interpreter, which is also used where the
start itself is tested: what is imported, and when, cannot be seen here.

The test processes of a session share one server: the first that needs it starts it, and it ends with the last one.

This file is also the server's program; the executable's is tests/warm_client.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CLIENT = Path(__file__).with_name("warm_client.py")
_START_TIMEOUT_S = 180.0
_HOLD = b"hold it!"  # as long as a request's size
_PRELOADED = (
    "torch._dynamo",
    "plt_megatron.train.trainer",
    "plt_megatron.train.megatron_engine",
    "plt_megatron.hf.exporting",
    "plt_megatron.hf.generation",
    "plt_megatron.experiments.diagnostics.report",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "scipy.optimize",
    "matplotlib.pyplot",
)


class WarmPython:
    """The server, held until this process ends or calls `close`.

    Attributes:
        executable: to be used like `sys.executable`.
    """

    def __init__(self, folder: Path, preloaded: Sequence[str] = _PRELOADED) -> None:
        """`folder` is for its files, the same for all processes that share the server, which imports `preloaded`."""
        folder.mkdir(exist_ok=True)
        self.executable, self._folder, self._preloaded = folder / "python", folder, preloaded
        self._server: subprocess.Popen[bytes] | None = None
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._lifeline = self._hold() or self._start()  # closed, however this process ends

    def _hold(self) -> socket.socket | None:
        """A connection that keeps the server; None if there is none, or if it is about to end."""
        lifeline = socket.socket(socket.AF_UNIX)
        try:
            lifeline.connect(str(self._folder / "socket"))
            lifeline.sendall(_HOLD)
            if lifeline.recv(1):
                return lifeline
        except (FileNotFoundError, ConnectionError):
            pass
        lifeline.close()
        return None

    def _start(self) -> socket.socket:
        address = self._folder / "socket"
        address.unlink(missing_ok=True)
        self.executable.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {_CLIENT} {address} "$@"\n')
        self.executable.chmod(0o755)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MPLBACKEND": "Agg",
        }
        ours, theirs = socket.socketpair()
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(address), str(theirs.fileno()), str(self.executable), *self._preloaded],
            pass_fds=[theirs.fileno()],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=(self._folder / "log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        theirs.close()
        ours.settimeout(_START_TIMEOUT_S)
        assert ours.recv(1), (self._folder / "log").read_text()
        return ours

    def close(self) -> None:
        """Let go of the server: it ends once nobody holds it."""
        self._lifeline.close()
        if self._server is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # others hold it
                self._server.wait(2)


# ---------------------------------------------------------------- the server


def serve(listener: socket.socket, lifeline: socket.socket) -> dict[str, Any] | None:
    """Fork for each request until the last lifeline ends. Returns in every fork, with its request; at the end None."""
    selector = selectors.DefaultSelector()
    selector.register(lifeline, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    lifelines = {lifeline}
    running: dict[Any, int] = {}  # caller: process
    while True:
        for key, _ in selector.select():
            if key.fileobj in lifelines:
                selector.unregister(key.fileobj)
                lifelines.remove(key.fileobj)  # type: ignore[arg-type]
                key.fileobj.close()  # type: ignore[union-attr]
                if not lifelines:
                    for process in running.values():
                        os.kill(process, signal.SIGKILL)
                    return None
                continue
            if key.fileobj is listener:
                caller, _ = listener.accept()
                received = _receive(caller)
                if received == _HOLD:
                    caller.send(b"r")
                    lifelines.add(caller)
                    selector.register(caller, selectors.EVENT_READ)
                    continue
                if received is None:
                    caller.close()
                    continue
                request, streams = received
                process = os.fork()
                if process == 0:
                    selector.close()
                    for other in (*lifelines, listener, caller, *running):
                        other.close()
                    return {**request, "streams": streams}
                for stream in streams:
                    os.close(stream)
                running[caller] = process
                selector.register(caller, selectors.EVENT_READ)
                selector.register(os.pidfd_open(process), selectors.EVENT_READ, caller)
            elif key.data is not None:
                selector.unregister(key.fileobj)
                os.close(key.fileobj)  # type: ignore[arg-type]
                _report(key.data, running.pop(key.data), selector)
            elif key.fileobj in running:
                _pass_on(key.fileobj, running[key.fileobj], selector)


def _receive(caller: socket.socket) -> tuple[dict[str, Any], list[int]] | bytes | None:
    """A request and its standard streams, or `_HOLD`; None if the caller has died."""
    size, streams, _, _ = socket.recv_fds(caller, 8, 3)
    if size == _HOLD:
        return _HOLD
    data = b""
    while size and len(data) < int(size):
        part = caller.recv(1 << 16)
        if not part:
            break
        data += part
    if size and len(data) == int(size):
        return marshal.loads(data), streams
    for stream in streams:
        os.close(stream)
    return None


def _pass_on(caller: Any, process: int, selector: selectors.BaseSelector) -> None:
    """The signals that a caller has received; SIGKILL if it is dead."""
    numbers = b""
    with contextlib.suppress(ConnectionResetError):
        numbers = caller.recv(16)
    if not numbers:
        selector.unregister(caller)
    for number in numbers or [signal.SIGKILL]:
        os.kill(process, number)  # not reaped yet: it exists


def _report(caller: Any, process: int, selector: selectors.BaseSelector) -> None:
    """A process has ended: its exit status to the caller."""
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    with contextlib.suppress(KeyError):
        selector.unregister(caller)
    caller.close()


def run(request: dict[str, Any], executable: str) -> None:
    """In a fork: become the command."""
    import runpy

    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    modules: Any = sys.modules.get("transformers.dynamic_module_utils")
    if modules is not None and "HF_MODULES_CACHE" in os.environ:
        modules.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]  # it has read the server's
    sys.executable = executable
    _open_streams()
    arguments = request["arguments"]
    safe = arguments[0] == "-P"
    first, *rest = arguments[safe:]
    sys.argv = {"-m": rest, "-c": ["-c", *rest[1:]]}.get(first, [first, *rest])
    sys.path[:1] = [] if safe else [request["folder"] if first == "-m" else str(Path(first).resolve().parent)]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(rest[0], {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")


def _open_streams() -> None:
    """The interpreter's own, of the server's log, know what kind of file that is, and its encoding."""
    encoding = os.environ.get("PYTHONIOENCODING") or "utf-8"
    sys.stdin = open(0, encoding=encoding, closefd=False)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)


def _forget_exit_functions() -> None:
    """Drop what imports have registered for the interpreter's end: a fork does only what its own command needs.

    The finalizers of objects that are never freed, and torch.compile's report, would copy 50 MB of the server's memory.
    """
    import atexit
    import weakref

    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    if "torch._dynamo.utils" in sys.modules:
        atexit.unregister(sys.modules["torch._dynamo.utils"].dump_compile_times)


def main_of_server(address: str, lifeline: int, executable: str, *preloaded: str) -> None:
    import atexit
    import gc
    import importlib
    import logging
    import random
    import threading
    import traceback

    gc.disable()  # as long as objects only become more
    if preloaded:
        from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

        enter_cpu_runtime(force=True)
    for name in preloaded:
        importlib.import_module(name)
    logging.getLogger().handlers.clear()  # some import has set it up, and a command's own basicConfig would do nothing
    _forget_exit_functions()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    ready = socket.socket(fileno=lifeline)
    ready.send(b"r")
    gc.collect()
    gc.freeze()
    gc.enable()
    request = serve(listener, ready)
    if request is None:
        return
    random.seed()
    status: Any = 0
    try:
        run(request, executable)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    # Not to the interpreter's own end: it would take a hundred thousand objects apart one by one.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else bool(status))


if __name__ == "__main__":
    main_of_server(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
