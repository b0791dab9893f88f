"""Which tracked UDP flows are stale after a change, and only those.

A UDP flow lives in the connection tracking table as long as packets keep coming, translated to the backend it was first given,
even when that backend is gone. Three things make a flow stale: it was sent to an address of ours, and what answers it is not
an endpoint that still serves there; this also when the Service has no endpoint left, and when the Service itself is gone.

    original  10.244.1.5:40001 -> 10.96.0.10:53       is this a frontend, or was it one before the change?
    replies   10.244.2.7:53    -> ...                 is 10.244.2.7:53 still serving it?  no: delete the flow

A NodePort is only matched on the node's own addresses: a flow to the same port of some host elsewhere is not ours (kube-proxy
deletes it). A flow that never was translated (replies come from the address itself) is stale once a backend exists.
Source: kubernetes issues 139628, 141371, 122740 (docs/adr/0005).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from clusterstate.snapshot import Name
from kernelstate.objects.address import Family, Prefix
from kernelstate.ports import ConntrackEntry
from proxy.table import ServiceEntry

Destination = tuple[int, int, int]
"""(family, address as a number or -1 for a NodePort, port)."""


class StaleFlows:
    """The UDP frontends affected by one change, and who may go on answering each."""

    def __init__(self) -> None:
        self._serving: dict[Destination, frozenset[tuple[int, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._serving)

    @property
    def families(self) -> frozenset[Family]:
        """The families in which something may be stale."""
        return frozenset(d[0] for d in self._serving)  # type: ignore[misc]

    def note(self, before: Iterable[ServiceEntry], after: Iterable[ServiceEntry]) -> None:
        """Take in what one Service was and is now. Nothing is noted where no UDP backend went and no frontend was lost."""
        old, new = _answers(before), _answers(after)
        for destination in old.keys() | new.keys():
            was, now = old.get(destination), new.get(destination, frozenset())
            if was is None or was - now or (not was and now):
                self._serving[destination] = now

    def merge(self, later: StaleFlows) -> None:
        """Take in what a later change found; where both speak of a frontend the later one is right."""
        self._serving.update(later._serving)

    def note_all(self, entries: Mapping[Name, Sequence[ServiceEntry]]) -> None:
        """Take in every Service there is: after a restart the flows in the kernel are compared with them."""
        for group in entries.values():
            self._serving.update(_answers(group))

    def select(self, tracked: Iterable[ConntrackEntry], local: frozenset[Prefix]) -> list[ConntrackEntry]:
        """Return the stale ones among tracked UDP flows. ``local``: the node's own addresses as host prefixes."""
        return [flow for flow in tracked if self._is_stale(flow, local)]

    def _is_stale(self, flow: ConntrackEntry, local: frozenset[Prefix]) -> bool:
        answers = self._serving.get((flow.family, flow.destination, flow.destination_port))
        if answers is None:
            node_port = self._serving.get((flow.family, -1, flow.destination_port))
            answers = node_port if node_port is not None and _is_own(flow, local) else None
        return answers is not None and (flow.reply_source, flow.reply_source_port) not in answers


def _is_own(flow: ConntrackEntry, local: frozenset[Prefix]) -> bool:
    bits = 32 if flow.family == 4 else 128
    if flow.family == 4 and flow.destination >> 24 == 127:
        return True
    return Prefix(flow.family, flow.destination, bits) in local


def _answers(entries: Iterable[ServiceEntry]) -> dict[Destination, frozenset[tuple[int, int]]]:
    """Return who serves each UDP frontend: (address, port) of the endpoints that still serve."""
    found: dict[Destination, frozenset[tuple[int, int]]] = {}
    for entry in entries:
        if entry.name.protocol != "UDP":
            continue
        serving = frozenset((int(b.address), b.port) for b in entry.serving)
        for frontend in entry.frontends:
            address = -1 if frontend.address is None else int(frontend.address)
            found[entry.family, address, frontend.port] = serving
    return found
