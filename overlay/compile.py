"""From what a registry says of each node to the peer table of one node: who is a peer, and how each is reached. Pure.

Each node is read by itself (``registry/``); here claims are held against each other. A conflict has a winner, the same
whatever the order of events: the own node, then the node whose name sorts first. The other is left out, and a problem says which
field of which node did it; nobody else is affected.

              inside a subnet of the uplink?
                 yes                no
    host-gw      direct             problem, no way
    vxlan        encapsulated       encapsulated
    + DirectRouting: direct         encapsulated
    udp          encapsulated       encapsulated
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import assert_never

from clusterstate.objects import IPAddress, IPNetwork
from kernelstate.objects.links import Uplink
from overlay.mtu import pod_mtu
from overlay.netconf import HostGwBackend, NetConf, UdpBackend, VxlanBackend
from overlay.registration import Member, Registration
from overlay.table import Peer, PeerProblem, PeerTable, Reach, Way

HOST_GW_NEEDS = "host-gw needs every node on one L2 segment; use vxlan, or vxlan with DirectRouting"


def compile_peers(members: Iterable[Member], node_name: str, net_conf: NetConf, uplink: Uplink) -> PeerTable:
    """Return the overlay as ``node_name`` sees it; ``members`` in any order."""
    claims = _Claims()
    peers: list[Peer] = []
    own: tuple[Way, ...] = ()
    problems: list[PeerProblem] = []
    for member in sorted(members, key=lambda m: (m.node != node_name, m.node)):
        is_own = member.node == node_name
        problems += member.problems
        ways: list[Way] = []
        for registration in member.registrations:
            problem = claims.refuse(registration)
            way = problem or (_own_end(registration, uplink) if is_own else _way(registration, net_conf, uplink))
            if isinstance(way, PeerProblem):
                problems.append(way)
            else:
                ways.append(way)
        if is_own:
            own = tuple(ways)
            continue
        # A family in which this node has no end of its own has no peers either.
        ways = [way for way in ways if any(end.family == way.family for end in own)]
        if ways:
            peers.append(Peer(member.node, tuple(ways)))
    return PeerTable(
        node=node_name,
        net_conf=net_conf,
        uplink=uplink,
        mtu=pod_mtu(net_conf, uplink.mtu),
        own=own,
        peers=tuple(peers),
        problems=tuple(sorted(problems, key=lambda p: (p.node, p.field, p.value))),
    )


def _own_end(registration: Registration, uplink: Uplink) -> Way | PeerProblem:
    """Return the own end: with the address the others are told if the uplink has it, else (behind NAT) the uplink's own."""
    family = registration.family
    local: IPAddress | None = registration.public_ip
    if all(local != own.ip for own in uplink.addresses):
        local = uplink.address(family)
    if local is None:
        reason = f"the uplink {uplink.name} has no IPv{family} address"
        return PeerProblem(registration.node, registration.ip_field, str(registration.public_ip), reason)
    return Way(family, registration.pod_cidr, local, Reach.DIRECT, "this node", registration.vtep)


def _way(registration: Registration, net_conf: NetConf, uplink: Uplink) -> Way | PeerProblem:
    address, family = registration.public_ip, registration.family
    near = uplink.holds_subnet_of(address)
    subnets = f"{uplink.name}'s subnets {uplink.subnets(family)}"
    where = f"{address} is {'inside' if near else 'outside'} {subnets}"
    match net_conf.backend:
        case HostGwBackend():
            if not near:
                reason = f"is outside {subnets}; {HOST_GW_NEEDS}"
                return PeerProblem(registration.node, registration.ip_field, str(address), reason)
            return Way(family, registration.pod_cidr, address, Reach.DIRECT, where)
        case UdpBackend():
            return Way(family, registration.pod_cidr, address, Reach.UDP, "udp")
        case VxlanBackend(direct_routing=True) if near:
            return Way(family, registration.pod_cidr, address, Reach.DIRECT, f"DirectRouting: {where}")
        case VxlanBackend(direct_routing=direct):
            why = where if direct else "vxlan without DirectRouting"
            return Way(family, registration.pod_cidr, address, Reach.VXLAN, why, registration.vtep)
        case _:
            assert_never(net_conf.backend)


class _Claims:
    """Who holds what. Pod networks that were taken do not overlap, so of one family their order by start is also one by end."""

    def __init__(self) -> None:
        self._networks: dict[int, list[tuple[int, int, str]]] = {4: [], 6: []}
        self._addresses: dict[IPAddress, str] = {}
        self._macs: dict[tuple[int, str], str] = {}

    def refuse(self, r: Registration) -> PeerProblem | None:
        """Take note of what a node claims, or say what of it is somebody else's."""
        span = (int(r.pod_cidr.network_address), int(r.pod_cidr.broadcast_address), r.node)
        other = self._overlapping(r.pod_cidr, span)
        if other is not None:
            return PeerProblem(r.node, r.pod_field, str(r.pod_cidr), f"overlaps the pod network of Node {other}")
        holder = self._addresses.get(r.public_ip)
        if holder is not None:
            return PeerProblem(r.node, r.ip_field, str(r.public_ip), f"is the address of Node {holder} as well")
        mac = r.vtep.mac if r.vtep else ""
        holder = self._macs.get((r.family, mac)) if mac else None
        if holder is not None:
            return PeerProblem(r.node, "VtepMAC", mac, f"is the MAC of Node {holder} as well")
        insort(self._networks[r.family], span)
        self._addresses[r.public_ip] = r.node
        self._macs[r.family, mac] = r.node
        return None

    def _overlapping(self, network: IPNetwork, span: tuple[int, int, str]) -> str | None:
        taken = self._networks[network.version]
        at = bisect_left(taken, (span[0],))
        for first, last, node in taken[max(at - 1, 0) : at + 1]:
            if first <= span[1] and span[0] <= last:
                return node
        return None
