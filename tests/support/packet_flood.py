"""Frames sent into a node without a pause from inside its pods, and exact counts of what became of them there and behind it.

    sending pods                 node, table "watch"                              receiving pod, table "watch"
      one process,  -- veth -->  postrouting, before policies: counts  --.
      frame by frame             policies                                |
                                 postrouting, after policies: counts   --+-- veth -->  prerouting: counts, and drops

Whatever is between the two counts on the node happens to a packet in one go, so their difference is what policies dropped: no queue
that overflows is between them. A flow is told by its family and its UDP port.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from typing import NamedTuple

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from kernelstate.linux import netns

SECONDS = 120
"""After which a flood ends by itself, whatever became of its test."""
PLACES = {"before": -200, "after": 300}
"""On the node: priorities in the hook postrouting; mangle is at -150, source translation at 100."""


class Stream(NamedTuple):
    """One flow, all of whose packets are the same; ``space`` and ``link`` are where it is sent, ``gateway`` is the MAC there."""

    space: str
    link: str
    gateway: str
    source: str
    destination: str
    port: int

    @property
    def family(self) -> int:
        return ip_address(self.source).version

    @property
    def frame(self) -> bytes:
        kind = IP if self.family == 4 else IPv6
        head = Ether(src=mac_of(self.space, self.link), dst=self.gateway) / kind(src=self.source, dst=self.destination)
        return bytes(head / UDP(sport=40000, dport=self.port) / Raw(b"flood"))


def mac_of(space: str, link: str) -> str:
    """Return a link's MAC."""
    with netns.inside(space), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as own:
        own.bind((link, 0))
        return own.getsockname()[4].hex(":")


@contextmanager
def flood(streams: list[Stream]) -> Iterator[None]:
    """Send a frame of each stream in turn, as fast as one process can, until the block ends."""
    with ExitStack() as undo:
        sending = []
        for stream in streams:
            with netns.inside(stream.space):
                wire = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
                wire.bind((stream.link, 0))
            sending.append((wire, stream.frame))
        pid = os.fork()
        if not pid:
            try:
                _send(sending)
            finally:
                os._exit(1)
        try:
            yield
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the flood ended by itself"
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _send(sending: list[tuple[socket.socket, bytes]]) -> None:
    """Send for ever; SIGALRM ends the process where nobody else does."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    while True:
        for wire, frame in sending:
            wire.send(frame)


# -- counting ----------------------------------------------------------------------------------------------------------


def watch_node(node: str, streams: list[Stream]) -> None:
    """Begin to count on the node, in front of policies and behind them."""
    chains = [
        f"chain {place} {{ type filter hook postrouting priority {priority}; {_counting(streams, '')}\n}}"
        for place, priority in PLACES.items()
    ]
    _load(node, chains)


def watch_pod(pod: str, streams: list[Stream]) -> None:
    """Begin to count what comes in at a pod; nobody there sees it, so nobody answers."""
    _load(pod, [f"chain arrived {{ type filter hook prerouting priority -300; {_counting(streams, ' drop')}\n}}"])


def counted(space: str) -> Mapping[str, Mapping[tuple[int, int], int]]:
    """Return how many packets each chain has counted, by family and port."""
    found: dict[str, dict[tuple[int, int], int]] = {}
    for item in json.loads(netns.run(space, ["nft", "-j", "list", "table", "inet", "watch"]))["nftables"]:
        rule = item.get("rule")
        if rule:
            family, port = map(int, rule["comment"].split())
            packets = next(one["counter"]["packets"] for one in rule["expr"] if "counter" in one)
            found.setdefault(rule["chain"], {})[family, port] = packets
    return found


def _counting(streams: list[Stream], verdict: str) -> str:
    kinds = {(one.family, one.port) for one in streams}
    return "\n".join(
        f'meta nfproto ipv{family} udp sport 40000 udp dport {port} counter{verdict} comment "{family} {port}"'
        for family, port in sorted(kinds)
    )


def _load(space: str, chains: list[str]) -> None:
    netns.run(space, ["nft", "-f", "-"], stdin="table inet watch {{\n{}\n}}".format("\n".join(chains)))
