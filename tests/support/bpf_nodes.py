"""Nodes of ``udp_nodes`` without agents, on which the tunnel's programs are put by hand, and what their pods say to each other.

    pod p1 eth0 --veth-- node n1  flannel0, eth0 --veth-- bridge namespace --veth-- eth0, flannel0  node n2 --veth-- pod p2
                                  np_udp_encap, np_udp_decap, np_guard

Reverse paths are checked strictly on every node: what the programs let in must look right to the kernel as well.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from overlay_nets import batch
from udp_nodes import POD_MTU, UdpNode

from kernelstate.linux import ethtool, netns
from kernelstate.linux.bpf_attach import Attacher
from kernelstate.linux.bpf_tunnel import LinuxTunnel
from kernelstate.linux.tun import make_tun
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import SourceGuard, TunnelPeer, TunnelState, UdpTunnel
from kernelstate.reconcile_tunnel import TunnelReconciler
from nodeplane.host_kernel import FORWARDER

OBJECTS = FORWARDER.parent
PORT = 8285
SET_GRO = 0x2C


def peer_entries(number: int) -> tuple[TunnelPeer, TunnelPeer]:
    """Return what others know of a node."""
    return (
        TunnelPeer(Prefix.parse(f"10.244.{number}.0/24"), ip_address(f"192.168.1.{number}")),
        TunnelPeer(Prefix.parse(f"fd00:244:0:{number}::/64"), ip_address(f"fd00:1::{number}")),
    )


def tunnel_of(node: UdpNode, peers: Sequence[int]) -> UdpTunnel:
    """Return a node's end of the tunnel."""
    entries = tuple(sorted(entry for number in peers for entry in peer_entries(number)))
    own = (ip_address(f"192.168.1.{node.number}"), ip_address(f"fd00:1::{node.number}"))
    return UdpTunnel("flannel0", "eth0", PORT, own, entries)


def guard_of(node: UdpNode, peers: Sequence[int]) -> SourceGuard:
    """Return a node's guard, which looks into VXLAN as well."""
    own = tuple(entry.prefix for entry in peer_entries(node.number))
    network = (Prefix.parse("10.244.0.0/16"), Prefix.parse("fd00:244::/48"))
    return SourceGuard("eth0", own, network, ((8472, 1),), tunnel_of(node, peers).peers)


