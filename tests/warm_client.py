"""The program of `WarmPython.executable`: has the server do a command, and ends as it does.

Starts for each command, and so imports only what is compiled into the interpreter: 10 milliseconds instead of 40.
"""

import _signal
import _socket
import array
import marshal
import os
import sys

_FORWARDED = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGUSR1)


def main(address: str, arguments: list[str]) -> None:
    own = arguments[:1] == ["-P"]
    command = arguments[own:]
    if not command or (command[0].startswith("-") and command[0] not in (["-m", "-c"] if own else ["-m"])):
        os.execv(sys.executable, [sys.executable, *arguments])
    server = _socket.socket(_socket.AF_UNIX)
    server.connect(address)
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _FORWARDED)  # until the server has the request
    for number in _FORWARDED:
        _signal.signal(number, lambda number, frame: _pass_on(server, number))
    data = marshal.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)})
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([f"{len(data):8}".encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
    server.sendall(data)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, _FORWARDED)
    status = int(server.recv(16) or 1)
    if status < 0:
        if -status != _signal.SIGKILL:
            _signal.signal(-status, _signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        _signal.pause()  # it comes
    os._exit(status)


def _pass_on(server: _socket.socket, number: int) -> None:
    try:
        server.send(bytes([number]))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the command has ended meanwhile: its status is there to be read


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
