"""A node between two links, and TCP packets made in the kernel that come in through one and should leave through the other.

          node namespace                                          far namespace: nobody answers here
    generate --> in  ================================ in-far  --> count, drop      clients 10.240.0.0/16
                  | conntrack, NAT, filter, routing                                 (pods of other nodes, to the node)
                 out ================================ out-far --> count, drop      endpoints, everything else

What is programmed in the node is the caller's business. The cost of a run is the CPU time of the thread that injects, from the
frame's making to its being counted behind the node; ``Sent`` also says how many arrived where they should, for a packet that
was lost or went elsewhere costs something else.

Packets are real enough for conntrack: sequence numbers and checksums fit, so ``establish`` leaves a flow that is ESTABLISHED, as
TCP's handshake does. Not measured: making the socket buffer on a real network card, checksum offload, segmentation offload.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path

import msgspec

from bench.bpf import Generator, build
from kernelstate.errors import KernelRefusedError
from kernelstate.linux import netns

SOURCE = Path(__file__).parent / "injector" / "flows.bpf.c"
PLAN = struct.Struct("=54sBBB3xIIII4096s")
DESTINATIONS = 1024
SEEN = struct.Struct("=QQIIII")
_FRAME = 54

IN_MAC, IN_FAR_MAC, OUT_MAC, OUT_FAR_MAC = ("02:4e:50:00:00:0" + digit for digit in "1234")
FIRST_CLIENT = int(IPv4Address("10.240.1.0"))
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
_CLIENT_SEQUENCE, _SERVER_SEQUENCE = 1_000_000, 2_000_000
_DELAY = 1.0
"""Seconds until packets on their way are given up."""
_LINKS_UP = 20.0
"""Seconds until links that do not come up are given up; the kernel notes it within one, on a busy machine in two."""


class Target(msgspec.Struct, frozen=True):
    """Where packets are sent, and where they should arrive: at an address from ``first`` to ``last`` and a port.

    New flows take up to 1,024 ``addresses`` in turn.
    """

    addresses: tuple[int, ...]
    port: int
    first: int
    last: int
    arrival_port: int


class Clients(msgspec.Struct, frozen=True):
    """Where packets come from: 2^``bits`` addresses (2^10 at most) in turn, ``stride`` apart; each has 64,000 ports."""

    first: int = FIRST_CLIENT
    bits: int = 8
    stride: int = 1

    def flow(self, number: int) -> tuple[int, int]:
        """Return address and port of a flow, as ``generate`` makes them."""
        return self.first + (number & ((1 << self.bits) - 1)) * self.stride, 1024 + (number >> self.bits) % 64_000


CLIENTS = Clients()


class Sent(msgspec.Struct, frozen=True):
    """One run: CPU time in nanoseconds, packets sent, arrived where they should, and arrived anywhere else."""

    cpu: int
    packets: int
    arrived: int
    elsewhere: int

    @property
    def lost(self) -> int:
        """Packets that did not arrive where they should."""
        return self.packets - self.arrived

    @property
    def each(self) -> float:
        """Nanoseconds a packet."""
        return self.cpu / self.packets


class Road(msgspec.Struct, frozen=True):
    """The two namespaces, by name."""

    node: str
    far: str


@contextlib.contextmanager
def open_road(injector: Injector, address: str) -> Iterator[Road]:
    """Make a node with that own address (``192.168.60.1/32``) between two links; gone afterwards. Raises KernelRefusedError."""
    name = f"np-bench-{os.getpid()}-{secrets.token_hex(3)}"
    with contextlib.ExitStack() as undo:
        road = Road(f"{name}-n", f"{name}-f")
        for one in (road.node, road.far):
            netns.create(one)
            undo.callback(netns.delete, one)
        netns.run(road.node, ["ip", "-batch", "-"], stdin=_links(road, address))
        netns.run(road.far, ["ip", "-batch", "-"], stdin="link set in-far up\nlink set out-far up\n")
        with netns.inside(road.node):
            for setting in ("ip_forward", "conf/in/forwarding", "conf/out/forwarding"):
                Path(f"/proc/sys/net/ipv4/{setting}").write_text("1", encoding="ascii")
            for link in ("all", "in", "out"):
                Path(f"/proc/sys/net/ipv4/conf/{link}/rp_filter").write_text("0", encoding="ascii")
        with netns.inside(road.far):
            for link in ("in-far", "out-far"):
                injector.attach(link)
        _await_links(road)
        yield road


def _await_links(road: Road) -> None:
    """Wait until the node's links have a queue: what is sent before the kernel has noted that they are up is dropped."""
    until = time.monotonic() + _LINKS_UP
    while True:
        links = msgspec.json.decode(netns.run(road.node, ["ip", "-json", "link", "show", "type", "veth"]))
        if all(link["operstate"] == "UP" for link in links):
            return
        if time.monotonic() > until:
            raise KernelRefusedError("set up", f"links of {road.node}", f"not up after {_LINKS_UP:g} s")
        time.sleep(0.01)


def _links(road: Road, address: str) -> str:
    """Return the ``ip -batch`` text for the node's namespace. Neighbours are permanent: nobody answers ARP."""
    return f"""\
link add in address {IN_MAC} type veth peer name in-far address {IN_FAR_MAC} netns {road.far}
link add out address {OUT_MAC} type veth peer name out-far address {OUT_FAR_MAC} netns {road.far}
link set in up
link set out up
address add {address} dev out
neighbour add 10.254.0.1 lladdr {IN_FAR_MAC} nud permanent dev in
neighbour add 10.254.0.2 lladdr {OUT_FAR_MAC} nud permanent dev out
route add 10.240.0.0/16 via 10.254.0.1 dev in onlink
route add default via 10.254.0.2 dev out onlink
"""


