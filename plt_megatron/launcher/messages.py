"""Messages between launchers: JSON objects, one per line, over non-blocking TCP sockets."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

BEAT_SECONDS = 2.0  # between heartbeats
_CHUNK = 1 << 16
_LONGEST = 1 << 24  # bytes of one message, far more than any of ours


class Channel:
    """One connection.

    Attributes:
        closed: the other side is gone, or sent something else than messages.
        heard: `time.monotonic()` when something last came in.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._incoming, self._outgoing = bytearray(), bytearray()
        self.closed = False
        self.heard = time.monotonic()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether data are waiting to be sent."""
        return bool(self._outgoing) and not self.closed

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, now or with a later `flush`; nothing happens on a closed connection."""
        if not self.closed:
            self._outgoing += json.dumps(message).encode() + b"\n"
            self.flush()

    def flush(self) -> None:
        """Send what is waiting, as far as the network accepts it."""
        try:
            while self.pending:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come in."""
        while not self.closed:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
            self._incoming += data
            self.heard = time.monotonic()
        return self._parse()

    def _parse(self) -> list[dict[str, Any]]:
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = bytearray(rest)
        messages = []
        try:
            for line in lines:
                message = json.loads(line)
                if not isinstance(message, dict) or not isinstance(message.get("type"), str):
                    raise ValueError("no message")
                messages.append(message)
        except ValueError:
            self.closed = True
        if len(rest) > _LONGEST:
            self.closed = True
        return messages

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self._socket.close()


class Every:
    """Something due at regular intervals, the first time at once."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def due(self) -> bool:
        """Whether it is due; if so, the next interval starts."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
