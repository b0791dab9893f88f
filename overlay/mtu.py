"""How large a packet may be on the tunnel and in the pods.

                   outer IPv4                          outer IPv6
    vxlan    20 + UDP 8 + VXLAN 8 + Ethernet 14 = 50    40 + 8 + 8 + 14 = 70 bytes
    udp      20 + UDP 8                         = 28    40 + 8          = 48 bytes

flannel takes 50 from IPv6 as well; the kernel then clamps the link, and pods are told 20 bytes too many. Source: RFC 7348, 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from overlay.netconf import Backend, HostGwBackend, NetConf, UdpBackend, VxlanBackend

VXLAN_OVERHEAD: Mapping[int, int] = {4: 50, 6: 70}
"""Bytes that VXLAN adds, by the family of the outer addresses."""
UDP_OVERHEAD: Mapping[int, int] = {4: 28, 6: 48}
"""Bytes that the UDP backend adds, likewise."""


def tunnel_mtu(underlay: int, family: int) -> int:
    """Return the MTU of a vxlan link over an underlay, both in bytes."""
    return underlay - VXLAN_OVERHEAD[family]


def pod_mtu(net_conf: NetConf, uplink_mtu: int) -> int:
    """Return the MTU for pods: what goes through on every path to every peer, of each family that is on.

    A stated ``Backend.MTU`` counts instead of the uplink's. Direct routes of DirectRouting would let more through, but a pod has
    one MTU for all its peers.
    """
    return min(_of_family(net_conf.backend, uplink_mtu, family) for family in net_conf.families)


def _of_family(backend: Backend, uplink_mtu: int, family: int) -> int:
    match backend:
        case HostGwBackend():
            return uplink_mtu
        case VxlanBackend():
            return tunnel_mtu(backend.mtu or uplink_mtu, family)
        case UdpBackend():
            return (backend.mtu or uplink_mtu) - UDP_OVERHEAD[family]
        case _:
            assert_never(backend)
