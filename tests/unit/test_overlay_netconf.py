"""net-conf.json: what is taken, what it defaults to, and how an error names its place."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from overlay.mtu import pod_mtu
from overlay.netconf import HostGwBackend, NetConf, NetConfError, SubnetRange, VxlanBackend, parse_net_conf

V4 = {"Network": "10.244.0.0/16"}
V6 = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:244::/48"}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (V4, NetConf(ip_network("10.244.0.0/16"))),
        ({"network": "10.244.3.7/16"}, NetConf(ip_network("10.244.0.0/16"))),
        ({**V4, "Backend": {"Type": "VXLAN"}}, NetConf(ip_network("10.244.0.0/16"), backend=VxlanBackend())),
        ({**V4, "Backend": {"type": "host-gw"}}, NetConf(ip_network("10.244.0.0/16"), backend=HostGwBackend())),
        (
            {**V4, "Backend": {"Type": "vxlan", "vni": 7, "Port": 0, "MTU": 9000, "GBP": True, "directrouting": True}},
            NetConf(ip_network("10.244.0.0/16"), backend=VxlanBackend(7, 8472, 9000, True, False, True)),
        ),
        (
            {**V4, "Backend": {"Type": "vxlan", "Port": 4789}},
            NetConf(ip_network("10.244.0.0/16"), backend=VxlanBackend(port=4789)),
        ),
        (V6, NetConf(None, ip_network("fd00:244::/48"))),
        ({**V4, "IPv6Network": "fd00:244::/48"}, NetConf(ip_network("10.244.0.0/16"))),
        (
            {**V4, "SubnetLen": 24, "SubnetMin": "10.244.9.0"},
            NetConf(ip_network("10.244.0.0/16"), subnets=SubnetRange(24, ip_address("10.244.9.0"))),
        ),
    ],
)
def test_accepts(raw: dict[str, object], expected: NetConf) -> None:
    """Keys are read without regard to case, and what is left out has flannel's defaults."""
    assert parse_net_conf(raw) == expected


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "Network: must be given unless EnableIPv4 is false"),
        ({"Network": "10.244.0.0"}, "Network: must be an IPv4 CIDR, is '10.244.0.0'"),
        ({"Network": "fd00::/48"}, "Network: must be an IPv4 CIDR, is 'fd00::/48'"),
        ({"Network": 10}, "Network: must be text, is 10"),
        ({**V4, "EnableIPv6": True}, "IPv6Network: must be given with EnableIPv6"),
        ({**V4, "EnableIPv6": "yes"}, "EnableIPv6: must be true or false, is 'yes'"),
        ({**V4, "EnableIPv4": False}, "EnableIPv4: must be true unless EnableIPv6 is, is False"),
        ({**V4, "EnableNFTables": 1}, "EnableNFTables: must be true or false, is 1"),
        (
            {**V4, "Backend": {"Type": "udp", "Engine": "warp"}},
            "Backend.Engine: must be one of auto, userspace, kernel, is 'warp'",
        ),
        ({**V4, "Backend": {"Type": "udp", "VNI": 1}}, "Backend.VNI: unknown field; there are Type, Port, MTU, Engine"),
        ({**V4, "Netwrok": 1}, "Netwrok: unknown field; there are Network,"),
        ({**V4, "network": "10.0.0.0/8"}, "network: is there twice, in different case"),
        ({**V4, "Backend": "vxlan"}, "Backend: must be an object, is 'vxlan'"),
        ({**V4, "Backend": {}}, "Backend.Type: must be given; there are vxlan, host-gw"),
        ({**V4, "Backend": {"Type": "wireguard"}}, "Backend.Type: is 'wireguard'; there are vxlan, host-gw"),
        ({**V4, "Backend": {"Type": ["x"]}}, "Backend.Type: is ['x']; there are vxlan, host-gw"),
        ({**V4, "Backend": {"Type": "host-gw", "VNI": 1}}, "Backend.VNI: unknown field; there are Type"),
        (
            {**V4, "Backend": {"Type": "vxlan", "VNI": 1 << 24}},
            "Backend.VNI: must be a number between 0 and 16777215, is 16777216",
        ),
        ({**V4, "Backend": {"Type": "vxlan", "VNI": True}}, "Backend.VNI: must be a number between"),
        ({**V4, "Backend": {"Type": "vxlan", "VNI": 12345678}}, "Backend.VNI: makes the link name 'flannel.12345678'"),
        ({**V6, "Backend": {"Type": "vxlan", "VNI": 12345}}, "Backend.VNI: makes the link name 'flannel-v6.12345'"),
        ({**V4, "Backend": {"Type": "vxlan", "MTU": 100}}, "Backend.MTU: must be 0 or at least 118, is 100"),
        ({**V6, "Backend": {"Type": "vxlan", "MTU": 1300}}, "Backend.MTU: must be 0 or at least 1350, is 1300"),
        ({**V4, "SubnetLen": 17}, "SubnetLen: must be at least 18 for 10.244.0.0/16, is 17"),
        ({**V4, "SubnetMax": "10.245.0.0"}, "SubnetMax: must lie inside 10.244.0.0/16, is 10.245.0.0"),
        ({**V4, "SubnetMin": "x"}, "SubnetMin: must be an IPv4 address, is 'x'"),
    ],
)
def test_refuses(raw: dict[str, object], words: str) -> None:
    """A wrong field is refused with its path and value; every error is a ValueError."""
    with pytest.raises(ValueError) as caught:
        parse_net_conf(raw)
    assert isinstance(caught.value, NetConfError)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("raw", "mtu"),
    [
        (V4, 1450),
        (V6, 1430),
        ({**V4, **V6, "EnableIPv4": True}, 1430),
        ({**V4, "Backend": {"Type": "vxlan", "MTU": 9000}}, 8950),
        ({**V4, "Backend": {"Type": "host-gw"}}, 1500),
    ],
)
def test_pod_mtu(raw: dict[str, object], mtu: int) -> None:
    """VXLAN takes 50 bytes of an IPv4 underlay and 70 of an IPv6 one; host-gw takes none."""
    assert pod_mtu(parse_net_conf(raw), 1500) == mtu
