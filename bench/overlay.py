"""``overlay``: what crosses between two pods on two nodes, and what it costs, by how packets travel between the nodes.

    TCP throughput     one stream, Gbit/s; CPU for each 10^9 bytes of it, everywhere (``overlay_load.py``)
    small packets      UDP with 64 bytes of data, as fast as the sender can; those that arrive, CPU for each, what was lost
    round trip         the same packet to and fro, one at a time: median, and what 99 of 100 do not exceed
    MTU                what a pod is told; packets of that size cross unfragmented, or the benchmark fails

Each way (``overlay_paths.py``) is a pair of nodes of its own. All are there at the same time and are measured in turn, round after
round: first over an underlay that passes packets of 64 KiB as they are, then over one that segments (``overlay_rig.py``). A figure is
the median of the half of the rounds in which other programs took the least of the machine. A claim is the median of such rounds'
ratios of two ways: a round is one moment of the machine.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import msgspec

from bench.kernel import may_use_kernel
from bench.overlay_load import Flood, Generator, Pings, Stream, open_generator, quieter_half
from bench.overlay_nodes import Programmed, Way
from bench.overlay_paths import HOST_GW, VXLAN, WAYS
from bench.overlay_rig import Rig, attach_routed, drops, open_rig, segmenting
from bench.overlay_udp import KERNEL, LOOP, USERSPACE
from bench.result import Options, Param, Row, against, median
from kernelstate.errors import KernelStateError
from nodeplane.commands import Failed

ROUNDS = 9
SUPERPACKETS, SEGMENTING = "superpackets", "segmenting"


class Times(msgspec.Struct, frozen=True):
    """Milliseconds that each kind of traffic is sent in a round."""

    stream: int = 400
    flood: int = 250
    ping: int = 100


class Round(msgspec.Struct, frozen=True):
    """What one round found of one way; ``dropped`` is by links, while small packets were sent."""

    stream: Stream
    flood: Flood
    pings: Pings
    dropped: int

    @property
    def others(self) -> float:
        """How many CPUs other programs took, of two kinds of traffic together."""
        return self.stream.others + self.flood.others


class Lane(msgspec.Struct):
    """One way between two nodes, and what every round found, by underlay."""

    way: Way
    rig: Rig
    programmed: Programmed
    rounds: dict[str, list[Round]] = {}


class Figure(msgspec.Struct, frozen=True):
    """One figure of a round, by the name and unit it is shown with."""

    metric: str
    unit: str
    of: Callable[[Round], float]


THROUGHPUT = Figure("TCP throughput", "Gbit/s", lambda one: one.stream.gbits)
CPU_PER_GB = Figure("CPU for 1 GB of TCP", "s", lambda one: one.stream.cpu_per_gb)
SMALL_PACKETS = Figure("64-byte packets", "kpps", lambda one: one.flood.kpps)
CPU_PER_PACKET = Figure("CPU for a 64-byte packet", "us", lambda one: one.flood.cpu_per_packet)
ROUND_TRIP = Figure("round trip, median", "us", lambda one: one.pings.median / 1000)
COMPARED = (
    THROUGHPUT,
    CPU_PER_GB,
    SMALL_PACKETS,
    CPU_PER_PACKET,
    ROUND_TRIP,
    Figure("round trip, 99 of 100", "us", lambda one: one.pings.p99 / 1000),
)
"""Shown with their ratio to host-gw."""
COUNTED = (
    Figure("64-byte packets lost", "%", lambda one: one.flood.lost),
    Figure("64-byte packets dropped by links", "", lambda one: one.dropped),
    Figure("TCP segments sent again", "", lambda one: one.stream.retransmits),
)
"""Shown as they are: they may be 0."""


TRAFFIC = frozenset({"sent_packets", "sent_bytes", "received_packets", "received_bytes", "sends", "writes"})
"""Counters of forwarders that say only how much there was."""


class Claim(msgspec.Struct, frozen=True):
    """That one way's figure, divided by another's, is at least (or at most) so much."""

    way: str
    other: str
    figure: Figure
    target: float
    at_most: bool = False
    underlays: tuple[str, ...] = (SUPERPACKETS, SEGMENTING)


CLAIMS = (
    Claim(VXLAN, HOST_GW, THROUGHPUT, 0.85, underlays=(SUPERPACKETS,)),
    Claim(USERSPACE, LOOP, THROUGHPUT, 5),
    Claim(USERSPACE, LOOP, CPU_PER_GB, 0.2, at_most=True),
    Claim(USERSPACE, LOOP, SMALL_PACKETS, 3),
    Claim(KERNEL, LOOP, THROUGHPUT, 10, underlays=(SUPERPACKETS,)),
    Claim(KERNEL, VXLAN, THROUGHPUT, 1.0, underlays=(SUPERPACKETS,)),
    Claim(KERNEL, VXLAN, THROUGHPUT, 0.8, underlays=(SEGMENTING,)),
)


def measure(_options: Options, rounds: int = ROUNDS, times: Times = Times()) -> list[Row]:  # noqa: B008  frozen
    """Measure every way that this machine has. Raises Failed."""
    if not may_use_kernel():
        raise Failed("overlay: making network namespaces needs root")
    try:
        with contextlib.ExitStack() as undo:
            generator = undo.enter_context(open_generator())
            lanes = [_open(undo, generator, way) for way in ways_here()]
            for _ in range(rounds):
                _round(generator, lanes, SUPERPACKETS, times)
            with contextlib.ExitStack() as hardware:
                for lane in lanes:
                    hardware.enter_context(segmenting(lane.rig))
                for _ in range(rounds):
                    _round(generator, lanes, SEGMENTING, times)
            return [*_rows(lanes), *_counters(lanes), *_claims(lanes), *_noise(lanes)]
    except KernelStateError as error:
        raise Failed(f"overlay: {error}") from error


def ways_here() -> list[Way]:
    """Return the ways that can be measured here; the others are named on stderr."""
    found = []
    for way in WAYS:
        words = way.lacking()
        if words:
            print(f"overlay: {way.name} is left out: {words}", file=sys.stderr)
        else:
            found.append(way)
    return found


def _open(undo: contextlib.ExitStack, generator: Generator, way: Way) -> Lane:
    """Make a pair of nodes, program the way, attach the pods with its MTU, and see that packets of that size cross."""
    rig = undo.enter_context(open_rig())
    programmed = way.program(undo, rig)
    for end in rig.ends:
        attach_routed(end, programmed.mtu)
    try:
        generator.largest(rig, programmed.mtu)
    except Failed as error:
        raise Failed(f"overlay: {way.name}: {error}") from error
    return Lane(way, rig, programmed)


def _round(generator: Generator, lanes: Sequence[Lane], underlay: str, times: Times) -> None:
    for lane in lanes:
        rig, forwarders = lane.rig, lane.programmed.forwarders
        try:
            stream = generator.stream(rig, times.stream, forwarders)
            before = drops(rig)
            flood = generator.flood(rig, times.flood, forwarders)
            dropped = drops(rig) - before
            pings = generator.ping(rig, times.ping)
        except Failed as error:
            raise Failed(f"overlay: {lane.way.name}, {underlay}: {error}") from error
        lane.rounds.setdefault(underlay, []).append(Round(stream, flood, pings, dropped))


# -- figures -----------------------------------------------------------------------------------------------------------


def _rows(lanes: Sequence[Lane]) -> Iterator[Row]:
    host_gw = next(lane for lane in lanes if lane.way.name == HOST_GW)
    for underlay in (SUPERPACKETS, SEGMENTING):
        for figure in COMPARED:
            bare = _median(host_gw, underlay, figure)
            for lane in lanes:
                row = _row(lane, underlay, figure)
                yield row if lane is host_gw else against(row, bare, HOST_GW)
        for figure in COUNTED:
            for lane in lanes:
                yield _row(lane, underlay, figure)
    for lane in lanes:
        yield Row(lane.way.name, "overlay", {}, "MTU", lane.programmed.mtu, "bytes")


def _row(lane: Lane, underlay: str, figure: Figure) -> Row:
    return Row(lane.way.name, "overlay", {"underlay": underlay}, figure.metric, _median(lane, underlay, figure), figure.unit)


def _median(lane: Lane, underlay: str, figure: Figure) -> float:
    return median([figure.of(one) for one in _quiet(lane.rounds[underlay])])


def _quiet(rounds: Sequence[Round]) -> list[Round]:
    return quieter_half(rounds, lambda one: one.others)


def _counters(lanes: Sequence[Lane]) -> Iterator[Row]:
    """Say what forwarders counted in the whole run besides traffic, as far as there was any."""
    for lane in lanes:
        for name, value in sorted(lane.programmed.counters().items()):
            if value and name not in TRAFFIC:
                yield Row(lane.way.name, "overlay", {}, f"counter {name}", value, "")


def _claims(lanes: Sequence[Lane]) -> Iterator[Row]:
    by_name = {lane.way.name: lane for lane in lanes}
    for claim in CLAIMS:
        if claim.way in by_name and claim.other in by_name:
            for underlay in claim.underlays:
                value = _ratio(by_name[claim.way].rounds[underlay], by_name[claim.other].rounds[underlay], claim.figure)
                params: dict[str, Param] = {"underlay": underlay, "at most" if claim.at_most else "at least": claim.target}
                yield Row(f"claim: {claim.way} to {claim.other}", "overlay", params, claim.figure.metric, value, "times")


def _ratio(rounds: Sequence[Round], others: Sequence[Round], figure: Figure) -> float:
    """Return the median of the rounds' ratios, of the half of the rounds in which others took the least."""
    pairs = quieter_half(list(zip(rounds, others, strict=True)), lambda pair: pair[0].others + pair[1].others)
    return median([figure.of(one) / figure.of(other) for one, other in pairs])


def _noise(lanes: Sequence[Lane]) -> Iterator[Row]:
    """Say how far the rounds that count were apart, and how much of the machine others had in them."""
    quiet = [_quiet(rounds) for lane in lanes for rounds in lane.rounds.values()]
    spread = max(max(one.stream.gbits for one in rounds) / median([one.stream.gbits for one in rounds]) for rounds in quiet)
    yield Row("noise", "overlay", {}, "best round to median of TCP throughput, at most", spread, "times")
    others = [share for rounds in quiet for one in rounds for share in (one.stream.others, one.flood.others)]
    yield Row("noise", "overlay", {}, "CPUs taken by others, median", median(others), "")
