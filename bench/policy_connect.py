"""``policy-connect``: how long a TCP connect() takes between two pods, through a node with and without policies.

    client pod 10.240.2.42 --veth-- node --veth-- server pod, the last of 110
    connect(): SYN --> routed, judged --> SYN, ACK --> routed --> returns; then reset and closed, by both

    none, conntrack, nftables, iptables, iptables-nft, chain per policy     ``policy_layouts.py``

The cluster is *crowded* of ``policies.py``: 300 policies that all select the server, of which the last lets the client in. A veth hands
a packet to its peer within the same system call, so what is timed is the whole way there and back, and the pods' TCP, on one CPU.
Every way has three namespaces of its own; all exist at the same time and are measured in turn, round after round. A figure
is the smallest of the rounds' medians.
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

from bench import policies
from bench.kernel import may_use_kernel
from bench.packet_cost import pinned
from bench.policies import PODS, PORT, client_address, server_address
from bench.policy_layouts import CHAINS, CONNTRACK, NONE, Layout, layouts_here, program, track, write_chains
from bench.result import Options, Param, Row, against, median
from kernelstate.errors import KernelStateError
from kernelstate.linux import netns
from nodeplane.commands import Failed

POLICIES = 300
ROUNDS = 15
CONNECTS = 300
"""Connections of one round."""
TARGET = 1.3
"""To no policy at all, at most."""
GATEWAY = "169.254.1.1"
"""What pods send to; the node answers on every link for each of its addresses."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that closes by RST: nothing is left in TIME-WAIT."""
_ANSWER = struct.pack("ll", 5, 0)
"""SO_SNDTIMEO: seconds until a connection is given up; a socket with Python's own time-out would not block in connect()."""
_REFUSED = 0.2
"""Seconds until a stranger's connection is believed to be dropped."""


class Lane(msgspec.Struct):
    """One node with its two pods: how policies are written there, the namespaces, and each round's median in microseconds."""

    layout: Layout
    node: str
    client: str
    server: str
    rounds: list[float] = []


def measure(options: Options, rounds: int = ROUNDS, connects: int = CONNECTS, number: int = POLICIES) -> list[Row]:
    """Measure every way asked for. Raises Failed."""
    if not may_use_kernel():
        raise Failed("policy-connect: making network namespaces needs root")
    layouts = [NONE, CONNTRACK, *layouts_here("policy-connect", options.modes), CHAINS]
    try:
        with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory, contextlib.ExitStack() as undo:
            objects = Path(directory) / "objects"
            objects.mkdir()
            policies.write(objects / "cluster.json", policies.crowded(number))
            lanes = [Lane(layout, *undo.enter_context(_open(client_address(number - 2)))) for layout in layouts]
            listening = [undo.enter_context(_listen(lane)) for lane in lanes]
            for lane in lanes:
                _write(lane, objects, number)
            with pinned():
                for lane, server in zip(lanes, listening, strict=True):
                    _check(lane, server, number)
                for _ in range(rounds):
                    for lane, server in zip(lanes, listening, strict=True):
                        lane.rounds.append(median(_connect(lane, server, connects)))
    except KernelStateError as error:
        raise Failed(f"policy-connect: {error}") from error
    except OSError as error:
        raise Failed(f"policy-connect: a connection that policies allow failed: {error.strerror or error}") from error
    return _rows(lanes, number)


