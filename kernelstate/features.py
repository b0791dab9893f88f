"""Names of what a kernel or host may lack. Pure: the probes that ask are in ``linux/``, and they ask, never compare versions.

A name is what an error, a skip and ``nodeplane status`` say; keep them stable.
"""

from __future__ import annotations

from enum import StrEnum


class Feature(StrEnum):
    """One thing that may be missing."""

    IPTABLES_LEGACY = "iptables-legacy"
    IPTABLES_NFT = "iptables-nft"
    IPVS = "ipvs"
    IPSET = "ipset"
    DUMMY_LINK = "dummy link"
    NFTABLES = "nftables"
    UDP_FORWARDER = "udp forwarder"
    TUNNEL_PROGRAMS = "udp tunnel in the kernel"
    SOURCE_GUARD = "source guard"
    SOCKET_PROGRAMS = "programs at sockets"
    SHORT_LANE = "short lane"
