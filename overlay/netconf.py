"""flannel's net-conf.json: the pod network and the backend, parsed once and checked.

Decides which fields there are, what they may hold and what they default to. Keys are read without regard to case, as Go's JSON
decoder does it for flannel; an unknown key is an error, where flannel would pass over a misspelt one.

    {"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:244::/56",
     "Backend": {"Type": "vxlan", "VNI": 1, "DirectRouting": true}}

Source: flannel pkg/subnet/config.go, pkg/backend/vxlan/vxlan.go and Documentation/backends.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import ClassVar, Literal, TypeAlias, get_args

import msgspec

MAX_LINK_NAME = 15
"""The kernel keeps 16 bytes with the final zero (IFNAMSIZ)."""
LINK_NAME: dict[int, str] = {4: "flannel.{vni}", 6: "flannel-v6.{vni}"}


class NetConfError(ValueError):
    """A field of net-conf is wrong; the text starts with its path."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        super().__init__(f"{path}: {reason}")


class VxlanBackend(msgspec.Struct, frozen=True):
    """``Type: vxlan``. ``mtu`` is the underlay's, in bytes, before encapsulation takes its share; 0: the uplink's."""

    type: ClassVar[str] = "vxlan"
    vni: int = 1
    port: int = 8472
    mtu: int = 0
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False

    def link_name(self, family: int) -> str:
        """Return the name of the link for one family of outer addresses."""
        return LINK_NAME[family].format(vni=self.vni)


class HostGwBackend(msgspec.Struct, frozen=True):
    """``Type: host-gw``: has no options."""

    type: ClassVar[str] = "host-gw"


class UdpBackend(msgspec.Struct, frozen=True):
    """``Type: udp``: the packet itself as the payload of UDP. ``engine`` and ``mtu`` (the underlay's; 0: the uplink's) are ours."""

    type: ClassVar[str] = "udp"
    port: int = 8285
    mtu: int = 0
    engine: Engine = "auto"


Engine: TypeAlias = Literal["auto", "userspace", "kernel"]
"""Who wraps packets in UDP: a process, or programs in the kernel with that process behind them; ``auto``: what the kernel has."""

Backend: TypeAlias = VxlanBackend | HostGwBackend | UdpBackend


class SubnetRange(msgspec.Struct, frozen=True):
    """Which subnets an etcd registry may hand out; 0 and None are flannel's defaults."""

    length: int = 0
    first: IPv4Address | IPv6Address | None = None
    last: IPv4Address | IPv6Address | None = None


class NetConf(msgspec.Struct, frozen=True):
    """A cluster's pod network. ``network`` and ``ipv6_network`` are None where that family is off."""

    network: IPv4Network | None
    ipv6_network: IPv6Network | None = None
    backend: Backend = VxlanBackend()
    subnets: SubnetRange = SubnetRange()
    ipv6_subnets: SubnetRange = SubnetRange()
    nftables: bool = False
    """Masquerade and forward rules go through nftables instead of iptables."""

    def network_of(self, family: int) -> IPv4Network | IPv6Network | None:
        """Return the pod network of a family."""
        return self.network if family == 4 else self.ipv6_network

    @property
    def families(self) -> tuple[int, ...]:
        """4 and 6, as far as they are on."""
        return tuple(family for family in (4, 6) if self.network_of(family) is not None)


def parse_net_conf(raw: Mapping[str, object]) -> NetConf:
    """Check and convert net-conf as decoded from JSON or YAML. Raises NetConfError naming path and value."""
    fields = _Fields(raw, "", _KEYS)
    network, network6 = fields.network("Network", 4), fields.network("IPv6Network", 6)
    on, on6 = fields.boolean("EnableIPv4", default=True), fields.boolean("EnableIPv6", default=False)
    if not (on or on6):
        raise NetConfError("EnableIPv4", "must be true unless EnableIPv6 is, is False")
    if on and network is None:
        raise NetConfError("Network", "must be given unless EnableIPv4 is false")
    if on6 and network6 is None:
        raise NetConfError("IPv6Network", "must be given with EnableIPv6")
    network, network6 = network if on else None, network6 if on6 else None
    return NetConf(
        network=network,  # type: ignore[arg-type]  # fields.network checked the family
        ipv6_network=network6,  # type: ignore[arg-type]
        backend=_backend(fields.get("Backend"), on, on6),
        subnets=_subnets(fields, "Subnet", network),
        ipv6_subnets=_subnets(fields, "IPv6Subnet", network6),
        nftables=fields.boolean("EnableNFTables", default=False),
    )


