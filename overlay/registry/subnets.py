"""Which subnets a cluster without podCIDRs has to hand out: from SubnetMin to SubnetMax, SubnetLen each, by flannel's defaults.

    Network 10.5.0.0/16, SubnetLen 24

    10.5.0.0/24    10.5.1.0/24 ........................... 10.5.255.0/24
    never used     SubnetMin, where none is stated         SubnetMax, where none is stated

Says what there is and what of it is free; who gets which is for ``etcd_claim.py``.

Source: flannel pkg/subnet/config.go (CheckNetworkConfig), pkg/subnet/etcd/local_manager.go (allocateSubnet).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

import msgspec

from clusterstate.objects import IPNetwork
from overlay.netconf import NetConf, NetConfError

CHOICE = 100
"""flannel draws among so many free subnets: few nodes that start at once draw the same one."""


class _Limits(msgspec.Struct, frozen=True):
    prefix: str
    usual: int
    """The usual length of a subnet."""
    longest: int
    """A network may not be smaller than this."""


_LIMITS = {4: _Limits("", 24, 28), 6: _Limits("IPv6", 64, 124)}
_NETWORKS: dict[int, type[IPv4Network | IPv6Network]] = {4: IPv4Network, 6: IPv6Network}


class SubnetPool(msgspec.Struct, frozen=True):
    """The subnets of one family: ``first`` and ``last`` are the first addresses of the first and the last of them."""

    network: IPNetwork
    length: int
    first: int
    last: int

    @property
    def family(self) -> int:
        """4 or 6."""
        return self.network.version

    @property
    def size(self) -> int:
        """Addresses in one subnet."""
        return 1 << (self.network.max_prefixlen - self.length)

    def fits(self, subnet: IPNetwork | None) -> bool:
        """Whether a subnet is one of these."""
        if subnet is None or subnet.version != self.family:
            return False
        return subnet.prefixlen == self.length and self.first <= int(subnet.network_address) <= self.last

    def free(self, taken: Iterable[IPNetwork], limit: int = CHOICE) -> list[IPNetwork]:
        """Return the first ``limit`` subnets that overlap none of ``taken``, in order; taken ones may have any length."""
        own = (one for one in taken if one.version == self.family)
        spans = sorted((int(one.network_address), int(one.broadcast_address)) for one in own)
        found: list[int] = []
        at, size = self.first, self.size
        for start, end in [*spans, (self.last + size, self.last + size)]:
            while len(found) < limit and at <= self.last and at + size <= start:
                found.append(at)
                at += size
            if end >= at:
                at = -(-(end + 1) // size) * size
        return [_NETWORKS[self.family]((start, self.length)) for start in found]


def pool_of(net_conf: NetConf, family: int) -> SubnetPool:
    """Return the subnets of a family that is on. Raises NetConfError for what flannel refuses."""
    network = net_conf.network_of(family)
    assert network is not None, f"IPv{family} is off"
    limits = _LIMITS[family]
    if network.prefixlen > limits.longest:
        raise NetConfError(f"{limits.prefix}Network", f"must be /{limits.longest} or larger to be divided, is {network}")
    stated = net_conf.subnets if family == 4 else net_conf.ipv6_subnets
    length = stated.length or (limits.usual if network.prefixlen <= limits.usual - 2 else network.prefixlen + 2)
    size = 1 << (network.max_prefixlen - length)
    start, end = int(network.network_address), int(network.broadcast_address)
    first = start + size if stated.first is None else int(stated.first)
    last = end + 1 - size if stated.last is None else int(stated.last)
    for name, value, address in (("Min", stated.first, first), ("Max", stated.last, last)):
        if address % size:
            raise NetConfError(f"{limits.prefix}Subnet{name}", f"must be the first address of a /{length}, is {value}")
    if first > last:
        raise NetConfError(f"{limits.prefix}SubnetMin", f"must not be behind {limits.prefix}SubnetMax, is {stated.first}")
    return SubnetPool(network, length, first, last)


def pools_of(net_conf: NetConf) -> tuple[SubnetPool, ...]:
    """Return the pools of all families that are on, IPv4 first. Raises NetConfError, also for a cluster without IPv4."""
    if net_conf.network is None:
        reason = "must be true with leases in etcd: flannel's keys begin with an IPv4 subnet, so IPv6 alone cannot be written"
        raise NetConfError("EnableIPv4", reason)
    return tuple(pool_of(net_conf, family) for family in net_conf.families)
