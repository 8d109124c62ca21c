"""How far another node's clock is off."""

from __future__ import annotations

import json
import socket
from unittest.mock import Mock

import pytest

from plt_megatron.launcher import hub
from plt_megatron.launcher.hub import Channel, _listen, clock_skew


@pytest.mark.parametrize(
    ("theirs", "skew"),
    [(100.0, 0.0), (101.0, 0.0), (102.0, 0.0), (109.0, 7.0), (93.0, -7.0)],
    ids=["there at once", "halfway", "back at once", "ahead", "behind"],
)
def test_what_the_way_may_account_for_is_no_skew(theirs, skew):
    assert clock_skew(100.0, theirs, 102.0) == skew


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_nodes_may_connect_by_either_kind_of_address():
    with _listen(0) as server:
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, server.getsockname()[1]), 5).close()


def test_time_in_which_a_launcher_stands_still_is_no_silence(monkeypatch):
    times = iter([100.0, 100.1, 1100.1, 1100.3])
    monkeypatch.setattr(hub.time, "monotonic", lambda: next(times))
    clock = hub.AwakeClock()
    assert [clock() for _ in range(3)] == pytest.approx([0.1, 2.1, 2.3])


def test_who_joins_when_all_is_over_is_told(monkeypatch):
    sent = []
    monkeypatch.setattr(hub.Hub, "_send", lambda self, node, message: sent.append((node, message)))
    late = hub.Hub.__new__(hub.Hub)
    late.coordinator, late._hellos = Mock(status=2), {}
    late._hear("b", {"type": "hello", "node": "b"})
    assert sent == [("b", {"type": "quit", "status": 2})]


# Messages over real sockets: whole, in order, whatever the network does to them.


@pytest.fixture
def pair():
    server = socket.create_server(("127.0.0.1", 0))
    left = socket.create_connection(server.getsockname())
    right, _ = server.accept()
    server.close()
    yield Channel(left), right
    left.close()
    right.close()


def test_messages_arrive_whole_and_in_order(pair):
    channel, peer = pair
    text = "".join(json.dumps({"type": "log", "lines": ["\u00fc\n"] * n}) + "\n" for n in range(5)).encode()
    found = []
    for cut in range(0, len(text), 7):
        peer.sendall(text[cut : cut + 7])
        while not (cut + 7 < len(text)) and len(found) < 5:
            found += channel.receive()
        found += channel.receive()
    assert [len(message["lines"]) for message in found] == [0, 1, 2, 3, 4]
    assert found[4]["lines"][3] == "\u00fc\n"


def test_what_the_network_does_not_take_waits(pair):
    channel, peer = pair
    for number in range(200):
        channel.send({"type": "log", "lines": ["x" * 100_000], "number": number})
    assert channel.pending and not channel.closed
    other, numbers = Channel(peer), []
    while len(numbers) < 200:
        channel.flush()
        numbers += [message["number"] for message in other.receive()]
    assert numbers == list(range(200)) and not channel.pending


def received(channel: Channel) -> list[dict]:
    """All that comes before the connection's end."""
    found: list[dict] = []
    while not channel.closed:
        found += channel.receive()
    return found


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\n", b"[1]\n", b'{"no": "type"}\n', b'{"type": 3}\n', b"\xff\xfe\n", b"[" * 200_000 + b"\n"],
)
def test_what_is_no_message_ends_the_connection(pair, garbage):
    channel, peer = pair
    peer.sendall(b'{"type": "beat"}\n' + garbage)
    assert received(channel) == [{"type": "beat"}]


def test_the_last_words_of_one_who_hangs_up_are_heard(pair):
    channel, peer = pair
    peer.sendall(b'{"type": "stopped"}\n')
    peer.close()
    assert received(channel) == [{"type": "stopped"}]
    channel.send({"type": "beat"})  # into the void
