"""A node with two pods or more on links that are marked as a CNI plugin's, its short lane, and what talks through it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from scapy.layers.l2 import Ether
from scapy.packet import Packet
from service_node import NODE_IPS, TIMEOUT, ServiceNode

from kernelstate.linux import ethtool, netns
from kernelstate.linux.bpf_lane import LinuxLane
from kernelstate.linux.pod_link import ALIAS
from kernelstate.reconcile_lane import LaneReconciler
from nodeplane.host_kernel import BUILT

PORT = 8080
SET_TX_CHECKSUM = 0x17
"""ETHTOOL_STXCSUM: linux/ethtool.h."""


class LaneNode(ServiceNode):
    """Programs are at the links of ``pods`` pods and at the uplink once ``sync`` has been called."""

    def __init__(self, make_netns: Callable[[], str], rules: str, pods: int = 2) -> None:
        super().__init__(make_netns, pods)
        for number in self.pods:
            netns.run(self.node, ["ip", "link", "set", f"pod{number}", "alias", f"{ALIAS}/t/{number}/eth0"])
        netns.run(self.node, ["nft", "-f", "-"], stdin=rules)
        with netns.inside(self.node):
            self.port = LinuxLane(BUILT)
        self.lane = LaneReconciler(self.port)

    def sync(self) -> int:
        """Have programs where they should be; how much that changed."""
        with netns.inside(self.node):
            report = self.lane.sync()
        assert report.ok, report.errors
        return report.changed

    def without_offload(self) -> None:
        """Have every sum made by those who send, on all pods' links."""
        for number, space in self.pods.items():
            for place, link in ((space, "eth0"), (self.node, f"pod{number}")):
                with netns.inside(place):
                    ethtool.switch(link, SET_TX_CHECKSUM, on=False)

    def counters(self) -> dict[str, int]:
        """Return what the programs have counted."""
        return dict(self.port.counters())

    def taken(self) -> int:
        """Return how many packets took the lane."""
        return self.counters()["taken"]

    def close(self) -> None:
        """Close every socket, and let go of the programs."""
        self.port.close()
        super().close()

    def ping(self, space: str) -> None:
        """Have neighbours on both sides of a link known; traffic does the same."""
        netns.run(space, ["ping", "-c", "1", "-W", "2", NODE_IPS[4]])


class Echo:
    """A TCP server in a pod that sends everything back, one thread a connection."""

    def __init__(self, node: LaneNode, pod: int, family: int = 4, port: int = PORT) -> None:
        self.server = node.listen(pod, port, family)
        self.peers: list[str] = []
        """Who connected, by address, in order."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, peer = self.server.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.peers.append(peer[0])
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(30)
            try:
                while data := client.recv(1 << 16):
                    client.sendall(data)
            except OSError:
                return


def talk(client: socket.socket, rounds: int, size: int = 20_000) -> None:
    """Send and hear so many times that it comes back as it went."""
    for number in range(rounds):
        sent = struct.pack("=I", number) * (size // 4)
        client.sendall(sent)
        heard = b""
        while len(heard) < len(sent):
            piece = client.recv(1 << 16)
            assert piece, "the connection was closed"
            heard += piece
        assert heard == sent


def warm(client: socket.socket) -> None:
    """Talk until the connection is one that tracking knows well."""
    talk(client, 4, 400)


@contextmanager
def wire(space: str, link: str = "eth0") -> Iterator[socket.socket]:
    """Open a raw socket at a link."""
    with netns.inside(space):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        raw.bind((link, 0))
    raw.settimeout(0.2)
    with raw:
        yield raw


def heard(raw: socket.socket, wanted: Callable[[Packet], object], seconds: float = TIMEOUT) -> Packet | None:
    """Return the first packet that is wanted, or None."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            packet = Ether(raw.recv(65535))
        except TimeoutError:
            continue
        if wanted(packet):
            return packet
    return None


def mac(space: str, link: str) -> str:
    """Return a link's MAC."""
    with netns.inside(space), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as own:
        own.bind((link, 0))
        return str(own.getsockname()[4].hex(":"))
