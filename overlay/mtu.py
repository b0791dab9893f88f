"""How large a packet may be on the tunnel and in the pods.

    outer IPv4: 20 + UDP 8 + VXLAN 8 + inner Ethernet 14 = 50 bytes
    outer IPv6: 40 + UDP 8 + VXLAN 8 + inner Ethernet 14 = 70 bytes

flannel takes 50 from IPv6 as well; the kernel then clamps the link, and pods are told 20 bytes too many. Source: RFC 7348, 5.
"""

from __future__ import annotations

from overlay.netconf import NetConf, VxlanBackend

OVERHEAD: dict[int, int] = {4: 50, 6: 70}
"""Bytes that VXLAN adds, by the family of the outer addresses."""


def tunnel_mtu(underlay: int, family: int) -> int:
    """Return the MTU of a vxlan link over an underlay, both in bytes."""
    return underlay - OVERHEAD[family]


def pod_mtu(net_conf: NetConf, uplink_mtu: int) -> int:
    """Return the MTU for pods: what goes through on every path to every peer, of each family that is on.

    A stated ``Backend.MTU`` counts instead of the uplink's. Direct routes of DirectRouting would let more through, but a pod has
    one MTU for all its peers.
    """
    backend = net_conf.backend
    if not isinstance(backend, VxlanBackend):
        return uplink_mtu
    return min(tunnel_mtu(backend.mtu or uplink_mtu, family) for family in net_conf.families)
