"""``api-sync``: a real agent over an API server: its start, one change, a storm of changes, and doing nothing.

    namespace of its own
      bench.api_server  --HTTP, loopback-->  nodeplane agent --kubeconfig  -->  the kernel's nftables, or iptables
        the lab's own server                     a process as in production        seen from outside: what the kernel tells of commits
        without a lab                                                              (nftables), the number of entries (iptables)

The clock of a change starts when the server has handed the event to its socket, and ends when the kernel has it. A storm is over when
the agent says so, and then the kernel is asked for every endpoint that it brought.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple

from bench import cluster
from bench.api_server import TOKEN
from bench.kernel import may_use_kernel, own_namespace
from bench.result import Options, Row, against, median, p95
from bench.running import LONGEST, RunningAgent, configuration, running_agent
from kernelstate.linux import netns
from kernelstate.linux.iptables import entries
from kernelstate.linux.nft_events import NftEvents
from kernelstate.objects.nftables import TableKey
from nodeplane.commands import Failed

SIZES = (1_000, 10_000)
NODES = 1_000
CHANGES = 10
REST = 1.1
"""Seconds of quiet before a change that comes alone."""
STORM = 1_000
STORM_MS = 1_000
IDLE = 200.0
"""Seconds, at the largest size; two full comparisons of 10,000 Services in mode ``nftables`` are in it."""
TABLE = TableKey(4, "nodeplane")
MEASURED = ("nftables", "iptables")
"""Modes in which it can be seen from outside that the kernel has a change."""


def measure(  # noqa: PLR0917 (the first are what a person names, the rest what a smoke run makes small)
    options: Options,
    sizes: tuple[int, ...] = SIZES,
    changes: int = CHANGES,
    storm: int = STORM,
    idle: float = IDLE,
    nodes: int = NODES,
) -> list[Row]:
    """Measure in each mode that can be, at each size. Raises Failed."""
    if not may_use_kernel():
        raise Failed("api-sync: an agent in a namespace of its own needs root")
    modes = [mode for mode in options.modes if mode in MEASURED]
    if not modes:
        raise Failed(f"api-sync: measured in modes {' and '.join(MEASURED)} only")
    rows: list[Row] = []
    for mode in modes:
        for services in (options.services,) if options.services else sizes:
            rest = idle if services == (options.services or sizes[-1]) else 0.0
            rows += _measure_one(mode, services, min(changes, services), min(storm, services), rest)
        rows += _measure_nodes(mode, options.services or sizes[-1], nodes, changes)
    return rows


class _Rig(NamedTuple):
    """A server and an agent that follows it."""

    namespace: str
    mode: str
    server: _Server
    agent: RunningAgent
    services: int

    def settled(self, endpoints: int) -> None:
        """Wait until the agent says that it is in sync with that many endpoints more than in the beginning."""
        wanted = self.services * cluster.ENDPOINTS + endpoints
        self.agent.wait(
            lambda: self.agent.is_synced(self.services) and self.agent.endpoints() == wanted,
            "the agent's word that it is in sync",
        )


def _measure_one(mode: str, services: int, changes: int, storm: int, idle: float) -> list[Row]:
    def row(name: str, metric: str, value: float, unit: str) -> Row:
        return Row(name, mode, {"services": services}, metric, value, unit)

    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory, own_namespace() as namespace:
        root = Path(directory)
        netns.run(namespace, ["ip", "link", "set", "lo", "up"])
        with _server(namespace, services, 1) as server:
            kubeconfig = _kubeconfig(root, server.port)
            started = time.monotonic()
            with running_agent(namespace, root, configuration(mode), kubeconfig=kubeconfig) as agent:
                rig = _Rig(namespace, mode, server, agent, services)
                rig.settled(0)
                rows = [
                    row("first sync", "from start to kernel", 1000 * (time.monotonic() - started), "ms"),
                    row("first sync", "work", 1000 * agent.cpu(), "ms"),
                    row("first sync", "peak RSS", agent.peak_rss(), "MB"),
                ]
                for name, rest in (("endpoint alone", REST), ("endpoint after endpoint", 0.0)):
                    took = _changes(rig, changes, rest)
                    rows += [
                        row(name, "from event to kernel median", median(took), "ms"),
                        row(name, "from event to kernel p95", p95(took), "ms"),
                    ]
                length, behind, work = _storm(rig, storm)
                rows += [
                    against(row("storm", "from first event to done", length, "ms"), STORM_MS, "the storm itself"),
                    row("storm", "from last event to done", behind, "ms"),
                    row("storm", "work", work, "ms"),
                    *([row("idle", "CPU of a core", _idle(agent, idle), "%")] if idle else []),
                    row("afterwards", "peak RSS", agent.peak_rss(), "MB"),
                ]
    return rows


def _measure_nodes(mode: str, services: int, nodes: int, changes: int) -> list[Row]:
    """Measure an agent that has the overlay besides, among so many nodes."""

    def row(name: str, metric: str, value: float, unit: str) -> Row:
        return Row(name, mode, {"services": services, "nodes": nodes}, metric, value, unit)

    overlay = {"Network": "10.128.0.0/9", "Backend": {"Type": "vxlan"}}
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory, own_namespace() as namespace:
        root = Path(directory)
        for words in (
            "link set lo up",
            "link add eth0 type veth peer name far0",
            f"address add {cluster.node_address(1)}/22 dev eth0",
            "link set eth0 up",
            "link set far0 up",
        ):
            netns.run(namespace, ["ip", *words.split()])
        with _server(namespace, services, nodes) as server:
            kubeconfig, started = _kubeconfig(root, server.port), time.monotonic()
            with running_agent(namespace, root, {**configuration(mode), "overlay": overlay}, kubeconfig=kubeconfig) as agent:

                def peers(count: int) -> None:
                    agent.wait(lambda: agent.is_synced(services) and agent.peers() == count, f"{count} peers")

                peers(nodes - 1)
                took = 1000 * (time.monotonic() - started)
                rows = [row("first sync with nodes", "from start to kernel", took, "ms")]
                joins = []
                for _ in range(changes):
                    for count in (nodes, nodes - 1):
                        time.sleep(REST)
                        at = server.order("node")
                        peers(count)
                        joins.append(1000 * (time.monotonic() - at))
                return [
                    *rows,
                    row("node joins or leaves", "from event to status median", median(joins), "ms"),
                    row("node joins or leaves", "from event to status p95", p95(joins), "ms"),
                    row("afterwards with nodes", "peak RSS", agent.peak_rss(), "MB"),
                ]


def _changes(rig: _Rig, changes: int, rest: float) -> list[float]:
    """Add an endpoint to a Service and take it away again, in turn at Services spread over all; return milliseconds of each.

    ``rest``: seconds of quiet before each.
    """
    took: list[float] = []
    seen = _Commits(rig.namespace) if rig.mode == "nftables" else _Counts(rig.namespace)
    for i in range(changes):
        for endpoints in (1, 0):
            time.sleep(rest)
            seen.forget()
            at = rig.server.order(f"endpoint {i * rig.services // changes}")
            took.append(1000 * (seen.next() - at))
            rig.settled(endpoints)
    return took


def _storm(rig: _Rig, storm: int) -> tuple[float, float, float]:
    """Let a slice after the other change; return milliseconds from the first event and from the last until all is there, and of work.

    Raises Failed if a change is missing in the end.
    """
    first, cpu = time.monotonic(), rig.agent.cpu()
    last = rig.server.order(f"storm {storm} {STORM_MS}")
    rig.settled(storm)
    now, used = time.monotonic(), rig.agent.cpu() - cpu
    listing = ["nft", "list", "table", "ip", "nodeplane"] if rig.mode == "nftables" else ["iptables-legacy-save", "-t", "nat"]
    words = set(re.findall(r"[0-9.]+", netns.run(rig.namespace, listing, timeout=LONGEST)))
    missing = [i for i in range(storm) if str(IPv4Address(cluster.endpoint_address(i, cluster.ENDPOINTS))) not in words]
    if missing:
        raise Failed(f"api-sync: {len(missing)} of {storm} changes are not in the kernel")
    return 1000 * (now - first), 1000 * (now - last), 1000 * used


def _idle(agent: RunningAgent, seconds: float) -> float:
    """Return the share of a core, in percent, that the agent uses while nothing happens."""
    cpu, start = agent.cpu(), time.monotonic()
    time.sleep(seconds)
    return 100 * (agent.cpu() - cpu) / (time.monotonic() - start)


# -- what is seen of the kernel -------------------------------------------------------------------------------------------


class _Commits:
    """Commits to our table, as the kernel tells of them."""

    def __init__(self, namespace: str) -> None:
        with netns.inside(namespace):
            self._events = NftEvents()

    def forget(self) -> None:
        """Pass over what has been told so far; one change may take two commits."""
        self._events.drain([TABLE])

    def next(self) -> float:
        """Wait for the next; return when it was told. Raises Failed."""
        while select.select([self._events], [], [], LONGEST)[0]:
            at = time.monotonic()
            touched = self._events.drain([TABLE])
            if touched is None or touched:
                return at
        raise Failed(f"api-sync: no change came to the kernel within {LONGEST:g} s")


class _Counts:
    """The number of entries of iptables' nat table, asked every millisecond."""

    def __init__(self, namespace: str) -> None:
        self._namespace, self._known = namespace, 0

    def forget(self) -> None:
        """Begin with the number that is."""
        with netns.inside(self._namespace):
            self._known = entries(4, "nat")

    def next(self) -> float:
        """Wait until it is another; return when. Raises Failed."""
        end = time.monotonic() + LONGEST
        with netns.inside(self._namespace):
            while time.monotonic() < end:
                if entries(4, "nat") != self._known:
                    return time.monotonic()
                time.sleep(0.001)
        raise Failed(f"api-sync: no change came to the kernel within {LONGEST:g} s")


# -- the server ------------------------------------------------------------------------------------------------------------


class _Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = int(self._line())

    def order(self, words: str) -> float:
        """Have something happen; return when the last of it was handed to the sockets, on the monotonic clock."""
        assert self._process.stdin is not None
        print(words, file=self._process.stdin, flush=True)
        return float(self._line().split()[0])

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], LONGEST)[0] or not (line := self._process.stdout.readline()):
            raise Failed("api-sync: its server does not answer")
        return line


@contextmanager
def _server(namespace: str, services: int, nodes: int) -> Iterator[_Server]:
    process = netns.popen(
        namespace,
        [sys.executable, "-m", "bench.api_server", str(services), str(nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _Server(process)
    finally:
        process.kill()
        process.communicate()


def _kubeconfig(root: Path, port: int) -> Path:
    entry = {"cluster": "bench", "user": "bench"}
    path = root / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "bench", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "bench", "user": {"token": TOKEN}}],
                "contexts": [{"name": "bench", "context": entry}],
                "current-context": "bench",
            }
        )
    )
    return path
