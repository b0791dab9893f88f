"""Connections that policies no longer allow, cut when the policies change; those that are allowed are not touched.

    change of policy --> tracked flows of pods whose policies changed --> judged by the oracle, as new ones --> denied: entry deleted

What comes from or to a pod that policies hold back, belongs to no connection and opens none is dropped, so that the rest of a cut TCP connection
cannot pass for a new one, whichever end goes on. Both notice it by their own time-outs, as with a network that went away.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from clusterstate.objects import IPAddress
from clusterstate.snapshot import Name
from kernelstate.errors import KernelStateError
from kernelstate.objects.address import Family, Prefix
from kernelstate.ports import ConntrackEntry, ConntrackPort, SyncReport
from netpolicy.compile import PolicyChange
from netpolicy.oracle import Flow, Oracle
from netpolicy.table import PolicyTable

PROTOCOLS = ("tcp", "udp", "sctp")


class PolicyFlows:
    """Cuts flows. ``take`` each change, ``sync`` once the rules are written."""

    def __init__(self, conntrack: ConntrackPort) -> None:
        self._conntrack = conntrack
        self._table: PolicyTable | None = None
        self._addresses: set[IPAddress] = set()

    @property
    def is_due(self) -> bool:
        """Whether flows wait to be looked at."""
        return bool(self._addresses)

    def take(self, table: PolicyTable, change: PolicyChange) -> None:
        """Take in a change of the policy table, which is the one to judge by from now on."""
        self._table = table
        policies = {*change.rules, *(key.policy for key in change.peers)}
        pods: set[Name] = set(change.pods)
        pods |= {name for name, pod in table.pods.items() if policies & pod.every_policy}
        for name in pods:
            pod = table.pods.get(name)
            if pod is not None:  # one that no policy is about any more loses nothing
                self._addresses |= set(pod.addresses)

    def sync(self, local: frozenset[Prefix]) -> SyncReport:
        """Cut what is no longer allowed. ``local``: the node's own addresses as host prefixes. What fails is tried again."""
        if self._table is None or not self._addresses:
            return SyncReport("policy flows")
        oracle, cut = Oracle(self._table), 0
        try:
            for family in sorted({address.version for address in self._addresses}):
                for protocol in PROTOCOLS:
                    entries = self._conntrack.entries(family, protocol)
                    denied = [entry for entry in self._concerned(entries) if not oracle.judge(flow_of(entry, local)).allowed]
                    cut += self._conntrack.delete(denied) if denied else 0
        except KernelStateError as error:
            return SyncReport("policy flows", cut, (str(error),))
        self._addresses.clear()
        return SyncReport("policy flows", cut)

    def _concerned(self, entries: Iterable[ConntrackEntry]) -> list[ConntrackEntry]:
        wanted = {(address.version, int(address)) for address in self._addresses}
        return [e for e in entries if (e.family, e.source) in wanted or (e.family, e.reply_source) in wanted]


def flow_of(entry: ConntrackEntry, local: frozenset[Prefix]) -> Flow:
    """Return the first packet of a tracked flow, as it was behind Services: sent to the endpoint."""
    source = _address(entry.family, entry.source)
    destination = _address(entry.family, entry.reply_source)
    return Flow(source, destination, entry.protocol.upper(), entry.reply_source_port, Prefix.host(source) in local)


def _address(family: Family, number: int) -> IPAddress:
    return IPv4Address(number) if family == 4 else IPv6Address(number)
