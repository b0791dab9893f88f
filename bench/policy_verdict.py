"""``policy-verdict``: what a packet costs the node's kernel where pods are isolated, by the number of policies and of their peers.

    new                 the first packet of an allowed connection, always from the client that was let in last
    new, any client     the same from up to 1,024 clients in turn: what is looked up has to come from memory
    established         a packet of an open connection from the last client

    one pod      1 ... 10,000 policies that all select one pod, each lets one client in
    full node    as many, spread over 110 pods
    peers        one policy that lets 10 ... 10,000 pods in
    blocks       one policy that lets 10 ... 10,000 address blocks in

Clusters are those of ``policies.py``, ways to write policies those of ``policy_layouts.py``. Each way, cluster and size is a node of
its own between two links (``injection.py``); all exist at the same time and are measured in turn, round after round; a figure is
the minimum of the rounds. Between two runs the node's connection table is emptied. A packet that does not arrive at the
pod it was sent to ends the benchmark, and so does one from a stranger that arrives.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from bench import cluster, policies
from bench.injection import DESTINATIONS, Clients, Injector, Road, Sent, Target, open_injector, open_road
from bench.kernel import may_use_kernel
from bench.packet_cost import least, pinned
from bench.policies import BLOCK_STRIDE, PODS, PORT, client_address, server_address
from bench.policy_layouts import CHAINS, CONNTRACK, NONE, Layout, layouts_here, program, track, write_chains
from bench.result import Options, Param, Row, against, median
from kernelstate.errors import KernelStateError
from kernelstate.linux import netns, sysctl
from nodeplane.commands import Failed

POLICIES = (1, 100, 1_000, 10_000)
PEERS = (10, 100, 1_000, 10_000)
ROUNDS = 7
BUDGET = 40.0
"""Milliseconds of CPU that one run should take: as many packets as fit, within these limits."""
FEWEST, MOST = 512, 60_000
_WARM_UP = 256
_PATIENCE = 0.1
"""Seconds until a packet that should not arrive is believed not to: it would within microseconds."""
MOST_CHAINS = 1_000
"""Policies up to which *chain per policy* is measured: what it costs is clear by then."""
NEW, ANY, ESTABLISHED = "new", "new, any client", "established"


class World(msgspec.Struct, frozen=True):
    """A kind of cluster. Its sizes are numbers of ``unit``; client k meets pod k % ``pods``."""

    name: str
    unit: str
    objects: Callable[[int], Iterator[cluster.Raw]]
    pods: int = 1
    stride: int = 1


ONE_POD = World("one pod", "policies", policies.one_pod)
NODE = World("full node", "policies", policies.full_node, pods=PODS)
PEERS_WORLD = World("peers", "peers", policies.peers)
BLOCKS = World("blocks", "blocks", policies.blocks, stride=BLOCK_STRIDE)
WORLDS = (ONE_POD, NODE, PEERS_WORLD, BLOCKS)

TARGETS = {"nftables": 1.2, "iptables": 1.5, "iptables-nft": 1.5}
"""A new connection at the largest number of policies to one at the smallest, at most."""
ESTABLISHED_TARGET = 1.05


class Lane(msgspec.Struct):
    """One node under measurement: what it is, where, and what every run found. ``world`` None: no policies."""

    layout: Layout
    road: Road
    world: World | None = None
    size: int = 1
    counts: dict[str, int] = {}
    runs: dict[str, list[Sent]] = {}


def measure(
    options: Options,
    *,
    rounds: int = ROUNDS,
    budget: float = BUDGET,
    sizes: Sequence[int] = POLICIES,
    peers: Sequence[int] = PEERS,
    worlds: Sequence[World] = WORLDS,
) -> list[Row]:
    """Measure every way asked for at every size. Raises Failed."""
    if not may_use_kernel():
        raise Failed("policy-verdict: making network namespaces and injecting packets needs root")
    layouts = layouts_here("policy-verdict", options.modes)
    try:
        with open_injector() as injector, contextlib.ExitStack() as undo:
            lanes = [_open(undo, injector, NONE), _open(undo, injector, CONNTRACK)]
            track(lanes[1].road.node)
            for world in worlds:
                for size in sizes if world.unit == "policies" else peers:
                    lanes += _lanes(undo, injector, layouts, world, size)
            with pinned():
                _measure(injector, lanes, rounds, budget)
    except KernelStateError as error:
        raise Failed(f"policy-verdict: {error}") from error
    return _rows(lanes)


# -- nodes -------------------------------------------------------------------------------------------------------------


def _open(undo: contextlib.ExitStack, injector: Injector, layout: Layout, world: World | None = None, size: int = 1) -> Lane:
    address = cluster.node(1)["status"]["addresses"][0]["address"]
    return Lane(layout, undo.enter_context(open_road(injector, f"{address}/32")), world, size)


def _lanes(
    undo: contextlib.ExitStack, injector: Injector, layouts: Sequence[Layout], world: World, size: int
) -> Iterator[Lane]:
    """Open a node for each way to write such a cluster's policies."""
    with tempfile.TemporaryDirectory(prefix="nodeplane-bench-") as directory:
        objects = Path(directory) / "objects"
        objects.mkdir()
        policies.write(objects / "cluster.json", world.objects(size))
        for layout in layouts:
            lane = _open(undo, injector, layout, world, size)
            program(lane.road.node, layout, objects)
            yield lane
    if world is ONE_POD and size <= MOST_CHAINS:
        lane = _open(undo, injector, CHAINS, world, size)
        write_chains(lane.road.node, 1, size)
        yield lane


