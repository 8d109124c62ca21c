"""Connections between launchers: the first node's socket, to which all connect, and the coordinator behind it.

Messages are JSON objects, one per line, over non-blocking TCP sockets.
"""

from __future__ import annotations

import contextlib
import json
import math
import selectors
import socket
import time
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.launcher.coordinator import Coordinator
from plt_megatron.launcher.job import Allocation, JobSettings
from plt_megatron.launcher.records import LogFile, Records, stamp
from plt_megatron.run_folder.folder import RunFolder

BEAT_SECONDS = 2.0  # between heartbeats
_KEEPALIVE = {  # a node that does not answer for 120 s is gone
    socket.TCP_KEEPIDLE: 30,
    socket.TCP_KEEPINTVL: 10,
    socket.TCP_KEEPCNT: 9,
    socket.TCP_USER_TIMEOUT: 120_000,
}
_CHUNK = 1 << 16
_LONGEST = 1 << 24  # maximum bytes of a message, far more than any of ours


class AwakeClock:
    """Seconds that this process spent in turns: time for which it was suspended, or stuck in a write, counts little,
    since what others sent meanwhile is still to be read."""

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, time.monotonic()

    def __call__(self) -> float:
        now = time.monotonic()
        self._seconds += min(now - self._last, BEAT_SECONDS)
        self._last = now
        return self._seconds


awake = AwakeClock()


class Channel:
    """One connection.

    Attributes:
        node: in the hub, the node whose launcher is at the other side; None until it has introduced itself.
        closed: whether the other side is gone or sent something other than messages.
        heard: `awake()` when data last came in.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A launcher is silent while the file system of its logs stalls, so that silence says little: the kernels find
        # out whether a node still answers.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connection
        self._incoming, self._outgoing = bytearray(), bytearray()
        self.node: str | None = None
        self.closed = False
        self.heard = awake()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether data is waiting to be sent."""
        return bool(self._outgoing) and not self.closed

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, now or with a later `flush`; does nothing on a closed connection."""
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
        """Return the messages that have come in."""
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
            self.heard = awake()
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
        except (ValueError, RecursionError):
            self.closed = True
        if len(rest) > _LONGEST:
            self.closed = True
        return messages

    def close(self) -> None:
        self.closed = True
        self._socket.close()


class Every:
    """Timer that is due at regular intervals, the first time immediately."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def due(self) -> bool:
        """Check whether it is due; if so, start the next interval."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


class Hub:
    """Connections of all nodes, including the first node's own; writes the merged log. Raises `UserError` if the port
    is already in use on this node."""

    def __init__(
        self, run: Path, settings: JobSettings, allocation: Allocation, selector: selectors.BaseSelector
    ) -> None:
        self._allocation, self._selector = allocation, selector
        self._merged = LogFile(RunFolder(run).logs / "merged.log")  # of all ranks, in order of arrival
        self._channels: list[Channel] = []
        self._hellos: dict[str, dict[str, Any]] = {}  # nodes whose clock has been asked for
        self._beat = Every(BEAT_SECONDS)
        self._server = _listen(allocation.launcher_port)
        selector.register(self._server, selectors.EVENT_READ, self._accept)
        self.coordinator = Coordinator(allocation, settings, Records(run, allocation), self._send, self.say, awake)

    def say(self, text: str) -> None:
        """Write a message about the job to its output and to the merged log."""
        line = stamp(self.coordinator.attempt, f"launcher {self._allocation.node}", text)
        print(line, flush=True)
        self._merged.write([line])

    def turn(self) -> None:
        """Handle what is due: heartbeats, pending messages, lost nodes, and the coordinator's time-outs."""
        beat = self._beat.due()
        for channel in list(self._channels):
            if beat and channel.node is not None:
                channel.send({"type": "beat"})
            channel.flush()
            if channel.closed:
                self._drop(channel)
                if channel.node is not None:
                    self.coordinator.lost(channel.node, "its launcher has ended")
        self.coordinator.tick()

    @property
    def pending(self) -> bool:
        """Whether a node is still connected, so that messages to it may be pending."""
        return any(channel.node is not None for channel in self._channels)

    def close(self) -> None:
        for channel in list(self._channels):
            self._drop(channel)
        self._selector.unregister(self._server)
        self._server.close()

    def _send(self, node: str, message: dict[str, Any]) -> None:
        for channel in self._channels:
            if channel.node == node:
                channel.send(message)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the peer has already hung up
            connection, _ = self._server.accept()
            channel = Channel(connection)
            self._channels.append(channel)
            self._selector.register(channel, selectors.EVENT_READ, lambda: self._receive(channel))

    def _receive(self, channel: Channel) -> None:
        for message in channel.receive():
            channel.node = channel.node or self._introduced(message)
            if channel.node is None:
                channel.closed = True
                break
            self._hear(channel.node, message)

    def _introduced(self, message: dict[str, Any]) -> str | None:
        """Return the node of the launcher that sent this first message; None if it is not one of this job's."""
        allocation, node = self._allocation, message.get("node")
        ours = (message.get("job_id"), message.get("restart_count")) == (allocation.job_id, allocation.restart_count)
        ours = ours and isinstance(message.get("facts"), dict)
        known = any(channel.node == node for channel in self._channels)
        return node if message["type"] == "hello" and ours and node in allocation.nodes and not known else None

    def _hear(self, node: str, message: dict[str, Any]) -> None:
        if message["type"] == "hello" and self.coordinator.status is not None:  # over, before it was introduced
            self._send(node, {"type": "quit", "status": self.coordinator.status})
            return
        if message["type"] == "hello" and node not in self._hellos:
            # The message may have waited while the first node checked itself: ask for the clock now.
            self._hellos[node] = message
            self._send(node, {"type": "clock", "sent": time.time()})
            return
        if message["type"] == "clock" and node in self._hellos:
            skew = clock_skew(float(message["sent"]), float(message["time"]), time.time())
            message = self._hellos[node] | {"facts": self._hellos[node]["facts"] | {"skew": skew}}
        if message["type"] == "log":
            self._merged.write(map(str, message["lines"]))
        if message["type"] == "preempt":
            self.coordinator.preempt()
        self.coordinator.handle(node, message)

    def _drop(self, channel: Channel) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(channel)
        self._channels.remove(channel)
        channel.close()


def clock_skew(sent: float, theirs: float, received: float) -> float:
    """Return the seconds that another clock, which showed `theirs` between `sent` and `received`, is ahead of this one,
    beyond what the round trip can explain."""
    difference, doubt = theirs - (sent + received) / 2, (received - sent) / 2
    return math.copysign(max(0.0, abs(difference) - doubt), difference)


def _listen(port: int) -> socket.socket:
    try:
        both = socket.has_dualstack_ipv6()  # a node's name may have an address of either kind, or only of IPv6
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"cannot listen on port {port} of {socket.gethostname()} ({error.strerror}): another job may use it; the "
            "port is derived from the job's id, so submit again"
        ) from error
