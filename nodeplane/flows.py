"""What happens to tracked flows whose endpoint no longer serves: the settings' policy, carried out.

    flows_to_removed   UDP              TCP, SCTP
    keep               deleted at once  stay as long as packets come, as with kube-proxy
    drain              deleted at once  stay for drain_seconds after the endpoint went, then as reset
    reset              deleted at once  ended at once, and the client is told (kernelstate/linux/conntrack_reset.py)

"Serves" is the endpoint's condition ``serving``: a terminating pod that still passes its readiness probe keeps its connections
under every policy. Which flows are meant: ``proxy/conntrack.py``. A flow that was made while no agent ran, to a Service that
was gone when the next one started, is unknown to it and stays.
"""

from __future__ import annotations

from kernelstate.errors import KernelStateError
from kernelstate.objects.address import Family, Prefix
from kernelstate.ports import ConntrackEntry, ConntrackPort, SyncReport
from proxy.conntrack import Departures, StaleFlows
from proxy.settings import ProxySettings

_LINK_LOCAL = Prefix.parse("fe80::/10")


class FlowKeeper:
    """Ends stale flows. ``take`` what a change affected, ``sync`` once the rules are written, again at ``next_due``."""

    def __init__(self, conntrack: ConntrackPort, settings: ProxySettings) -> None:
        self.conntrack = conntrack
        self._datagrams = StaleFlows()
        self._departures = Departures(settings.drain_seconds if settings.flows_to_removed == "drain" else 0)

    @property
    def next_due(self) -> float | None:
        """When connections are due next, on the clock of ``now``; None if there are none. UDP is due at the next ``sync``."""
        return self._departures.next_due

    def take(self, stale: StaleFlows, now: float) -> None:
        """Take in what a change of Services affected. ``now``: a clock's seconds, the same clock for all calls."""
        self._departures.take(stale, now)
        self._datagrams.merge(stale)
        self._datagrams.connections.clear()

    def sync(self, local: frozenset[Prefix], now: float) -> SyncReport:
        """End what is due. ``local``: the node's own addresses as host prefixes. What fails is tried again at the next call."""
        ended = 0
        errors = []
        for step in (self._end_datagrams, self._end_connections):
            try:
                ended += step(local, now)
            except KernelStateError as error:
                errors.append(str(error))
        return SyncReport("conntrack", ended, tuple(errors))

    def _end_datagrams(self, local: frozenset[Prefix], _now: float) -> int:
        ended = 0
        for family in sorted(self._datagrams.families):
            ended += self._delete(self._datagrams.select(self.conntrack.entries(family, "udp"), local))
        self._datagrams = StaleFlows()
        return ended

    def _end_connections(self, local: frozenset[Prefix], now: float) -> int:
        ended = 0
        for family, protocol in self._departures.kinds(now):
            due = self._departures.select(self.conntrack.entries(family, protocol), local, now)
            refuser = refusing_address(family, local)
            ended += self._delete(due) if refuser is None or not due else self.conntrack.reset(due, refuser)
        self._departures.done(now)
        return ended

    def _delete(self, flows: list[ConntrackEntry]) -> int:
        return self.conntrack.delete(flows) if flows else 0


def refusing_address(family: Family, local: frozenset[Prefix]) -> int | None:
    """Return an address of this node's from which clients can be told that their connection is over; None if there is none."""
    usable = [a for a in local if a.family == family and not (family == 6 and a.network >> 118 == _LINK_LOCAL.network >> 118)]
    return min(usable).network if usable else None