def make_flannel0(node: UdpNode) -> None:
    """Make the TUN and its routes, and check reverse paths strictly."""
    with netns.inside(node.space):
        assert not make_tun("flannel0")
    batch(
        node.space,
        f"""link set flannel0 up mtu {POD_MTU}
        addr add 10.244.{node.number}.0/32 dev flannel0
        addr add fd00:244:0:{node.number}::/128 dev flannel0 nodad
        route add 10.244.0.0/16 dev flannel0
        route add fd00:244::/48 dev flannel0""",
    )
    netns.run(node.space, ["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])


class Programs:
    """The programs of one node, and the reconciler that keeps them."""

    def __init__(self, node: UdpNode, attach: Attacher | None = None, objects: Path = OBJECTS) -> None:
        self.node = node
        self.port = LinuxTunnel(objects, attach)
        self.reconciler = TunnelReconciler(self.port)

    def want(self, udp: UdpTunnel | None, guard: SourceGuard | None = None) -> int:
        """Have it so; return how much was changed."""
        self.reconciler.set_desired(TunnelState(udp, guard))
        return self.sync()

    def sync(self) -> int:
        """Bring what is desired; return how much was changed."""
        with netns.inside(self.node.space):
            report = self.reconciler.sync()
        assert report.ok, report.errors
        return report.changed

    def drifted(self) -> bool:
        """Whether somebody else changed something."""
        with netns.inside(self.node.space):
            return self.reconciler.drifted()

    def counters(self, kind: str = "udp") -> dict[str, int]:
        """Return the counters that are not 0."""
        return {name: value for name, value in self.port.counters(kind).items() if value}


def set_offloads(space: str, link: str, *, on: bool) -> None:
    """Let a link take unfinished checksums and packets larger than its MTU, or have the kernel finish and cut them before."""
    with netns.inside(space):
        for command in (ethtool.SET_TX_CHECKSUM, ethtool.SET_TSO, ethtool.SET_GSO):
            ethtool.switch(link, command, on=on)


def set_gro(space: str, link: str) -> None:
    """Let a link put together what belongs together."""
    with netns.inside(space):
        ethtool.switch(link, SET_GRO, on=True)


# -- pods --------------------------------------------------------------------------------------------------------------


def _in_pod(node: UdpNode, family: int, kind: socket.SocketKind) -> socket.socket:
    with netns.inside(node.pod):
        sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
    sock.settimeout(10.0)
    sock.bind((node.pods[family], 0))
    return sock


def echo_stream(client: UdpNode, server: UdpNode, data: bytes, family: int = 4) -> bytes:
    """Send data over a TCP connection from pod to pod and return what came back."""
    with _in_pod(server, family, socket.SOCK_STREAM) as listener, _in_pod(client, family, socket.SOCK_STREAM) as out:
        listener.listen()

        def echo() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(10.0)
                while part := accepted.recv(1 << 18):
                    accepted.sendall(part)

        def send() -> None:
            out.sendall(data)
            out.shutdown(socket.SHUT_WR)

        threads = [threading.Thread(target=echo), threading.Thread(target=send)]
        threads[0].start()
        out.connect(listener.getsockname()[:2])
        threads[1].start()
        back = bytearray()
        while part := out.recv(1 << 18):
            back += part
        for thread in threads:
            thread.join()
    return bytes(back)


def echo_datagrams(client: UdpNode, server: UdpNode, payloads: Sequence[bytes], family: int = 4) -> list[bytes]:
    """Send each as a datagram from pod to pod, one after the other, and return what came back."""
    with _in_pod(server, family, socket.SOCK_DGRAM) as listener, _in_pod(client, family, socket.SOCK_DGRAM) as out:
        back = []
        for payload in payloads:
            out.sendto(payload, listener.getsockname()[:2])
            data, sender = listener.recvfrom(1 << 16)
            listener.sendto(data, sender)
            back.append(out.recv(1 << 16))
    return back


def ping(client: UdpNode, server: UdpNode, family: int = 4) -> bool:
    """Whether a pod answers three of another pod's pings within five seconds: neighbours may have to be found first."""
    return _answers(client, server, family, "-c", "3", "-w", "5") >= 3  # more, where the first come late


def is_silent(client: UdpNode, server: UdpNode, family: int = 4) -> bool:
    """Whether a pod answers none of another pod's pings within a second."""
    return _answers(client, server, family, "-c", "2", "-W", "1") == 0


def _answers(client: UdpNode, server: UdpNode, family: int, *words: str) -> int:
    out = netns.run(client.pod, ["ping", f"-{family}", "-i", "0.02", *words, server.pods[family]], check=False)
    return int(re.search(r"(\d+) received", out)[1])


class Numbered:
    """Numbered datagrams from pod to pod, some ten thousand each second, for as long as the body runs."""

    def __init__(self, client: UdpNode, server: UdpNode) -> None:
        self._listener, self._out = (_in_pod(node, 4, socket.SOCK_DGRAM) for node in (server, client))
        self._listener.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self._out.connect(self._listener.getsockname()[:2])
        self._ending = threading.Event()
        self._sender = threading.Thread(target=self._send)
        self.sent = 0

    def _send(self) -> None:
        while not self._ending.is_set():
            for _ in range(10):
                self._out.send(self.sent.to_bytes(8, "big"))
                self.sent += 1
            time.sleep(0.001)  # a pace, not a wait: the receiver's buffer must never be what loses one

    def __enter__(self) -> Self:
        self._sender.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._sender.join()

    def missing(self) -> int:
        """Return how many did not arrive, and let go of the sockets."""
        seen = set()
        self._listener.settimeout(0.5)
        try:
            while len(seen) < self.sent:
                seen.add(self._listener.recv(16))
        except TimeoutError:
            pass
        finally:
            self._listener.close()
            self._out.close()
        return self.sent - len(seen)
