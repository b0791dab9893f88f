"""Leases as flannel keeps them in etcd: keys, values, and who is in the overlay by them. Pure.

    /coreos.com/network/config                                   net-conf.json
    /coreos.com/network/subnets/10.5.52.0-24                     one key a node: its subnet
    /coreos.com/network/subnets/10.5.52.0-24&fc00:0:0:1::-64     of both families
         {"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}

A key bears an etcd lease of a day, or none: then it is a reservation, made by people, that only the node with its PublicIP takes.
A node is its PublicIP, here as for flannel: leases have no names, so that is what a peer is called. Where two keys state the same
one, the key that was written last is the node's.

Every key and value is read by itself; one that makes no sense is reported and costs nobody else anything. Which subnet this node
takes is for ``etcd_claim.py``.

Source: flannel pkg/subnet/subnet.go (MakeSubnetKey, ParseSubnetKey), pkg/lease/lease.go (LeaseAttrs).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

import msgspec

from clusterstate.objects import IPAddress, IPNetwork
from overlay import lease
from overlay.lease import Vtep
from overlay.netconf import NetConf, NetConfError, VxlanBackend, parse_net_conf
from overlay.registration import Member, Registration, why_no_node_address
from overlay.registry.subnets import pools_of
from overlay.table import PeerProblem

CONFIG, SUBNETS = "config", "subnets/"
"""Below the prefix."""
LEASE_SECONDS = 86400
_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([0-9a-f:]+)-(\d+))?")


class LeaseError(ValueError):
    """A key or its value that makes no sense; the text names both."""

    def __init__(self, key: str, value: str, reason: str) -> None:
        self.key, self.value, self.reason = key, value, reason
        super().__init__(f"etcd key {key}: value {value!r}: {reason}")


class NoLeaseError(Exception):
    """This node cannot have a lease as things are; the text says why."""


class Subnets(msgspec.Struct, frozen=True):
    """What one key is about: an IPv4 subnet, and an IPv6 one where the cluster has both families."""

    v4: IPv4Network
    v6: IPv6Network | None = None

    def of(self, family: int) -> IPNetwork | None:
        """Return the subnet of a family."""
        return self.v4 if family == 4 else self.v6

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        """One or two, IPv4 first."""
        return (self.v4,) if self.v6 is None else (self.v4, self.v6)

    @property
    def name(self) -> str:
        """The key's last part."""
        return "&".join(f"{one.network_address}-{one.prefixlen}" for one in self.networks)


class LeaseAttrs(msgspec.Struct, frozen=True):
    """A key's value: how a node is reached. ``vteps`` holds the ends of its vxlan tunnels, IPv4 first; None: no such end."""

    public_ip: IPv4Address
    public_ipv6: IPv6Address | None = None
    backend: str = ""
    """As written; udp writes none."""
    vteps: tuple[Vtep | None, Vtep | None] = (None, None)

    def address(self, family: int) -> IPAddress | None:
        """Return the public address of a family."""
        return self.public_ip if family == 4 else self.public_ipv6

    def vtep(self, family: int) -> Vtep | None:
        """Return the tunnel's end of a family."""
        return self.vteps[0 if family == 4 else 1]


class Entry(msgspec.Struct, frozen=True):
    """One key as etcd holds it: ``lease`` is etcd's number of its lease, 0 for a reservation; ``revision`` when it was written."""

    subnets: Subnets
    attrs: LeaseAttrs
    value: str
    lease: int = 0
    revision: int = 0


# -- text ----------------------------------------------------------------------------------------------------------------


def parse_key(name: str) -> Subnets:
    """Read the last part of a key. Raises ValueError."""
    match = _KEY.fullmatch(name)
    if match is None:
        raise ValueError("the key must be like 10.5.52.0-24 or 10.5.52.0-24&fc00:0:0:1::-64")
    v6 = IPv6Network(f"{match[3]}/{match[4]}") if match[3] else None
    return Subnets(IPv4Network(f"{match[1]}/{match[2]}"), v6)


def parse_entry(name: str, value: str, lease_id: int = 0, revision: int = 0) -> Entry:
    """Read a key and its value. Raises LeaseError naming both."""
    try:
        return Entry(parse_key(name), _parse_attrs(value), value, lease_id, revision)
    except ValueError as error:
        raise LeaseError(name, value, str(error)) from error


