"""``packet-cost``: what a packet costs the node's kernel, by how Services are programmed and how many there are.

    established          a packet of an open connection to a Service
    new                  the first packet of a connection to a Service: the last one of the list for a flat iptables chain, which
                         is its worst case, else one drawn anew for each round
    new, no Service      the first packet of a connection straight to a pod

    forwarding           no rule at all: what routing and two links cost; every ratio is to this
    conntrack            one rule that looks at the connection's state: what tracking connections costs anybody
    iptables flat        KUBE-SERVICES as one list, as kube-proxy has it (dispatchAbove: 0)
    iptables, ipvs, nftables     as the agent programs them unless told otherwise
    ebpf                         rules as with nftables, and the short lane for open connections: both links are marked as pods'

Each datapath and size is a node of its own (``injection.py``), programmed by the real agent, which has ended before anything is
measured. All of them exist at the same time and are measured in turn, round after round; a figure is the minimum of the rounds.
(Up to Linux 6.1 at least, IPVS keeps the virtual servers of all namespaces in one table of 256 lists, so that small sizes are
charged for large ones: IPVS' growth is measured by ``ipvs_in_vm.py``, one size after the other.)
Between any two runs the node's connection table is emptied. A packet that does not arrive where it should ends the benchmark.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import cluster
from bench.injection import DESTINATIONS, Injector, Road, Sent, Target, open_injector, open_road
from bench.kernel import may_use_kernel
from bench.result import Options, Row, against, median
from bench.running import configuration, running_agent
from kernelstate.errors import KernelStateError
from kernelstate.linux import bpf_lane, netns, nftables, sysctl
from kernelstate.linux.iptables import IptablesPort, is_available
from kernelstate.linux.ipvs import has_ipvs
from kernelstate.linux.pod_link import ALIAS
from nodeplane.commands import Failed
from nodeplane.host_kernel import FORWARDER

SIZES = (10, 1_000, 10_000, 50_000)
ROUNDS = 5
BUDGET = 60.0
"""Milliseconds of CPU that one run should take: as many packets as fit, within these limits."""
FEWEST, MOST = 512, 200_000
_WARM_UP = 256
_LONGEST = 300.0
"""Seconds until a first sync is given up: 50,000 Services take a while to read."""


class Datapath(msgspec.Struct, frozen=True):
    """A way to program Services. ``mode`` none: no agent, but ``rules`` for iptables-restore, if any."""

    name: str
    mode: str
    options: Mapping[str, Any] = {}
    rules: str = ""
    asks_last: bool = False
    """Whether the Service asked for is the last of the list instead of any."""


FORWARDING = Datapath("forwarding", "none")
CONNTRACK = Datapath("conntrack", "none", rules="*filter\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n")
DATAPATHS = (
    Datapath("iptables flat", "iptables", {"dispatchAbove": 0}, asks_last=True),
    Datapath("iptables", "iptables"),
    Datapath("ipvs", "ipvs"),
    Datapath("nftables", "nftables"),
    Datapath("ebpf", "ebpf"),
)


class Lane(msgspec.Struct):
    """One node under measurement: what it is, where, and what every run found."""

    datapath: Datapath
    services: int
    road: Road
    counts: dict[str, int] = {}
    runs: dict[str, list[Sent]] = {}
    flow: int = 0


def measure(options: Options, rounds: int = ROUNDS, budget: float = BUDGET, sizes: Sequence[int] = SIZES) -> list[Row]:
    """Measure every mode asked for at every size. Raises Failed."""
    if not may_use_kernel():
        raise Failed("packet-cost: making network namespaces and injecting packets needs root")
    sizes = [options.services] if options.services else sizes
    modes = _modes_here(options.modes)
    try:
        with open_injector() as injector, contextlib.ExitStack() as undo:
            lanes = [open_lane(undo, injector, FORWARDING, 0), open_lane(undo, injector, CONNTRACK, 0)]
            for services in sizes:
                lanes += lanes_of(undo, injector, modes, services)
            with pinned():
                _measure(injector, lanes, rounds, budget)
    except KernelStateError as error:
        raise Failed(f"packet-cost: {error}") from error
    return _rows(lanes)


def _modes_here(modes: Sequence[str]) -> list[str]:
    """Leave out, and name, what this kernel does not have. Raises Failed when nothing is left."""
    tables = nftables.is_available()
    lane = tables and not bpf_lane.unloadable(FORWARDER.parent)
    has = {"iptables": is_available("legacy"), "ipvs": has_ipvs(), "nftables": tables, "ebpf": lane}
    lacking = [mode for mode in modes if not has[mode]]
    if len(lacking) == len(modes):
        raise Failed(f"packet-cost: this kernel has no {' and no '.join(lacking)}")
    for mode in lacking:
        print(f"packet-cost: this kernel has no {mode}, it is left out", file=sys.stderr)
    return [mode for mode in modes if mode not in lacking]


# -- nodes -------------------------------------------------------------------------------------------------------------


def lanes_of(undo: contextlib.ExitStack, injector: Injector, modes: Sequence[str], services: int) -> Iterator[Lane]:
    """Open a node for each way to program so many Services."""
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        objects = Path(directory) / "objects"
        objects.mkdir()
        cluster.write_list(objects / "cluster.json", services)
        for datapath in DATAPATHS:
            if datapath.mode not in modes:
                continue
            lane = open_lane(undo, injector, datapath, services)
            _program(lane, objects)
            yield lane


def open_lane(undo: contextlib.ExitStack, injector: Injector, datapath: Datapath, services: int) -> Lane:
    """Make a node, and load the rules of a datapath without a mode."""
    address = cluster.node(1)["status"]["addresses"][0]["address"]
    lane = Lane(datapath, services, undo.enter_context(open_road(injector, f"{address}/32")))
    if datapath.mode == "ebpf":
        for link in ("in", "out"):
            netns.run(lane.road.node, ["ip", "link", "set", link, "alias", f"{ALIAS}/bench/{link}/eth0"])
    if datapath.rules:
        with netns.inside(lane.road.node):
            IptablesPort("legacy").apply(4, datapath.rules)
    return lane


def _program(lane: Lane, objects: Path) -> None:
    """Let the agent program the node, and end it. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        root = Path(directory)
        (root / "objects").symlink_to(objects)
        config = configuration(lane.datapath.mode, **lane.datapath.options)
        with running_agent(lane.road.node, root, config) as agent:
            agent.wait(agent.is_synced, f"the first sync of {lane.services} Services", _LONGEST)


