"""Chain names, computed exactly as kube-proxy computes them, so that people's greps and tools keep working.

    KUBE-SVC-XPGD46QRK7WJZT7O   pool of a ServicePort, policy Cluster       hash of "ns/name:port" + "tcp"
    KUBE-SVL-XPGD46QRK7WJZT7O   pool of a ServicePort, policy Local         same hash
    KUBE-EXT-XPGD46QRK7WJZT7O   traffic from outside                        same hash
    KUBE-FW-XPGD46QRK7WJZT7O    loadBalancerSourceRanges                    same hash
    KUBE-SEP-SXIVWICOYRO3J4NJ   one endpoint                                hash of the same + "10.180.0.1:80"

Sixteen characters of a hash, because iptables allows 28 for a chain name.
Source: kubernetes pkg/proxy/iptables (facts; recomputed against its published examples in tests/unit).
"""

from __future__ import annotations

from hashlib import sha256
from struct import Struct

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
"""Base32 ten bits at a time: a first sync of a large cluster hashes tens of thousands of names."""
_FIRST_BITS = Struct(">QH").unpack_from
"""The first 80 bits of a digest as a number of 64 bits and one of 16."""


def hash16(text: str) -> str:
    """Return the first 16 characters of the RFC 4648 base32 form of ``text``'s SHA-256: its first 80 bits."""
    a, b = _FIRST_BITS(sha256(text.encode()).digest())
    p = _PAIRS
    return (
        f"{p[a >> 54]}{p[a >> 44 & 1023]}{p[a >> 34 & 1023]}{p[a >> 24 & 1023]}"
        f"{p[a >> 14 & 1023]}{p[a >> 4 & 1023]}{p[(a & 15) << 6 | b >> 10]}{p[b & 1023]}"
    )


def port_hash(service_port: str, protocol: str) -> str:
    """Return the hash shared by a ServicePort's SVC, SVL, EXT and FW chains.

    ``service_port`` is ``namespace/name:port`` (no colon for an unnamed port), ``protocol`` in lower case.
    """
    return hash16(service_port + protocol)


def endpoint_chain(service_port: str, protocol: str, endpoint: str) -> str:
    """Return the KUBE-SEP chain of one endpoint; ``endpoint`` is ``10.0.0.1:80`` or ``[fd00::1]:80``."""
    return "KUBE-SEP-" + hash16(service_port + protocol + endpoint)