_KEYS = (
    *("Network", "EnableIPv4", "SubnetLen", "SubnetMin", "SubnetMax"),
    *("IPv6Network", "EnableIPv6", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"),
    *("EnableNFTables", "Backend"),
)
_BACKEND_KEYS = {
    "vxlan": ("Type", "VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting"),
    "host-gw": ("Type",),
    "udp": ("Type", "Port", "MTU", "Engine"),
}


def _backend(raw: object, on: bool, on6: bool) -> Backend:
    """Read the backend; none at all is vxlan, as flannel's documentation has it (its code would take the slow udp)."""
    if raw is None:
        return VxlanBackend()
    if not isinstance(raw, Mapping):
        raise NetConfError("Backend", f"must be an object, is {raw!r}")
    stated = _Fields({k: v for k, v in raw.items() if str(k).lower() == "type"}, "Backend.", ("Type",)).get("Type")
    kind = stated.lower() if isinstance(stated, str) else ""
    if kind not in _BACKEND_KEYS:
        reason = "must be given" if stated is None else f"is {stated!r}"
        raise NetConfError("Backend.Type", f"{reason}; there are {', '.join(_BACKEND_KEYS)}")
    fields = _Fields(raw, "Backend.", _BACKEND_KEYS[kind])
    if kind == "host-gw":
        return HostGwBackend()
    if kind == "udp":
        return UdpBackend(
            port=fields.number("Port", 0, 0, 65535) or 8285,
            mtu=_mtu(fields, on6=on6, overhead={4: 28, 6: 48}),
            engine=_engine(fields),
        )
    backend = VxlanBackend(
        vni=fields.number("VNI", 1, 0, (1 << 24) - 1),
        port=fields.number("Port", 0, 0, 65535) or 8472,
        mtu=_mtu(fields, on6=on6, overhead={4: 50, 6: 70}),
        gbp=fields.boolean("GBP", default=False),
        learning=fields.boolean("Learning", default=False),
        direct_routing=fields.boolean("DirectRouting", default=False),
    )
    for family, wanted in ((4, on), (6, on6)):
        name = backend.link_name(family)
        if wanted and len(name) > MAX_LINK_NAME:
            raise NetConfError(
                "Backend.VNI", f"makes the link name {name!r}, longer than the kernel's {MAX_LINK_NAME}: {backend.vni}"
            )
    return backend


def _engine(fields: _Fields) -> Engine:
    stated = fields.get("Engine")
    known: dict[object, Engine] = {name: name for name in get_args(Engine)}
    if stated is None:
        return "auto"
    if stated not in known:
        raise NetConfError("Backend.Engine", f"must be one of {', '.join(get_args(Engine))}, is {stated!r}")
    return known[stated]


def _mtu(fields: _Fields, *, on6: bool, overhead: Mapping[int, int]) -> int:
    """Read the underlay's MTU; what is left for pods must be what their family asks for at least (RFC 791, RFC 8200)."""
    least = 1280 + overhead[6] if on6 else 68 + overhead[4]
    mtu = fields.number("MTU", 0, 0, 65535)
    if 0 < mtu < least:
        raise NetConfError("Backend.MTU", f"must be 0 or at least {least}, is {mtu}")
    return mtu


def _subnets(fields: _Fields, prefix: str, network: IPv4Network | IPv6Network | None) -> SubnetRange:
    limit = 126 if prefix == "IPv6Subnet" else 30
    length = fields.number(f"{prefix}Len", 0, 0, limit)
    if network is not None and length and length < network.prefixlen + 2:
        raise NetConfError(f"{prefix}Len", f"must be at least {network.prefixlen + 2} for {network}, is {length}")
    ends = []
    for key in (f"{prefix}Min", f"{prefix}Max"):
        address = fields.address(key)
        if address is not None and network is not None and address not in network:
            raise NetConfError(key, f"must lie inside {network}, is {address}")
        ends.append(address)
    return SubnetRange(length, ends[0], ends[1])


class _Fields:
    """One object's fields by their proper names. Raises for a key it does not know, or knows twice."""

    def __init__(self, raw: Mapping[str, object], at: str, known: tuple[str, ...]) -> None:
        self._at = at
        self._found: dict[str, object] = {}
        names = {name.lower(): name for name in known}
        for key, value in raw.items():
            name = names.get(str(key).lower())
            if name is None:
                raise NetConfError(f"{at}{key}", f"unknown field; there are {', '.join(known)}")
            if name in self._found:
                raise NetConfError(f"{at}{key}", "is there twice, in different case")
            self._found[name] = value

    def get(self, name: str) -> object:
        return self._found.get(name)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._found.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise NetConfError(f"{self._at}{name}", f"must be true or false, is {value!r}")
        return value

    def number(self, name: str, default: int, first: int, last: int) -> int:
        value = self._found.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not first <= value <= last:
            raise NetConfError(f"{self._at}{name}", f"must be a number between {first} and {last}, is {value!r}")
        return value

    def network(self, name: str, family: int) -> IPv4Network | IPv6Network | None:
        """Read a CIDR; host bits are dropped, as Go's net.ParseCIDR does it."""
        text = self._text(name)
        if not text:
            return None
        try:
            # Without a length it would be one address, and hardly what was meant.
            return _NETWORKS[family](text if "/" in text else "", strict=False)
        except ValueError as error:
            raise NetConfError(f"{self._at}{name}", f"must be an IPv{family} CIDR, is {text!r}") from error

    def address(self, name: str) -> IPv4Address | IPv6Address | None:
        text = self._text(name)
        family = 6 if name.startswith("IPv6") else 4
        try:
            return _ADDRESSES[family](text) if text else None
        except ValueError as error:
            raise NetConfError(f"{self._at}{name}", f"must be an IPv{family} address, is {text!r}") from error

    def _text(self, name: str) -> str:
        value = self._found.get(name)
        if value is not None and not isinstance(value, str):
            raise NetConfError(f"{self._at}{name}", f"must be text, is {value!r}")
        return value or ""


_NETWORKS: dict[int, type[IPv4Network | IPv6Network]] = {4: IPv4Network, 6: IPv6Network}
_ADDRESSES: dict[int, type[IPv4Address | IPv6Address]] = {4: IPv4Address, 6: IPv6Address}