@contextlib.contextmanager
def pinned() -> Iterator[int]:
    """Keep this thread on one CPU, so that softirqs it raises run in its own system calls."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield max(before)
    finally:
        os.sched_setaffinity(0, before)


# -- traffic -----------------------------------------------------------------------------------------------------------


def _established(injector: Injector, lane: Lane, draw: random.Random, count: int) -> Sent:
    target = to_services([_one(lane, draw)]) if lane.services else TO_POD
    return injector.established(lane.road, target, injector.establish(lane.road, target), count)


def _new(injector: Injector, lane: Lane, draw: random.Random, count: int) -> Sent:
    target = to_services([_one(lane, draw)]) if lane.services else TO_POD
    return injector.new_flows(lane.road, target, count)


def _new_to_any(injector: Injector, lane: Lane, draw: random.Random, count: int) -> Sent:
    target = to_services(draw.choices(range(lane.services), k=DESTINATIONS)) if lane.services else TO_POD
    return injector.new_flows(lane.road, target, count)


def _new_to_pod(injector: Injector, lane: Lane, _draw: random.Random, count: int) -> Sent:
    return injector.new_flows(lane.road, TO_POD, count)


def _one(lane: Lane, draw: random.Random) -> int:
    return lane.services - 1 if lane.datapath.asks_last else draw.randrange(lane.services)


TRAFFIC: dict[str, Callable[[Injector, Lane, random.Random, int], Sent]] = {
    "established": _established,
    "new": _new,
    "new, any Service": _new_to_any,
    "new, no Service": _new_to_pod,
}
"""What is sent, by name; a node without Services sends all to a pod."""


def to_services(indices: Sequence[int]) -> Target:
    """Return the addresses of the Services with these numbers, and the range in which their endpoints are."""
    last = cluster.endpoint_address(max(indices), cluster.ENDPOINTS - 1)
    addresses = tuple(cluster.service_address(i) for i in indices)
    return Target(addresses, 80, cluster.endpoint_address(min(indices), 0), last, 8080)


_POD = cluster.endpoint_address(1 << 19, 0)
TO_POD = Target((_POD,), 8080, first=_POD, last=_POD, arrival_port=8080)
"""A pod behind no Service of any size measured here."""


def _measure(injector: Injector, lanes: Sequence[Lane], rounds: int, budget: float) -> None:
    """Run everything once to see how many packets to send and to warm up, then round after round."""
    draw = random.Random(1)
    for lane in lanes:
        for name in TRAFFIC:
            each = send(injector, lane, name, draw, _WARM_UP).each
            lane.counts[name] = max(FEWEST, min(_most(lane, name), int(budget * 1e6 / each)))
    for _ in range(rounds):
        for lane in lanes:
            for name, count in lane.counts.items():
                lane.runs.setdefault(name, []).append(send(injector, lane, name, draw, count))


def _most(lane: Lane, traffic: str) -> int:
    """Return how many packets a run may have: new connections must fit the table, and leave room in its buckets."""
    if traffic == "established":
        return MOST
    with netns.inside(lane.road.node):
        return min(MOST, int(sysctl.read("net.netfilter.nf_conntrack_max")) // 4)


def send(injector: Injector, lane: Lane, traffic: str, draw: random.Random, count: int) -> Sent:
    """Send packets of a kind on an empty connection table. Raises Failed when a packet does not arrive where it should."""
    netns.run(lane.road.node, ["conntrack", "-F"])
    sent = TRAFFIC[traffic](injector, lane, draw, count)
    if sent.lost or sent.elsewhere:
        words = f"{sent.lost} of {count} packets did not arrive, {sent.elsewhere} arrived elsewhere"
        raise Failed(f"packet-cost: {lane.datapath.name} at {lane.services} Services, {traffic}: {words}")
    return sent


# -- figures -----------------------------------------------------------------------------------------------------------


def _rows(lanes: Sequence[Lane]) -> list[Row]:
    bare = {name: least(runs) for name, runs in lanes[0].runs.items()}
    rows = []
    for name in TRAFFIC:
        for lane in lanes:
            row = Row(name, lane.datapath.mode, _params(lane), "CPU per packet", least(lane.runs[name]), "ns")
            rows.append(against(row, bare[name], "forwarding") if lane is not lanes[0] else row)
        rows += _growth([lane for lane in lanes if lane.services], name)
    spread = max(median([s.each for s in runs]) / least(runs) for lane in lanes for runs in lane.runs.values())
    return [*rows, Row("noise", "none", {}, "median of rounds to minimum, at most", spread, "times")]


def _growth(lanes: Sequence[Lane], traffic: str) -> Iterator[Row]:
    """Compare the largest size of each datapath with its smallest."""
    for datapath in DATAPATHS:
        own = [lane for lane in lanes if lane.datapath is datapath]
        if len(own) > 1:
            first, last = own[0], own[-1]
            growth = least(last.runs[traffic]) / least(first.runs[traffic])
            yield Row(traffic, datapath.mode, _params(last), f"growth from {first.services}", growth, "times")


def _params(lane: Lane) -> dict[str, int | float | str]:
    return {"datapath": lane.datapath.name} | ({"services": lane.services} if lane.services else {})


def least(runs: Sequence[Sent]) -> float:
    """Return the smallest cost of a packet, in nanoseconds."""
    return min(sent.each for sent in runs)
