"""flannel's annotations: read and written as flannel does, and the MAC of a node that has none."""

from __future__ import annotations

import json

import pytest

from overlay.lease import Vtep, annotations_patch, derived_mac, parse_vtep, print_annotations, print_vtep

VTEP = Vtep(1, "12:c6:65:89:b4:e3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}', VTEP),
        ('{"vni":1,"vtepmac":"12:C6:65:89:B4:E3"}', VTEP),
        ('{"VtepMAC":"12:c6:65:89:b4:e3"}', VTEP),
        ("null", None),
        ("", None),
    ],
)
def test_backend_data(text: str, expected: Vtep | None) -> None:
    """backend-data is read whatever the case; null and nothing are no data."""
    assert parse_vtep(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "7",
        '{"VNI":"1","VtepMAC":"12:c6:65:89:b4:e3"}',
        '{"VNI":1}',
        '{"VtepMAC":"12:c6:65:89:b4"}',
        '{"VtepMAC":"01:c6:65:89:b4:e3"}',
        '{"VtepMAC":"00:00:00:00:00:00"}',
    ],
)
def test_refuses(text: str) -> None:
    """Text that is not a VTEP, or whose MAC is nobody's or many's, is an error."""
    with pytest.raises(ValueError):
        parse_vtep(text)


def test_prints_as_flannel_does() -> None:
    """What is written is byte for byte flannel's, and is read back."""
    assert print_vtep(VTEP) == '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}'
    assert parse_vtep(print_vtep(VTEP)) == VTEP
    assert print_annotations("vxlan", {4: "192.168.1.2"}, {4: VTEP}) == {
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/public-ip": "192.168.1.2",
        "flannel.alpha.coreos.com/backend-data": '{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}',
    }
    host_gw = print_annotations("host-gw", {6: "fd00::2"}, {})
    assert json.loads(host_gw["flannel.alpha.coreos.com/backend-v6-data"]) is None
    assert host_gw["flannel.alpha.coreos.com/public-ipv6"] == "fd00::2"
    assert print_annotations("udp", {4: "192.168.1.2"}, {}) == {
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/backend-type": "",
        "flannel.alpha.coreos.com/public-ip": "192.168.1.2",
        "flannel.alpha.coreos.com/backend-data": "null",
    }


def test_patch_holds_what_differs() -> None:
    """The patch of a Node names annotations that are missing or other, leaves those of others alone, and may be nothing."""
    wanted = print_annotations("host-gw", {4: "192.168.1.2"}, {})
    assert annotations_patch(wanted, {}) == {"metadata": {"annotations": wanted}}
    found = {**wanted, "flannel.alpha.coreos.com/public-ip": "192.168.1.9", "somebody/else": "x"}
    patch = {"metadata": {"annotations": {"flannel.alpha.coreos.com/public-ip": "192.168.1.2"}}}
    assert annotations_patch(wanted, found) == patch
    assert annotations_patch(wanted, {**wanted, "somebody/else": "x"}) is None


def test_derived_mac() -> None:
    """The MAC of a node without an annotation is fixed by name, VNI and family, unicast, locally administered, and its own."""
    assert derived_mac("n1", 1, 4) == "f6:86:30:2d:7f:ee"
    macs = {derived_mac(f"n{i}", vni, family) for i in range(500) for vni in (1, 2) for family in (4, 6)}
    assert len(macs) == 2000
    assert {int(mac[:2], 16) & 3 for mac in macs} == {2}
