"""Denied packets in words: what is read of a logged packet, and the line that comes of it."""

import pytest

from kernelstate.linux.nflog import Logged, packet_of
from netpolicy.render.denied import DeniedLog
from nodeplane.config import parse_config
from nodeplane.config_fields import ConfigError
from nodeplane.denied import denied_line

V4 = bytes.fromhex("4500002800000000400600000af401020af40203") + bytes.fromhex("1f9000500000")
V6 = bytes.fromhex("6000000000081140") + bytes(15) + b"\x01" + bytes(15) + b"\x02" + bytes.fromhex("00350036")
NAMES = {"10.244.1.2": "shop/web-1"}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (V4, Logged("p", "TCP", "10.244.1.2", "10.244.2.3", 8080, 80)),
        (V4[:20], Logged("p", "TCP", "10.244.1.2", "10.244.2.3")),
        (V4[:6] + b"\x00\x07" + V4[8:], Logged("p", "TCP", "10.244.1.2", "10.244.2.3")),
        (V4[:9] + b"\x01" + V4[10:], Logged("p", "ICMP", "10.244.1.2", "10.244.2.3")),
        (V6, Logged("p", "UDP", "::1", "::2", 53, 54)),
        (V4[:19], None),
        (b"", None),
        (b"\xff" * 60, None),
    ],
    ids=["TCP", "cut off", "fragment", "ICMP", "IPv6", "too short", "nothing", "no IP"],
)
def test_logged_packet(data, found):
    """Addresses, protocol and ports are read of whatever is there; what is no IP packet is passed over."""
    assert packet_of("p", data) == found


def test_line():
    """Both ends have their pod's name where it is known."""
    packet = Logged("nodeplane-egress", "TCP", "10.244.1.2", "fd00::1", 8080, 80)
    assert denied_line(packet, NAMES) == "denied egress shop/web-1 (10.244.1.2:8080) -> [fd00::1]:80 TCP"


def config(**policy):
    """Parse a configuration with this policy section."""
    return parse_config(
        {"apiVersion": "nodeplane.dev/v1alpha1", "kind": "NodeConfiguration", "nodeName": "n1", "policy": policy}
    )


def test_configuration():
    """Nothing is logged unless that is asked for; a rate that makes no sense is refused with its field."""
    assert config(enabled=True).policy_log is None
    assert config(enabled=True, logDenied=True).policy_log == DeniedLog(10, 20)
    assert config(enabled=True, logDenied=True, logPerSecond=3).policy_log == DeniedLog(3, 6)
    assert config(enabled=False, logDenied=True).policy_log is None
    for wrong in (0, 1001):
        with pytest.raises(ConfigError, match=f"policy.logPerSecond: must be between 1 and 1000, is {wrong}"):
            config(enabled=True, logPerSecond=wrong)
