"""ipset as Linux holds it: named sets of addresses and ports that iptables rules ask.

Source of the forms: ipset(8), kernel include/uapi/linux/netfilter/ipset/ip_set.h.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from kernelstate.objects.address import Family

SetType: TypeAlias = Literal[
    "hash:ip", "hash:net", "hash:ip,port", "hash:net,port", "hash:ip,port,ip", "hash:ip,port,net", "bitmap:port"
]

Member: TypeAlias = tuple[int | str | tuple[int, int], ...]
"""As the type says: addresses and ports as numbers, a port of a hash set preceded by its protocol: ``(ip, "tcp", 80, ip)``.

A network is (address, prefix length), which is never 0: everything is two halves. ``bitmap:port`` members are ``(port,)``.
"""


class SetSpec(NamedTuple):
    """A set without its members. ``family`` is 4 for ``bitmap:port``, which has none."""

    name: str
    type: SetType
    family: Family = 4
    counters: bool = False
    """Whether each member counts the packets of rules that it fits."""


class IpSet(msgspec.Struct, frozen=True):
    """A set with its members. Never changed by whoever receives it."""

    spec: SetSpec
    members: AbstractSet[Member] = frozenset()


IpSets: TypeAlias = dict[str, IpSet]
"""Sets by name."""
