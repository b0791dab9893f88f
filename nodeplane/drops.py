"""``nodeplane drops``: packets that the kernel drops on this machine, why, where, and of which flow, as it happens.

    skb:kfree_skb in the kernel --> counters by reason, place, link, flow --> once a second here: names instead of numbers --> a line each

Namespaces are named as ``ip netns`` has them, addresses as the objects do where some are given. Ends with a summary, which says what
to look at for each reason. With ``--latency`` it ends with histograms as well. Needs root and nothing that runs already.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from clusterstate.snapshot import Snapshot
from clusterstate.sources.tree import SourceError
from kernelstate.errors import KernelStateError
from kernelstate.linux import netns
from kernelstate.linux.droptrace import Drop, DropTrace, Latency
from nodeplane.cluster_source import ClusterSource, open_source
from nodeplane.commands import Failed, Usage
from nodeplane.config import NodeConfig

HINTS = {
    "NETFILTER_DROP": "a rule of iptables or nftables: a NetworkPolicy, source ranges of a Service, no local endpoint; `nodeplane explain`",
    "NO_SOCKET": "nobody listens there: has the pod started, is it the right port?",
    "IP_RPFILTER": "the way back to the source is over another link: sysctl rp_filter",
    "IP_OUTNOROUTES": "no route to there: `ip route`, and `nodeplane status` for the other nodes",
    "IP_INNOROUTES": "no route to there: `ip route`, and `nodeplane status` for the other nodes",
    "NEIGH_FAILED": "the next hop has no MAC address: is that node, or that pod, there?",
    "NEIGH_QUEUEFULL": "the next hop has no MAC address yet, and more packets wait for it than may",
    "TCP_CSUM": "a wrong checksum: checksum offload of a link on the way",
    "UDP_CSUM": "a wrong checksum: checksum offload of a link on the way",
    "SKB_CSUM": "a wrong checksum: checksum offload of a link on the way",
    "PKT_TOO_BIG": "larger than the way's MTU: of the pod's link and of the overlay's",
    "OTHERHOST": "not for this host's MAC address: a stale neighbour or forwarding entry",
    "TC_INGRESS": "a BPF program or filter where packets come in",
    "TC_EGRESS": "a BPF program or filter where packets go out",
    "XDP": "an XDP program",
    "SOCKET_RCVBUFF": "a program reads too slowly",
    "TCP_LISTEN_OVERFLOW": "a program accepts connections too slowly",
    "QUEUE_PURGE": "a socket was closed with data in its queue: usual",
    "CPU_BACKLOG": "this CPU has too many packets waiting: net.core.netdev_max_backlog",
    "FULL_RING": "a link's queue is full: its other end is too slow",
    "QDISC_DROP": "a link's queueing discipline: its queue is full",
}
USUAL_PLACES = "ff02:"
"""Neighbours' and routers' groups, where most of what is sent is for somebody else."""
SHOWN_PLACES = 5
"""Destinations whose connections are drawn."""
HEAD = f"{'time':<9}{'packets':>8}  {'reason':<20} {'in':<28} {'link':<16} {'flow':<60} where"


class Shown(msgspec.Struct, frozen=True):
    """A drop with names; the form of ``-o json``, a line each. ``at``: seconds since the epoch."""

    at: float
    netns: str
    drop: Drop
    source_name: str = ""
    destination_name: str = ""


def run(args: argparse.Namespace) -> int:
    """Show drops until the time is over or somebody stops it. Raises Usage, Failed."""
    if args.every <= 0:
        raise Usage(f"--every: must be greater than 0, is {args.every:g}")
    if args.seconds is not None and args.seconds <= 0:
        raise Usage(f"--for: must be greater than 0, is {args.seconds:g}")
    if args.netns and args.netns != "host" and not netns.exists(args.netns):
        raise Usage(f"--netns: no network namespace {args.netns!r}")
    names = _Names(_source(args))
    try:
        trace = DropTrace(latency=args.latency)
    except KernelStateError as error:
        raise Failed(f"drops: {error}") from error
    try:
        totals = _follow(trace, names, args)
        if args.output == "text":
            print("\n".join(_summary(totals, list(trace.latencies()))), flush=True)
        elif args.latency:
            for one in trace.latencies():
                print(msgspec.json.encode(one).decode(), flush=True)
    finally:
        trace.close()
        names.close()
    return 0


def _follow(trace: DropTrace, names: _Names, args: argparse.Namespace) -> Counter[str]:
    """Print what is dropped, every so often; return the packets by reason."""
    stopped = _stopping()
    totals: Counter[str] = Counter()
    end = time.monotonic() + args.seconds if args.seconds is not None else float("inf")
    if args.output == "text":
        print(HEAD, flush=True)
    while not stopped.is_set() and (left := end - time.monotonic()) > 0:
        stopped.wait(min(args.every, left))
        names.refresh()
        for drop in trace.read():
            place = names.namespace(drop.netns)
            if (args.netns and place != args.netns) or (args.reason and drop.reason != args.reason):
                continue
            if not args.all and is_usual(drop):
                totals[""] += drop.packets
                continue
            totals[drop.reason] += drop.packets
            shown = Shown(time.time(), place, drop, names.of(drop.source), names.of(drop.destination))
            print(msgspec.json.encode(shown).decode() if args.output == "json" else line_of(shown), flush=True)
    return totals


def is_usual(drop: Drop) -> bool:
    """Whether that is how it always is: messages of sockets that end, netlink among them, and what neighbours shout to groups."""
    is_of_link = bool(drop.netns)
    return (not is_of_link and drop.reason in {"QUEUE_PURGE", "NOT_SPECIFIED"}) or drop.destination.startswith(USUAL_PLACES)


def line_of(shown: Shown) -> str:
    """Return a drop as a line of text."""
    drop = shown.drop
    at = time.strftime("%H:%M:%S", time.localtime(shown.at))
    ends = [
        f"{where}{f':{port}' if port else ''}{f' ({name})' if name else ''}"
        for where, port, name in (
            (drop.source, drop.source_port, shown.source_name),
            (drop.destination, drop.destination_port, shown.destination_name),
        )
    ]
    flow = f"{drop.protocol} {' -> '.join(ends)}" if drop.source else drop.protocol
    return f"{at:<9}{drop.packets:>8,}  {drop.reason:<20} {shown.netns:<28} {drop.dev or '-':<16} {flow:<60} {drop.place}"


def _summary(totals: Counter[str], latencies: Sequence[Latency]) -> list[str]:
    usual = totals.pop("", 0)
    lines = [
        "",
        f"{sum(totals.values()):,} packets dropped"
        + (f", and {usual:,} of the usual kind (--all shows them)" if usual else ""),
    ]
    lines += [f"{count:>9,}  {reason:<20} {HINTS.get(reason, '')}".rstrip() for reason, count in totals.most_common()]
    for one in latencies[: 1 + SHOWN_PLACES]:
        lines += ["", *histogram(one)]
    if len(latencies) > 1 + SHOWN_PLACES:
        lines += ["", f"and {len(latencies) - 1 - SHOWN_PLACES} more addresses that were connected to (all of them in -o json)"]
    return lines


def histogram(latency: Latency, width: int = 40) -> list[str]:
    """Return a histogram as lines: a power of two a line, from the smallest that occurs to the largest."""
    used = [i for i, count in enumerate(latency.slots) if count]
    if not used:
        return [f"{latency.what}: never happened"]
    most = max(latency.slots)
    lines = [f"{latency.what}: {sum(latency.slots):,} times"]
    for i in range(used[0], used[-1] + 1):
        bar = "#" * round(width * latency.slots[i] / most)
        lines.append(f"  {_duration(2**i):>8} to {_duration(2 ** (i + 1)):<8} {latency.slots[i]:>9,}  {bar}".rstrip())
    return lines


def _duration(nanoseconds: int) -> str:
    value = float(nanoseconds)
    for unit in ("ns", "us", "ms"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} s"


def _source(args: argparse.Namespace) -> ClusterSource | None:
    if not args.objects and not args.kubeconfig:
        return None
    try:
        return open_source(args, NodeConfig(node_name="", policy="nftables"))
    except SourceError as error:
        raise Usage(str(error)) from error


class _Names:
    """What namespaces and addresses are called."""

    def __init__(self, source: ClusterSource | None) -> None:
        self._source = source
        self._namespaces: dict[int, str] = {}
        self._addresses: dict[str, str] = {}
        self._own = Path(netns.OWN).stat().st_ino
        if source is not None:
            try:
                self._learn(source.load().snapshot)
            except SourceError as error:
                source.close()
                raise Usage(str(error)) from error

    def close(self) -> None:
        if self._source is not None:
            self._source.close()

    def refresh(self) -> None:
        """Take in objects that changed."""
        if self._source is not None and (update := self._source.poll()) is not None:
            self._learn(update.snapshot)

    def _learn(self, snapshot: Snapshot) -> None:
        services = {
            str(ip): f"service {one.namespace}/{one.name}" for one in snapshot.services.values() for ip in one.cluster_ips
        }
        pods = {
            str(ip): f"{pod.namespace}/{pod.name}" for pod in snapshot.pods.values() if not pod.host_network for ip in pod.ips
        }
        self._addresses = {**services, **pods}

    def of(self, address: str) -> str:
        """Return the pod or Service that has an address; empty if none has."""
        return self._addresses.get(address, "")

    def namespace(self, inode: int) -> str:
        """Return what ``ip netns`` calls a namespace; ``host`` is this process's own, ``-`` none, a number one without a name."""
        if inode == 0:
            return "-"
        if inode not in self._namespaces:
            self._namespaces = {self._own: "host"}
            for name in netns.names():
                with contextlib.suppress(OSError):  # gone meanwhile
                    self._namespaces[netns.path(name).stat().st_ino] = name
        return self._namespaces.setdefault(inode, str(inode))


def _stopping() -> threading.Event:
    """Return what is set when somebody asks this process to stop."""
    stopped = threading.Event()
    handler: Callable[..., None] = lambda *_: stopped.set()  # noqa: E731
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return stopped