# -- traffic -----------------------------------------------------------------------------------------------------------


def _last(lane: Lane) -> tuple[Target, Clients]:
    """Return the pod and the client of the policy, or the peer, that came last."""
    world, k = lane.world or ONE_POD, lane.size - 1
    return _to([k % world.pods]), Clients(client_address(k * world.stride), bits=0)


def _any(lane: Lane) -> tuple[Target, Clients]:
    """Return up to 1,024 clients, each with the pod that lets it in: a power of two, so that the two stay together."""
    world = lane.world or ONE_POD
    bits = min(lane.size, DESTINATIONS).bit_length() - 1
    return _to([j % (1 << bits) % world.pods for j in range(DESTINATIONS)]), Clients(bits=bits, stride=world.stride)


def _to(servers: Sequence[int]) -> Target:
    addresses = tuple(server_address(n) for n in servers)
    return Target(addresses, PORT, min(addresses), max(addresses), PORT)


def _run(injector: Injector, lane: Lane, traffic: str, count: int) -> Sent:
    """Send packets of a kind on an empty connection table. Raises Failed when one does not arrive where it should."""
    netns.run(lane.road.node, ["conntrack", "-F"])
    target, clients = _any(lane) if traffic == ANY else _last(lane)
    if traffic == ESTABLISHED:
        number = injector.establish(lane.road, target, clients)
        sent = injector.established(lane.road, target, number, count, clients)
    else:
        sent = injector.new_flows(lane.road, target, count, clients)
    if sent.lost or sent.elsewhere:
        words = f"{sent.lost} of {count} packets did not arrive, {sent.elsewhere} arrived elsewhere"
        raise Failed(f"policy-verdict: {lane.layout.name}, {_params(lane)}, {traffic}: {words}")
    return sent


def _expect_isolation(injector: Injector, lane: Lane) -> None:
    """Raise Failed when a client that nobody lets in reaches the pod: then it is not policies that are measured."""
    target, _ = _last(lane)
    stranger = Clients(client_address(-1), bits=0)
    if injector.new_flows(lane.road, target, 1, stranger, patience=_PATIENCE).arrived:
        raise Failed(f"policy-verdict: {lane.layout.name}, {_params(lane)}: pods are not isolated")


def _measure(injector: Injector, lanes: Sequence[Lane], rounds: int, budget: float) -> None:
    """Run everything once to see how many packets to send and to warm up, then round after round."""
    for lane in lanes:
        if lane.world is not None:
            _expect_isolation(injector, lane)
        with netns.inside(lane.road.node):
            room = int(sysctl.read("net.netfilter.nf_conntrack_max")) // 4
        for traffic in (NEW, ANY, ESTABLISHED):
            each = _run(injector, lane, traffic, _WARM_UP).each
            lane.counts[traffic] = max(FEWEST, min(MOST, room, int(budget * 1e6 / each)))
    for _ in range(rounds):
        for lane in lanes:
            for traffic, count in lane.counts.items():
                lane.runs.setdefault(traffic, []).append(_run(injector, lane, traffic, count))


# -- figures -----------------------------------------------------------------------------------------------------------


def _rows(lanes: Sequence[Lane]) -> list[Row]:
    rows = []
    for traffic in (NEW, ANY, ESTABLISHED):
        bare = least(lanes[0].runs[traffic])
        for lane in lanes:
            row = Row(traffic, lane.layout.mode, _params(lane), "CPU per packet", least(lane.runs[traffic]), "ns")
            rows.append(row if lane is lanes[0] else against(row, bare, "none"))
        rows += _growth(lanes, traffic)
    spread = max(median([s.each for s in runs]) / least(runs) for lane in lanes for runs in lane.runs.values())
    return [*rows, Row("noise", "none", {}, "median of rounds to minimum, at most", spread, "times")]


def _growth(lanes: Sequence[Lane], traffic: str) -> Iterator[Row]:
    """Compare the largest size of each way and cluster with its smallest."""
    for world in WORLDS:
        own = [lane for lane in lanes if lane.world is world]
        for layout in dict.fromkeys(lane.layout for lane in own):
            first, *_, last = (lane for lane in own if lane.layout is layout) if _sizes(own, layout) > 1 else (None, None)
            if first is None or last is None:
                continue
            growth = least(last.runs[traffic]) / least(first.runs[traffic])
            params = _params(last)
            if layout.mode != "none" and world.unit == "policies":
                params["at most"] = ESTABLISHED_TARGET if traffic == ESTABLISHED else TARGETS[layout.name]
            yield Row(traffic, layout.mode, params, f"growth from {first.size}", growth, "times")


def _sizes(lanes: Sequence[Lane], layout: Layout) -> int:
    return sum(lane.layout is layout for lane in lanes)


def _params(lane: Lane) -> dict[str, Param]:
    found: dict[str, Param] = {"way": lane.layout.name}
    return found if lane.world is None else found | {"cluster": lane.world.name, lane.world.unit: lane.size}