def _parse_attrs(value: str) -> LeaseAttrs:
    try:
        raw = json.loads(value)
    except ValueError as error:
        raise ValueError("is not JSON") from error
    if not isinstance(raw, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004  wrong text
    fields = {str(key).lower(): one for key, one in raw.items()}
    backend = fields.get("backendtype") or ""
    if not isinstance(backend, str):
        raise ValueError("BackendType: is not text")  # noqa: TRY004  wrong text
    own, ownv6 = _address(fields, "PublicIP", IPv4Address), fields.get("publicipv6")
    vteps = (_vtep(fields, "BackendData"), _vtep(fields, "BackendV6Data")) if backend == VxlanBackend.type else (None, None)
    return LeaseAttrs(own, None if ownv6 is None else _address(fields, "PublicIPv6", IPv6Address), backend, vteps)


_A = TypeVar("_A", IPv4Address, IPv6Address)


def _address(fields: Mapping[str, object], name: str, kind: type[_A]) -> _A:
    text = fields.get(name.lower())
    try:
        return kind(text if isinstance(text, str) else "")
    except ValueError as error:
        raise ValueError(f"{name}: is not an IPv{6 if kind is IPv6Address else 4} address") from error


def _vtep(fields: Mapping[str, object], name: str) -> Vtep | None:
    raw = fields.get(name.lower())
    try:
        return None if raw is None else lease.parse_vtep(json.dumps(raw, separators=(",", ":")))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def print_attrs(attrs: LeaseAttrs) -> str:
    """Print a value byte for byte as flannel does: PublicIPv6 is always there, empty backend fields never are."""
    v6 = "null" if attrs.public_ipv6 is None else f'"{attrs.public_ipv6}"'
    parts = [f'"PublicIP":"{attrs.public_ip}"', f'"PublicIPv6":{v6}']
    parts += [f'"BackendType":"{attrs.backend}"'] if attrs.backend else []
    for name, vtep in zip(("BackendData", "BackendV6Data"), attrs.vteps, strict=True):
        parts += [f'"{name}":{lease.print_vtep(vtep)}'] if vtep else []
    return f"{{{','.join(parts)}}}"


# -- who is in the overlay -----------------------------------------------------------------------------------------------


def own_attrs(
    net_conf: NetConf, node: str, public_ips: Mapping[int, IPAddress], before: Iterable[LeaseAttrs] = ()
) -> LeaseAttrs:
    """Return what this node writes; ``public_ips`` by family.

    The MAC is the one that ``before`` states for this VNI, in its order, so that it stays the same whoever ran the node until
    now; else the one that follows from the node's name. Raises LeaseError without an address in a family that is on.
    """
    missing = [family for family in net_conf.families if family not in public_ips]
    if missing:
        raise NoLeaseError(
            f"this node has no IPv{missing[0]} address to tell the others; set overlay.publicIP or overlay.iface"
        )
    backend, earlier = net_conf.backend, list(before)
    vteps: list[Vtep | None] = [None, None]
    for i, family in enumerate((4, 6)):
        if isinstance(backend, VxlanBackend) and family in net_conf.families:
            known = (one.vtep(family) for one in earlier)
            kept = next((v for v in known if v is not None and v.vni == backend.vni), None)
            vteps[i] = kept or Vtep(backend.vni, lease.derived_mac(node, backend.vni, family))
    own = public_ips[4]
    assert isinstance(own, IPv4Address)
    ownv6 = public_ips[6] if 6 in net_conf.families else None
    assert ownv6 is None or isinstance(ownv6, IPv6Address)
    return LeaseAttrs(own, ownv6, lease.backend_type(backend.type), (vteps[0], vteps[1]))


def own_member(node: str, subnets: Subnets, attrs: LeaseAttrs, net_conf: NetConf) -> Member:
    """Return this node as it states itself."""
    return _read_member(node, Entry(subnets, attrs, ""), net_conf, [])


def read_members(entries: Iterable[Entry], own: Member, own_key: str, net_conf: NetConf) -> tuple[Member, ...]:
    """Return who is in the overlay: this node, and every other one as its lease states it, in the order of their addresses."""
    own_ips = {one.public_ip for one in own.registrations}
    newest: dict[IPv4Address, Entry] = {}
    others: dict[IPv4Address, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.revision):
        address = entry.attrs.public_ip
        if entry.subnets.name == own_key or (_is_waiting(entry, net_conf) and address not in own_ips):
            continue
        if address in newest:
            others.setdefault(address, []).append(newest[address])
        newest[address] = entry
    found = [own]
    for address, entry in sorted(newest.items()):
        node = str(address)
        if address in own_ips:
            reason = (
                f"is the address of this node, whose key is {own_key}; that is to be deleted if the node shall take this one"
            )
            found.append(Member(node, (), (PeerProblem(node, f"etcd key {entry.subnets.name}", node, reason),)))
            continue
        older = [
            PeerProblem(node, f"etcd key {one.subnets.name}", node, f"was written before {entry.subnets.name}, which counts")
            for one in others.get(address, ())
        ]
        found.append(_read_member(node, entry, net_conf, older))
    return tuple(found)


def _is_waiting(entry: Entry, net_conf: NetConf) -> bool:
    """Whether a key is a reservation that its node has not taken yet: nothing is there, and nothing is wrong."""
    return not entry.lease and not entry.attrs.backend and lease.backend_type(net_conf.backend.type) != ""


def _read_member(node: str, entry: Entry, net_conf: NetConf, problems: list[PeerProblem]) -> Member:
    stated = entry.attrs.backend
    if stated != lease.backend_type(net_conf.backend.type):
        reason = f"the backend here is {net_conf.backend.type}; nodes of different backends do not reach each other"
        return Member(node, (), (*problems, PeerProblem(node, "BackendType", stated, reason)))
    found = []
    for family in net_conf.families:
        try:
            found.append(_read_family(node, family, entry.subnets, entry.attrs, net_conf))
        except _Left as left:
            problems.append(PeerProblem(node, left.field, left.value, left.reason))
    return Member(node, tuple(found), tuple(problems))


class _Left(Exception):  # noqa: N818  not an error of ours: a lease that cannot be taken, and why
    def __init__(self, field: str, value: str, reason: str) -> None:
        self.field, self.value, self.reason = field, value, reason
        super().__init__(reason)


def _read_family(node: str, family: int, subnets: Subnets, attrs: LeaseAttrs, net_conf: NetConf) -> Registration:
    key, ip_field = f"etcd key {subnets.name}", "PublicIP" if family == 4 else "PublicIPv6"
    network, subnet, address = net_conf.network_of(family), subnets.of(family), attrs.address(family)
    if subnet is None:
        raise _Left(key, subnets.name, f"has no IPv{family} subnet")
    if not (network is not None and network.version == subnet.version and subnet.subnet_of(network)):  # type: ignore[arg-type]
        raise _Left(key, str(subnet), f"is not inside Network {network}")
    if address is None:
        raise _Left(ip_field, "null", f"has no IPv{family} address")
    reason = why_no_node_address(address, network)
    if reason:
        raise _Left(ip_field, str(address), reason)
    return Registration(node, family, subnet, address, ip_field, _tunnel_end(family, attrs, net_conf), key)


def _tunnel_end(family: int, attrs: LeaseAttrs, net_conf: NetConf) -> Vtep | None:
    backend = net_conf.backend
    if not isinstance(backend, VxlanBackend):
        return None
    field, vtep = "BackendData" if family == 4 else "BackendV6Data", attrs.vtep(family)
    if vtep is None:
        raise _Left(field, "null", "states no VtepMAC")
    if vtep.vni != backend.vni:
        raise _Left(field, lease.print_vtep(vtep), f"the VNI here is {backend.vni}; tunnels of different VNIs do not meet")
    return vtep


def parse_config(text: str) -> NetConf:
    """Read the value of ``<prefix>/config``, a net-conf.json whose subnets etcd hands out. Raises NetConfError."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise NetConfError("config", f"is not JSON: {text[:80]!r}") from error
    if not isinstance(raw, dict):
        raise NetConfError("config", f"is not a JSON object: {text[:80]!r}")
    net_conf = parse_net_conf(raw)
    pools_of(net_conf)
    return net_conf
