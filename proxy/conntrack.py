"""Which tracked flows no longer lead to somebody who serves, and when they are due: at once, or after a time.

A flow lives in the connection tracking table as long as packets keep coming, translated to the backend it was first given,
even when that backend is gone. Three things make a flow stale: it was sent to an address of ours, and what answers it is not
an endpoint that still serves there; this also when the Service has no endpoint left, and when the Service itself is gone.

    original  10.244.1.5:40001 -> 10.96.0.10:53       is this a frontend, or was it one before the change?
    replies   10.244.2.7:53    -> ...                 is 10.244.2.7:53 still serving it?  no: the flow is stale

A NodePort is only matched on the node's own addresses: a flow to the same port of some host elsewhere is not ours (kube-proxy
deletes it). A UDP flow that never was translated (replies come from the address itself) is stale once a backend exists.

    UDP         StaleFlows.select    always, at once: a stale flow can do nobody good
    TCP, SCTP   Departures           only where settings say so (flows_to_removed): the backend may still be finishing its work

What is done to a flow that is due is ``nodeplane/flows.py``'s business.
Source: kubernetes issues 139628, 141371, 122740, 100698, 101968 (docs/adr/0005).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from clusterstate.snapshot import Name
from kernelstate.objects.address import Family, Prefix
from kernelstate.ports import ConntrackEntry
from proxy.table import ServiceEntry

_Value = TypeVar("_Value")

Answerer: TypeAlias = tuple[int, int]
"""(address, port) that replies come from."""


class Destination(NamedTuple):
    """Where flows are sent: ``address`` as a number, -1 for a NodePort; ``protocol`` as in ``ConntrackEntry``."""

    family: Family
    protocol: str
    address: int
    port: int


class Change(NamedTuple):
    """What became of a TCP or SCTP frontend: who serves it now, and who did and no longer does (None: whoever else)."""

    serving: frozenset[Answerer]
    went: frozenset[Answerer] | None


class StaleFlows:
    """The frontends affected by one change, and who may go on answering each. ``protocols`` are those that are looked at."""

    def __init__(self, protocols: frozenset[str] = frozenset({"UDP"})) -> None:
        self.protocols = protocols
        self.connections: dict[Destination, Change] = {}
        """What happened to frontends of connections."""
        self._serving: dict[Destination, frozenset[Answerer]] = {}

    def __bool__(self) -> bool:
        return bool(self._serving)

    @property
    def families(self) -> frozenset[Family]:
        """The families in which some UDP flow may be stale."""
        return frozenset(d.family for d in self._serving)

    def note(self, before: Iterable[ServiceEntry], after: Iterable[ServiceEntry]) -> None:
        """Take in what one Service was and is now. Nothing is noted where no backend went and no frontend was lost."""
        old, new = self._answers(before), self._answers(after)
        for destination in old.keys() | new.keys():
            was, now = old.get(destination), new.get(destination, frozenset())
            if destination.protocol != "udp":
                if was != now:  # also one who came: it may have gone a moment ago
                    self.connections[destination] = Change(now, (was or frozenset()) - now)
            elif was is None or was - now or (not was and now):
                self._serving[destination] = now

    def merge(self, later: StaleFlows) -> None:
        """Take in what a later change found; where both speak of a frontend the later one is right."""
        self._serving.update(later._serving)
        for destination, change in later.connections.items():
            earlier = self.connections.get(destination)
            self.connections[destination] = _after(earlier, change) if earlier else change

    def note_all(self, entries: Mapping[Name, Sequence[ServiceEntry]]) -> None:
        """Take in every Service there is: after a restart the flows in the kernel are compared with them."""
        for group in entries.values():
            for destination, serving in self._answers(group).items():
                if destination.protocol == "udp":
                    self._serving[destination] = serving
                else:
                    self.connections[destination] = Change(serving, None)

    def select(self, tracked: Iterable[ConntrackEntry], local: frozenset[Prefix]) -> list[ConntrackEntry]:
        """Return the stale ones among tracked UDP flows. ``local``: the node's own addresses as host prefixes."""
        return [flow for flow in tracked if self._is_stale(flow, local)]

    def _is_stale(self, flow: ConntrackEntry, local: frozenset[Prefix]) -> bool:
        answers = _find(self._serving, flow, local)
        return answers is not None and (flow.reply_source, flow.reply_source_port) not in answers

    def _answers(self, entries: Iterable[ServiceEntry]) -> dict[Destination, frozenset[Answerer]]:
        """Return who serves each frontend: (address, port) of the endpoints that still serve."""
        found: dict[Destination, frozenset[Answerer]] = {}
        for entry in entries:
            if entry.name.protocol not in self.protocols:
                continue
            protocol = entry.name.protocol.lower()
            serving = frozenset((int(b.address), b.port) for b in entry.serving)
            for frontend in entry.frontends:
                address = -1 if frontend.address is None else int(frontend.address)
                found[Destination(entry.family, protocol, address, frontend.port)] = serving
        return found


