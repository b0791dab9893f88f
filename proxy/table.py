"""The meaning of every Service on one node: which addresses answer, for whom, and who stands behind them.

    Frontend (address, protocol, port)  --pool-->  Backends        what a packet meets
      kind CLUSTER_IP    scope internal traffic policy
      kind EXTERNAL_IP   scope external traffic policy
      kind LOAD_BALANCER scope external traffic policy, source ranges
      kind NODE_PORT     scope external traffic policy, any of the node's addresses

A ServiceEntry is one port of one Service in one family, with two pools: ``cluster`` (policy Cluster) and ``local`` (policy
Local). No chain, mark or set lives here: iptables, IPVS and maps are three ways to write the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import NamedTuple

import msgspec

from clusterstate.objects import IPAddress, IPNetwork, Protocol
from clusterstate.snapshot import Name
from kernelstate.objects.address import Family


class PortName(NamedTuple):
    """One port of one Service: namespace, Service, port name (may be empty), protocol."""

    namespace: str
    service: str
    port: str
    protocol: Protocol

    def __str__(self) -> str:
        """Print as ``ns/name:port``, or ``ns/name`` for an unnamed port; the protocol is not part of it."""
        return f"{self.namespace}/{self.service}:{self.port}" if self.port else f"{self.namespace}/{self.service}"


class Backend(msgspec.Struct, frozen=True, gc=False):
    """An endpoint a packet can be sent to. ``name`` is its printed form, ``10.0.0.1:80`` or ``[fd00::1]:80``."""

    name: str
    address: IPAddress
    port: int
    local: bool = False


class Kind(Enum):
    """What makes a frontend answer."""

    CLUSTER_IP = "cluster IP"
    EXTERNAL_IP = "external IP"
    LOAD_BALANCER = "loadbalancer IP"
    NODE_PORT = "node port"


class OnEmpty(Enum):
    """What a frontend does with a packet when the pool in its scope is empty."""

    REJECT = "reject"
    """No endpoint anywhere: tell the client at once."""
    DROP = "drop"
    """Endpoints elsewhere, but policy Local forbids them: stay silent, a load balancer must not see a refusal."""


class Frontend(msgspec.Struct, frozen=True, gc=False):
    """An address and port that answers. ``address`` None: a NodePort, on the node's own addresses."""

    kind: Kind
    address: IPAddress | None
    port: int


class ServiceEntry(msgspec.Struct, frozen=True, gc=False):
    """One port of one Service in one family, complete."""

    name: PortName
    family: Family
    frontends: tuple[Frontend, ...]
    cluster: tuple[Backend, ...] = ()
    """Backends for policy Cluster; empty where no frontend uses that policy."""
    local: tuple[Backend, ...] = ()
    """Backends on this node for policy Local; empty where no frontend uses that policy."""
    internal_local: bool = False
    external_local: bool = False
    has_any: bool = False
    """Whether any endpoint that may serve exists anywhere, in or out of reach."""
    affinity_seconds: int = 0
    source_ranges: tuple[IPNetwork, ...] = ()
    health_check_node_port: int = 0
    serving: tuple[Backend, ...] = ()
    """Every endpoint that still serves, in policy or not: a tracked flow to one of these is not stale.

    Filled only for protocols whose flows are looked after: UDP, and the others where flows to removed endpoints are cut.
    """
    consistent: bool = False
    """One client goes to the same endpoint whichever node it meets, as far as endpoints stay (consistent hashing)."""

    def pool(self, kind: Kind) -> tuple[Backend, ...]:
        """Return the backends in the scope of a kind of frontend."""
        uses_local = self.internal_local if kind is Kind.CLUSTER_IP else self.external_local
        return self.local if uses_local else self.cluster

    @property
    def on_empty(self) -> OnEmpty:
        """What happens at a frontend whose pool is empty."""
        return OnEmpty.DROP if self.has_any else OnEmpty.REJECT

    @property
    def reachable(self) -> tuple[Backend, ...]:
        """Every backend of either pool, each once, in the order of their names."""
        if not self.local:
            return self.cluster
        if not self.cluster:
            return self.local
        both = {b.name: b for b in self.cluster} | {b.name: b for b in self.local}
        return tuple(both[name] for name in sorted(both))


class ServiceTable(msgspec.Struct, frozen=True):
    """All entries of a node, keyed by Service; ``problems`` are frontends left out, one line each."""

    entries: Mapping[Name, tuple[ServiceEntry, ...]]
    problems: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ServiceEntry]:
        """Yield every entry in the order in which it is written: by Service, then family, port and protocol."""
        for name in sorted(self.entries):
            yield from self.entries[name]
