"""``service-connect``: how long a TCP connect() to a Service takes, to one straight to its pod, at N Services.

    client pod 10.240.0.1 --veth-- node with the real agent, N Services --veth-- server pod, which has the last Service's endpoints
    connect(ClusterIP)    in turn with    connect(pod address)

A veth hands a packet to its peer within the same system call, so what is timed is the whole way there and back, and both pods' TCP, on
one CPU. Every mode has namespaces, and in mode ``ebpf`` a cgroup, of its own; the ways are measured in turn, round after round. A figure
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
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec

from bench import cluster
from bench.kernel import inside_cgroup, may_use_kernel, own_cgroup
from bench.packet_cost import pinned
from bench.result import Options, Row, against, median
from bench.running import RunningAgent, configuration, running_agent
from kernelstate.errors import KernelStateError
from kernelstate.linux import netns
from netnslab import mounts
from nodeplane.commands import Failed

SERVICES = 10_000
MEASURED = ("iptables", "nftables", "ebpf")
ROUNDS = 15
CONNECTS = 300
"""Connections of one round, each way."""
TARGET = 1.15
"""In mode ``ebpf``, to a connection straight to the pod, at most."""
CLIENT = "10.240.0.1"
GATEWAY = "169.254.1.1"
PORT = 8080
LONGEST = 300.0
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that closes by RST: nothing is left in TIME-WAIT."""
_ANSWER = struct.pack("ll", 5, 0)
"""SO_SNDTIMEO: seconds until a connection is given up."""


class Lane(msgspec.Struct):
    """One mode's node with its pods, and each round's medians in microseconds: through the Service, and straight."""

    mode: str
    client: str
    cgroup: Path | None
    server: Any
    """The listening socket."""
    pod: str
    """The address of the first endpoint."""
    service: list[float] = []
    straight: list[float] = []


def measure(options: Options, rounds: int = ROUNDS, connects: int = CONNECTS) -> list[Row]:
    """Measure every mode asked for. Raises Failed."""
    if not may_use_kernel():
        raise Failed("service-connect: making network namespaces needs root")
    modes = [mode for mode in options.modes if mode in MEASURED]
    if not modes:
        raise Failed(f"service-connect: measured in modes {', '.join(MEASURED)} only")
    services = options.services or SERVICES
    place = (str(IPv4Address(cluster.service_address(services - 1))), 80)
    try:
        with contextlib.ExitStack() as undo:
            lanes = [undo.enter_context(_lane(mode, services)) for mode in modes]
            with pinned():
                for lane in lanes:
                    _connect(lane, place, 20)
                for _ in range(rounds):
                    for lane in lanes:
                        lane.straight.append(median(_connect(lane, (lane.pod, PORT), connects)))
                        lane.service.append(median(_connect(lane, place, connects)))
    except KernelStateError as error:
        raise Failed(f"service-connect: {error}") from error
    except OSError as error:
        raise Failed(f"service-connect: a connection failed: {error.strerror or error}") from error
    return [row for lane in lanes for row in _rows(lane, services)]


def _rows(lane: Lane, services: int) -> list[Row]:
    straight = Row("connect", lane.mode, {"services": services, "to": "pod"}, "time, least median", min(lane.straight), "us")
    through = Row("connect", lane.mode, {"services": services, "to": "Service"}, "time, least median", min(lane.service), "us")
    if lane.mode == "ebpf":
        through.params["at most"] = TARGET
    return [straight, against(through, straight.value, "straight to the pod")]


# -- nodes -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lane(mode: str, services: int) -> Iterator[Lane]:
    """Make a node with an agent in sync, its client and its server. Raises Failed."""
    name = f"np-bench-{os.getpid()}-{secrets.token_hex(3)}"
    node, client, server = (f"{name}-{end}" for end in "ncs")
    ends = [str(IPv4Address(cluster.endpoint_address(services - 1, i))) for i in range(cluster.ENDPOINTS)]
    with contextlib.ExitStack() as undo:
        for one in (node, client, server):
            netns.create(one)
            undo.callback(netns.delete, one)
        netns.run(node, ["ip", "-batch", "-"], stdin=_links(client, server, ends))
        for pod, addresses in ((client, [CLIENT]), (server, ends)):
            own = "".join(f"address add {address}/32 dev eth0\n" for address in addresses)
            routes = f"route add {GATEWAY} dev eth0 scope link\nroute add default via {GATEWAY} dev eth0\n"
            netns.run(pod, ["ip", "-batch", "-"], stdin=f"link set eth0 up\n{own}{routes}")
        with netns.inside(node):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
        with netns.inside(server):
            listening = undo.enter_context(socket.create_server(("", PORT), backlog=64))
        cgroup = undo.enter_context(own_cgroup(name)) if mode == "ebpf" else None
        root = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nodeplane-bench-")))
        cluster.write_list(root / "cluster.json", services)
        (root / "objects").mkdir()
        (root / "cluster.json").rename(root / "objects/cluster.json")
        options = {"cgroup": mounts.CGROUP} if cgroup is not None else {}
        agent: RunningAgent = undo.enter_context(running_agent(node, root, configuration(mode, **options), cgroup=cgroup))
        agent.wait(lambda: agent.is_synced(services), "the agent's word that it is in sync", LONGEST)
        yield Lane(mode, client, cgroup, listening, ends[0])


def _links(client: str, server: str, ends: list[str]) -> str:
    routes = "".join(f"route add {end}/32 dev server\n" for end in ends)
    return f"""\
link add client type veth peer name eth0 netns {client}
link add server type veth peer name eth0 netns {server}
link set lo up
link set client up
link set server up
address add {cluster.node_address(1)}/32 dev client
address add {GATEWAY}/32 dev client
address add {GATEWAY}/32 dev server
route add {CLIENT}/32 dev client
{routes}"""


# -- connections -------------------------------------------------------------------------------------------------------


def _connect(lane: Lane, place: tuple[str, int], connects: int) -> list[float]:
    """Connect so many times, one after the other; return what each took in microseconds. Raises OSError."""
    times, clock = [], time.perf_counter_ns
    with inside_cgroup(lane.cgroup), netns.inside(lane.client):
        for _ in range(connects):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _ANSWER)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                started = clock()
                client.connect(place)
                times.append((clock() - started) / 1000)
                lane.server.accept()[0].close()
    return times
