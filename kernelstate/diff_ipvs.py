"""What to do to IPVS so that it holds the desired virtual and real servers, and which virtual servers are ours.

A real server that is no longer wanted gets weight 0, so that its connections end in their own time (TCP), or is deleted (UDP and
SCTP, as kube-proxy does: their clients never say goodbye). One that is wanted again meanwhile gets its weight back.

    want   have          to do
    yes    no            add server, add each real server
    yes    otherwise     set server; add, then set, then quiet or delete real servers: never a moment without any
    no     yes           delete server, at once: its address is about to belong to nobody

Deletions of virtual servers come last. When to look, and when a quiet real server is deleted, is for ``reconcile_ipvs.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.address import Prefix, address_text
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer

IpvsVerb: TypeAlias = Literal["add server", "set server", "delete server", "add real", "set real", "delete real"]
RealKey: TypeAlias = tuple[int, int]
"""Address and port of a real server; one virtual server has it once."""


class IpvsChange(NamedTuple):
    """One thing to do: to the virtual server ``key``, or to ``real`` behind it. ``server`` says what a server is to become."""

    verb: IpvsVerb
    key: ServerKey
    server: VirtualServer | None = None
    real: RealServer | None = None

    def __str__(self) -> str:
        verb, _, kind = self.verb.partition(" ")
        where = f"virtual server {server_text(self.key)}"
        return f"{verb} {where}" if kind == "server" else f"{verb} real server {real_text(self.key, self.real)} of {where}"


class IpvsOwnership(msgspec.Struct, frozen=True):
    """How virtual servers of ours are told from those of others when nothing is remembered.

    Ours are those on addresses of our own link, and those on the node's addresses whose port is in ``node_ports`` (first and last
    included); never any inside ``excluded``.
    """

    node_addresses: frozenset[Prefix] = frozenset()
    node_ports: tuple[int, int] = (30000, 32767)
    excluded: tuple[Prefix, ...] = ()

    def claims(self, key: ServerKey, service_addresses: Collection[Prefix]) -> bool:
        """Whether an observed virtual server is ours; ``service_addresses`` are those of our link."""
        address = Prefix(key.family, key.address, 32 if key.family == 4 else 128)
        if any(p.family == key.family and key.address >> (address.length - p.length) == _head(p) for p in self.excluded):
            return False
        first, last = self.node_ports
        return address in service_addresses or (first <= key.port <= last and address in self.node_addresses)


def diff_server(
    key: ServerKey, want: VirtualServer | None, have: VirtualServer | None, draining: Collection[RealKey], *, graceful: bool
) -> list[IpvsChange]:
    """Return what turns one virtual server ``have`` (with ``draining`` besides) into ``want``; None is its absence."""
    if want is have:
        return []
    if want is None:
        return [IpvsChange("delete server", key)]
    if have is None:
        return [IpvsChange("add server", key, want), *(IpvsChange("add real", key, None, real) for real in want.real_servers)]
    changes = [IpvsChange("set server", key, want)] if _shape(want) != _shape(have) else []
    old: dict[RealKey, RealServer] = {real[:2]: real for real in have.real_servers}
    for real in want.real_servers:
        before = old.pop(real[:2], None)
        if before is None:
            changes.append(IpvsChange("set real" if real[:2] in draining else "add real", key, None, real))
        elif before.weight != real.weight:
            changes.append(IpvsChange("set real", key, None, real))
    if graceful and key.protocol == "tcp":
        changes += [IpvsChange("set real", key, None, real._replace(weight=0)) for real in old.values()]
    else:
        changes += [IpvsChange("delete real", key, None, real) for real in old.values()]
    return changes


def diff_ipvs(
    keys: Iterable[ServerKey],
    desired: Mapping[ServerKey, VirtualServer],
    have: Mapping[ServerKey, VirtualServer],
    draining: Mapping[ServerKey, Collection[RealKey]],
    *,
    graceful: bool,
) -> list[IpvsChange]:
    """Return what to do to the servers in ``keys``, in order: deletions of virtual servers last."""
    changes: list[IpvsChange] = []
    last: list[IpvsChange] = []
    for key in keys:
        want = desired.get(key)
        found = diff_server(key, want, have.get(key), draining.get(key, ()), graceful=graceful)
        if want is None:
            last += found
        else:
            changes += found
    return changes + last


def server_text(key: ServerKey) -> str:
    """Print a virtual server's key: ``tcp 10.96.0.1:443``, ``udp [fd00::a]:53``."""
    return f"{key.protocol} {_endpoint(key, key.address, key.port)}"


def real_text(key: ServerKey, real: RealServer | None) -> str:
    """Print a real server: ``10.244.1.2:8080``."""
    return _endpoint(key, real.address, real.port) if real else ""


def _endpoint(key: ServerKey, address: int, port: int) -> str:
    text = address_text(key.family, address)
    return f"{text}:{port}" if key.family == 4 else f"[{text}]:{port}"


def _shape(server: VirtualServer) -> tuple[str, int, bool]:
    return server.scheduler, server.timeout, server.by_port


def _head(prefix: Prefix) -> int:
    return prefix.network >> ((32 if prefix.family == 4 else 128) - prefix.length)
