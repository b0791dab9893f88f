"""Addresses as the kernel's rules hold them: a number and a prefix length.

``ipaddress`` is what objects from Kubernetes use; a rule set holds some hundred thousand prefixes, so here a prefix is one
small, hashable, immutable record. ``Prefix`` never has host bits set.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Literal, TypeAlias

import msgspec

Family: TypeAlias = Literal[4, 6]
IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network

BITS: dict[int, int] = {4: 32, 6: 128}


class Prefix(msgspec.Struct, frozen=True, gc=False, order=True):
    """An address prefix: ``Prefix(4, 0x0A000000, 8)`` is 10.0.0.0/8. Host bits are zero."""

    family: Family
    network: int
    length: int

    @classmethod
    def host(cls, address: IPAddress) -> Prefix:
        """Return the /32 or /128 of one address."""
        family = address.version
        return cls(family, int(address), BITS[family])

    @classmethod
    def of(cls, network: IPNetwork) -> Prefix:
        """Return the prefix of an ``ipaddress`` network."""
        return cls(network.version, int(network.network_address), network.prefixlen)

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Parse ``10.0.0.0/8``, ``10.0.0.1``, ``fd00::/64``; host bits are dropped. Raises ValueError."""
        return cls.of(ip_network(text, strict=False))

    @property
    def is_host(self) -> bool:
        """Whether it holds exactly one address."""
        return self.length == BITS[self.family]

    def contains(self, address: IPAddress) -> bool:
        """Whether ``address`` lies inside; an address of the other family never does."""
        shift = BITS[self.family] - self.length
        return address.version == self.family and int(address) >> shift == self.network >> shift

    @property
    def address_text(self) -> str:
        """The network address without the length: ``10.0.0.0``."""
        return address_text(self.family, self.network)

    def __str__(self) -> str:
        """Print as ``10.0.0.0/8``; the length is always there."""
        return f"{address_text(self.family, self.network)}/{self.length}"


_OCTETS = [str(octet) for octet in range(256)]
"""A lookup is half the price of printing a number, and a large cluster has a hundred thousand addresses to print."""


def address_text(family: Family, number: int) -> str:
    """Print an address held as a number."""
    if family == 4:
        octets = _OCTETS
        return f"{octets[number >> 24]}.{octets[number >> 16 & 255]}.{octets[number >> 8 & 255]}.{octets[number & 255]}"
    return str(IPv6Address(number))