class _Departed:
    """One frontend: who serves it, and when each of the others went. ``others`` is when anybody else is taken to have gone."""

    __slots__ = ("gone", "others", "serving")

    def __init__(self) -> None:
        self.serving: frozenset[Answerer] = frozenset()
        self.gone: dict[Answerer, float] = {}
        self.others: float | None = None

    def times(self) -> list[float]:
        return [*self.gone.values(), *([] if self.others is None else [self.others])]

    def went(self, answerer: Answerer) -> float | None:
        """Return when somebody went, None if it serves or never was of this frontend."""
        return None if answerer in self.serving else self.gone.get(answerer, self.others)


class Departures:
    """Which backends of TCP and SCTP frontends went, and whose flows are due ``seconds`` after that. Times are seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._frontends: dict[Destination, _Departed] = {}

    @property
    def next_due(self) -> float | None:
        """When the next flows are due, None if nobody is on its way out. Costs the number of those."""
        times = [time for frontend in self._frontends.values() for time in frontend.times()]
        return min(times) + self.seconds if times else None

    def take(self, stale: StaleFlows, now: float) -> None:
        """Take in a change that happened ``now``. Who serves again is forgiven; who went twice went the last time."""
        for destination, change in stale.connections.items():
            frontend = self._frontends.get(destination)
            if frontend is None:
                if not change.went and change.went is not None:
                    continue
                frontend = self._frontends[destination] = _Departed()
            frontend.serving = change.serving
            for back in frontend.gone.keys() & change.serving:
                del frontend.gone[back]
            if change.went is None:
                frontend.others = now
            else:
                frontend.gone |= dict.fromkeys(change.went, now)

    def kinds(self, now: float) -> list[tuple[Family, str]]:
        """Return the families and protocols in which flows are due, sorted."""
        latest = now - self.seconds
        found = {(d.family, d.protocol) for d, one in self._frontends.items() if any(t <= latest for t in one.times())}
        return sorted(found)

    def select(self, tracked: Iterable[ConntrackEntry], local: frozenset[Prefix], now: float) -> list[ConntrackEntry]:
        """Return the flows that are due among tracked ones; not those that are over, nor those that never were translated."""
        latest = now - self.seconds
        due = []
        for flow in tracked:
            answerer = (flow.reply_source, flow.reply_source_port)
            if flow.stage == "over" or answerer == (flow.destination, flow.destination_port):
                continue
            frontend = _find(self._frontends, flow, local)
            went = frontend.went(answerer) if frontend is not None else None
            if went is not None and went <= latest:
                due.append(flow)
        return due

    def done(self, now: float) -> None:
        """Forget what was due ``now``: its flows have ended."""
        latest = now - self.seconds
        for destination, frontend in list(self._frontends.items()):
            frontend.gone = {a: time for a, time in frontend.gone.items() if time > latest}
            if frontend.others is not None and frontend.others <= latest:
                frontend.others = None
            if not frontend.times():
                del self._frontends[destination]


def _after(earlier: Change, later: Change) -> Change:
    """Return two changes of one frontend as one."""
    if earlier.went is None or later.went is None:
        return Change(later.serving, None)
    return Change(later.serving, (earlier.went | later.went) - later.serving)


def _find(frontends: Mapping[Destination, _Value], flow: ConntrackEntry, local: frozenset[Prefix]) -> _Value | None:
    """Return what is known of the frontend a flow was sent to, if it is one of ours."""
    exact = frontends.get(Destination(flow.family, flow.protocol, flow.destination, flow.destination_port))
    if exact is not None:
        return exact
    node_port = frontends.get(Destination(flow.family, flow.protocol, -1, flow.destination_port))
    return node_port if node_port is not None and _is_own(flow, local) else None


def _is_own(flow: ConntrackEntry, local: frozenset[Prefix]) -> bool:
    bits = 32 if flow.family == 4 else 128
    if flow.family == 4 and flow.destination >> 24 == 127:
        return True
    return Prefix(flow.family, flow.destination, bits) in local