# -- nodes -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(client: int) -> Iterator[tuple[str, str, str]]:
    """Make a node and two pods; return their namespaces. The client has a second address, which nobody lets in."""
    name = f"np-bench-{os.getpid()}-{secrets.token_hex(3)}"
    node, client_pod, server_pod = f"{name}-n", f"{name}-c", f"{name}-s"
    with contextlib.ExitStack() as undo:
        for one in (node, client_pod, server_pod):
            netns.create(one)
            undo.callback(netns.delete, one)
        netns.run(node, ["ip", "-batch", "-"], stdin=_node_links(client_pod, server_pod, IPv4Address(client)))
        for pod, addresses in ((client_pod, (client, client_address(-1))), (server_pod, (server_address(PODS - 1),))):
            own = "".join(f"address add {IPv4Address(address)}/32 dev eth0\n" for address in addresses)
            routes = f"route add {GATEWAY} dev eth0 scope link\nroute add default via {GATEWAY} dev eth0\n"
            netns.run(pod, ["ip", "-batch", "-"], stdin=f"link set eth0 up\n{own}{routes}")
        with netns.inside(node):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
        yield node, client_pod, server_pod


def _node_links(client_pod: str, server_pod: str, client: IPv4Address) -> str:
    return f"""\
link add client type veth peer name eth0 netns {client_pod}
link add server type veth peer name eth0 netns {server_pod}
link set client up
link set server up
address add 192.168.60.1/32 dev client
address add {GATEWAY}/32 dev client
route add {client}/32 dev client
route add {IPv4Address(client_address(-1))}/32 dev client
route add {IPv4Address(server_address(PODS - 1))}/32 dev server
"""


def _write(lane: Lane, objects: Path, number: int) -> None:
    if lane.layout is CONNTRACK:
        track(lane.node)
    elif lane.layout is CHAINS:
        write_chains(lane.node, PODS, number - 1)
    elif lane.layout is not NONE:
        program(lane.node, lane.layout, objects)


# -- connections -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _listen(lane: Lane) -> Iterator[socket.socket]:
    with netns.inside(lane.server):
        server = socket.create_server((str(IPv4Address(server_address(PODS - 1))), PORT), backlog=64)
    with server:
        yield server


def _connect(lane: Lane, server: socket.socket, connects: int) -> list[float]:
    """Connect so many times, one after the other; return what each took in microseconds. Raises OSError."""
    place, times = server.getsockname(), []
    clock = time.perf_counter_ns
    with netns.inside(lane.client):
        for _ in range(connects):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _ANSWER)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                started = clock()
                client.connect(place)
                times.append((clock() - started) / 1000)
                server.accept()[0].close()
    return times


def _check(lane: Lane, server: socket.socket, number: int) -> None:
    """Warm up, and raise Failed when a client that nobody lets in gets through: then it is not policies that are measured."""
    _connect(lane, server, 20)
    if lane.layout in {NONE, CONNTRACK}:
        return
    with netns.inside(lane.client), socket.socket() as stranger:
        stranger.settimeout(_REFUSED)
        stranger.bind((str(IPv4Address(client_address(-1))), 0))
        with contextlib.suppress(TimeoutError, ConnectionRefusedError):
            stranger.connect(server.getsockname())
            raise Failed(f"policy-connect: {lane.layout.name}: {number} policies do not isolate the server")


# -- figures -----------------------------------------------------------------------------------------------------------


def _rows(lanes: Sequence[Lane], number: int) -> list[Row]:
    bare, tracked, rows = min(lanes[0].rounds), min(lanes[1].rounds), []
    for lane in lanes:
        has_policies = lane.layout not in {NONE, CONNTRACK}
        params: dict[str, Param] = {"way": lane.layout.name}
        if has_policies:
            params["policies"] = number
        row = Row("connect", lane.layout.mode, params, "time, least median", min(lane.rounds), "us")
        if lane.layout.mode != "none":
            row.params["at most"] = TARGET
        rows.append(row if lane is lanes[0] else against(row, bare, "none"))
    rows += [
        Row("connect", lane.layout.mode, {"way": lane.layout.name}, "to conntrack", min(lane.rounds) / tracked, "times")
        for lane in lanes[2:]
    ]
    spread = max(median(lane.rounds) / min(lane.rounds) for lane in lanes)
    return [*rows, Row("noise", "none", {}, "median of rounds to least, at most", spread, "times")]