class Injector:
    """Makes packets and counts them; use ``open_injector``. One run at a time."""

    def __init__(self, program: Generator) -> None:
        self._program = program
        self._flow = 0
        """Number of the next flow that nobody has used."""

    def attach(self, link: str) -> None:
        """Count and drop what comes in through a link of the current network namespace."""
        self._program.attach_ingress("count", link)

    def new_flows(self, road: Road, target: Target, count: int, clients: Clients = CLIENTS, patience: float = _DELAY) -> Sent:
        """Send the first packet of ``count`` connections, each from another client or port.

        A client always meets the same addresses. ``patience``: seconds until packets on their way are given up.
        """
        frame = _segment(IN_MAC, target.port, SYN, (_CLIENT_SEQUENCE, 0))
        sent = self._send(road, Plan(frame, self._flow, varies=True, clients=clients), target, count, patience)
        self._flow += count
        return sent

    def establish(self, road: Road, target: Target, clients: Clients = CLIENTS) -> int:
        """Open a TCP connection from the next client to ``target``; return the flow's number. Raises RuntimeError.

        A handshake, and a packet each way after it: whoever let it begin past connection tracking has that see both ends now.
        """
        number, self._flow = self._flow, self._flow + 1
        first = _segment(IN_MAC, target.port, SYN, (_CLIENT_SEQUENCE, 0))
        _arrived(self._send(road, Plan(first, number, clients=clients), target, 1), "SYN")
        *_, endpoint = SEEN.unpack(self._program.read("sightings"))
        client, port = clients.flow(number)
        back = Target((client,), port, client, client, port)
        for flags, sequence, name in ((SYN_ACK, _SERVER_SEQUENCE, "SYN, ACK"), (ACK, _SERVER_SEQUENCE + 1, "ACK back")):
            answer = _segment(OUT_MAC, port, flags, (sequence, _CLIENT_SEQUENCE + 1))
            plan = Plan(answer, target.arrival_port - 1024, clients=Clients(endpoint, bits=0), link="out")
            _arrived(self._send(road, plan, back, 1), name)
            _arrived(self.established(road, target, number, 1, clients), "ACK")
        return number

    def established(self, road: Road, target: Target, number: int, count: int, clients: Clients = CLIENTS) -> Sent:
        """Send ``count`` packets of one flow that ``establish`` made."""
        frame = _segment(IN_MAC, target.port, ACK, (_CLIENT_SEQUENCE + 1, _SERVER_SEQUENCE + 1))
        return self._send(road, Plan(frame, number, clients=clients), target, count)

    def _send(self, road: Road, plan: Plan, target: Target, count: int, patience: float = _DELAY) -> Sent:
        self._program.write("plans", plan.pack(target.addresses))
        self._program.write("sightings", SEEN.pack(0, 0, target.first, target.last, target.arrival_port, 0))
        with netns.inside(road.node):
            cpu = self._program.inject("generate", plan.link, _FRAME, count)
        until = time.monotonic() + patience
        while True:
            arrived, elsewhere, *_ = SEEN.unpack(self._program.read("sightings"))
            if arrived + elsewhere >= count or time.monotonic() > until:
                return Sent(cpu, count, arrived, elsewhere)
            time.sleep(0.001)  # ksoftirqd has the rest; the count is read again until it is complete or given up


class Plan(msgspec.Struct, frozen=True):
    """What ``generate`` is told: a frame without addresses, where sources come from, and where packets come in."""

    frame: bytes
    flow: int
    varies: bool = False
    clients: Clients = CLIENTS
    link: str = "in"
    """The node's link through which packets come in."""

    def pack(self, destinations: Sequence[int]) -> bytes:
        """Return ``struct plan``: the frame, the sums over its IP header and over TCP's, and where to, over and over."""
        ip, tcp = self.frame[14:34], self.frame[34:]
        pseudo = struct.pack("!HH", socket.IPPROTO_TCP, len(tcp))
        addresses = [destinations[i % len(destinations)] for i in range(DESTINATIONS)]
        return PLAN.pack(
            self.frame,
            self.varies,
            self.clients.bits,
            self.clients.stride,
            _sum(ip),
            _sum(pseudo + tcp),
            self.clients.first,
            self.flow,
            struct.pack(f"!{DESTINATIONS}I", *addresses),
        )


@contextlib.contextmanager
def open_injector() -> Iterator[Injector]:
    """Build and load the generator and the sink. Raises MissingFeatureError, KernelRefusedError."""
    with (
        tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory,
        Generator(build(SOURCE, Path(directory))) as program,
    ):
        yield Injector(program)


def _arrived(sent: Sent, what: str) -> None:
    if sent.lost:
        raise RuntimeError(f"the handshake's {what} did not arrive where it should")


def _segment(mac: str, port: int, flags: int, numbers: tuple[int, int]) -> bytes:
    """Return an Ethernet frame with an empty TCP segment to a port; addresses, source port and checksums are zero.

    ``numbers`` are those of sequence and acknowledgment.
    """
    ethernet = bytes.fromhex(mac.replace(":", "")) + b"\x02\x4e\x50\0\0\x09" + b"\x08\x00"
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 40, 0, 0x4000, 64, 6, 0, 0, 0)
    tcp = struct.pack("!HHIIBBHHH", 0, port, *numbers, 5 << 4, flags, 65_535, 0, 0)
    return ethernet + ip + tcp


def _sum(data: bytes) -> int:
    """Return the sum of 16-bit words as they lie in memory, not folded (RFC 1071)."""
    return sum(struct.unpack(f"={len(data) // 2}H", data))
