"""The forwarder beside an independent implementation of flannel's format: what crosses, what pods are told, how it ends.

pod a --> flannel0 => nodeplane-udp ===UDP 8285=== plain Python => flannel0 --> pod b
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mixed_tunnel import MTU, SECONDS, MixedTunnel, pod_ip
from overlay_nets import batch

from kernelstate.linux import netns

pytestmark = pytest.mark.kernel

IP_RECVERR, IPV6_RECVERR, IP_TTL, IPV6_UNICAST_HOPS = 11, 25, 2, 16
SO_EE = struct.Struct("=IBBBxII")  # errno, origin, type, code, info, data: struct sock_extended_err
WAYS = [("a", "b"), ("b", "a")]


@pytest.fixture
def tunnel(make_netns: Callable[[], str], tmp_path: Path) -> Iterator[MixedTunnel]:
    made = MixedTunnel(make_netns, tmp_path)
    yield made
    made.close()


def transfer(tunnel: MixedTunnel, source: str, target: str, family: int, size: int) -> None:
    """Send bytes over one TCP connection; they arrive as they were."""
    data = os.urandom(size)
    server, client = (tunnel.socket(end, family, socket.SOCK_STREAM) for end in (target, source))
    server.listen()
    client.connect(server.getsockname()[:2])
    answering, _ = server.accept()
    with answering:
        answering.settimeout(SECONDS)
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        received = hashlib.sha256()
        while piece := answering.recv(1 << 16):
            received.update(piece)
        sender.join(SECONDS)
    assert received.digest() == hashlib.sha256(data).digest()


def exchange(tunnel: MixedTunnel, source: str, target: str, family: int) -> None:
    """Datagrams of every kind of size, one larger than any packet, come back as they were."""
    server, client = (tunnel.socket(end, family, socket.SOCK_DGRAM) for end in (target, source))
    for size in (0, 1, 64, 1300, 9000):
        data = os.urandom(size)
        client.sendto(data, server.getsockname()[:2])
        got, sender = server.recvfrom(1 << 16)
        assert (got, sender[0]) == (data, pod_ip(source, family))
        server.sendto(got, sender)
        assert client.recv(1 << 16) == data


@pytest.mark.parametrize("offloads", [True, False], ids=["offloads", "no-offloads"])
def test_crosses_to_another_implementation(make_netns: Callable[[], str], tmp_path: Path, offloads: bool) -> None:
    """TCP, UDP and ping cross both ways in both families, whether links finish checksums and segments or not."""
    tunnel = MixedTunnel(make_netns, tmp_path, offloads=offloads)
    try:
        for family in (4, 6):
            for source, target in WAYS:
                ping = ["ping", f"-{family}", "-c1", "-W2", "-q", "-s1200", pod_ip(target, family)]
                assert " 0% packet loss" in netns.run(tunnel.pod[source], ping)
                exchange(tunnel, source, target, family)
                transfer(tunnel, source, target, family, 2_000_000)
        counters = tunnel.counters()
        names = ("unknown_peer", "wrong_source", "malformed", "too_big", "send_errors", "write_errors")
        assert {name: counters[name] for name in names} == dict.fromkeys(names, 0)
        assert min(counters["sent_packets"], counters["received_packets"]) > 2 * 2_000_000 / MTU
    finally:
        tunnel.close()


def told(tunnel: MixedTunnel, family: int, target: str, *, hops: int = 64, size: int = 8) -> tuple[int, int, int, str]:
    """Send a datagram from pod a; return errno, type and code of the ICMP error about it, and who sent it."""
    sock = tunnel.socket("a", family, socket.SOCK_DGRAM)
    level = socket.IPPROTO_IP if family == 4 else socket.IPPROTO_IPV6
    sock.setsockopt(level, IP_RECVERR if family == 4 else IPV6_RECVERR, 1)
    sock.setsockopt(level, IP_TTL if family == 4 else IPV6_UNICAST_HOPS, hops)
    sock.connect((target, 9))
    sock.send(bytes(size))
    with pytest.raises(OSError, match=r"unreachable|No route|too long"):
        sock.recv(1)
    _, ancillary, _, _ = sock.recvmsg(1 << 10, 1 << 10, socket.MSG_ERRQUEUE)
    error = ancillary[-1][2]
    number, _, kind, code, _, _ = SO_EE.unpack_from(error)
    address = error[SO_EE.size + (4 if family == 4 else 8) :][: 4 if family == 4 else 16]
    return number, kind, code, socket.inet_ntop(socket.AF_INET if family == 4 else socket.AF_INET6, address)


def test_pods_are_told(tunnel: MixedTunnel) -> None:
    """A pod is told, by its own node, that nobody has an address, and that a packet came no further than into the tunnel."""
    assert told(tunnel, 4, "10.244.99.9") == (errno.ENETUNREACH, 3, 0, "10.244.1.0")
    assert told(tunnel, 6, "fd00:244:0:99::9") == (errno.ENETUNREACH, 1, 0, "fd00:244:0:1::")
    assert told(tunnel, 4, pod_ip("b", 4), hops=2) == (errno.EHOSTUNREACH, 11, 0, "10.244.1.0")
    assert told(tunnel, 6, pod_ip("b", 6), hops=2) == (errno.EHOSTUNREACH, 3, 0, "fd00:244:0:1::")


def test_ping_is_told(tunnel: MixedTunnel) -> None:
    """Somebody who pings an address that nobody has reads so."""
    said = netns.run(tunnel.pod["a"], ["ping", "-4", "-c1", "-W2", "10.244.99.9"], check=False)
    assert "From 10.244.1.0 icmp_seq=1 Destination Net Unreachable" in said


def test_a_pod_whose_packet_is_too_large_is_told(tunnel: MixedTunnel) -> None:
    """Where somebody gave the TUN an MTU that no datagram can hold, a pod learns what one can hold, and does so."""
    for space, link in ((tunnel.pod["a"], "eth0"), (tunnel.node["a"], "pod"), (tunnel.node["a"], "flannel0")):
        batch(space, f"link set {link} mtu 65535")
    assert told(tunnel, 4, pod_ip("b", 4), size=65500) == (errno.EMSGSIZE, 3, 4, "10.244.1.0")
    assert "mtu 65507" in netns.run(tunnel.pod["a"], ["ip", "route", "get", pod_ip("b", 4)])
    assert tunnel.counters()["too_big"] == 1


def test_an_upgrade_loses_no_packet(tunnel: MixedTunnel) -> None:
    """Of datagrams that cross while the forwarder is exchanged three times, each arrives, and in order."""
    server, client = (tunnel.socket(end, 4, socket.SOCK_DGRAM) for end in ("b", "a"))
    target = server.getsockname()
    numbers: list[int] = []
    stop, total = threading.Event(), 0

    def send() -> None:
        nonlocal total
        while not stop.wait(0.0005):
            client.sendto(total.to_bytes(4, "big"), target)
            total += 1

    def receive() -> None:
        while number := server.recv(4):
            numbers.append(int.from_bytes(number, "big"))

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    peers = tunnel.ask("show peers\n")
    old = tunnel.program
    for _ in range(3):
        new = tunnel.start("--take-over")
        assert (old.wait(SECONDS), tunnel.ask("show peers\n")) == (0, peers)
        old = new
    stop.set()
    threads[0].join(SECONDS)
    client.sendto(b"", target)
    threads[1].join(SECONDS)
    assert total > 20
    assert numbers == list(range(total))


def test_ends_with_its_link(tunnel: MixedTunnel) -> None:
    """A forwarder whose TUN is deleted ends and says why."""
    netns.run(tunnel.node["a"], ["ip", "link", "del", "flannel0"])
    _, said = tunnel.program.communicate(timeout=SECONDS)
    assert (tunnel.program.returncode, said) == (1, "nodeplane-udp: flannel0: the link is gone\n")


def test_ends_when_asked(tunnel: MixedTunnel) -> None:
    """SIGTERM and ``stop`` end the forwarder without a word; a request that it does not know is refused and ends nothing."""
    with pytest.raises(AssertionError, match="error unknown request"):
        tunnel.ask("dance\n")
    tunnel.program.terminate()
    assert (tunnel.program.wait(SECONDS), tunnel.program.communicate()[1]) == (0, "")
    again = tunnel.start()
    tunnel.ask("stop\n")
    assert (again.wait(SECONDS), again.communicate()[1]) == (0, "")


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        ("peer 10.244.3.1/24 192.168.1.3 8285", "error the prefix must be like 10.244.2.0/24, without host bits"),
        ("peer 10.244.3.0/24 nobody 8285", "error the address must be an IP address"),
        ("peer 10.244.3.0/24 192.168.1.3 0", "error the port must be between 1 and 65535"),
        ("peer 10.244.3.0/24 192.168.1.3", "error must be: peer PREFIX ADDRESS PORT"),
        ("peers commit", "error peers commit without peers begin"),
    ],
)
def test_refuses_and_says_why(tunnel: MixedTunnel, request_: str, answer: str) -> None:
    """A request that is wrong changes nothing and is answered with what is wrong."""
    before = tunnel.ask("show peers\n")
    with pytest.raises(AssertionError, match=answer):
        tunnel.ask(f"{request_}\n")
    assert tunnel.ask("show peers\n") == before
