"""What a node tells the others about its end of the tunnel, in flannel's words.

flannel keeps it in annotations of the Node (or as a lease in etcd): how the node is reached, by which backend, and for vxlan the
VNI and the MAC of its end (VTEP):

    flannel.alpha.coreos.com/backend-type: vxlan
    flannel.alpha.coreos.com/backend-data: {"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}
    flannel.alpha.coreos.com/public-ip: 192.168.1.2

A node without them is known all the same: its MAC is then computed from its name, here and there alike, so nobody has to write
anything anywhere, and it stays the same over restarts, new links and new machines.

flannel writes the annotations in ``WRITTEN`` once it runs, and reads those that people set: ``node-public-ip`` is the address to
take, ``public-ip-overwrite`` the one to tell instead of it (a NAT's). It takes another node for a peer only if that one bears
``kube-subnet-manager: "true"``.

Source: flannel pkg/subnet/kube/annotations.go, pkg/subnet/kube/kube.go, pkg/backend/vxlan/vxlan.go.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

import msgspec

PREFIX = "flannel.alpha.coreos.com/"
BACKEND_TYPE = PREFIX + "backend-type"
BACKEND_DATA: Mapping[int, str] = {4: PREFIX + "backend-data", 6: PREFIX + "backend-v6-data"}
PUBLIC_IP: Mapping[int, str] = {4: PREFIX + "public-ip", 6: PREFIX + "public-ipv6"}
PUBLIC_IP_OVERWRITE: Mapping[int, str] = {4: PREFIX + "public-ip-overwrite", 6: PREFIX + "public-ipv6-overwrite"}
NODE_PUBLIC_IP: Mapping[int, str] = {4: PREFIX + "node-public-ip", 6: PREFIX + "node-public-ipv6"}
KUBE_SUBNET_MANAGER = PREFIX + "kube-subnet-manager"
WRITTEN = frozenset({KUBE_SUBNET_MANAGER, BACKEND_TYPE, *BACKEND_DATA.values(), *PUBLIC_IP.values()})
"""What flannel itself writes; a node that bears none of it is not run by flannel."""

_is_mac = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}").fullmatch


class Vtep(msgspec.Struct, frozen=True):
    """One end of a vxlan tunnel: its VNI and the MAC (lower case, colons) that frames to it must bear."""

    vni: int
    mac: str


def parse_vtep(text: str) -> Vtep | None:
    """Read ``backend-data``; None for ``null`` or nothing, which backends without data write. Raises ValueError."""
    if not text.strip():
        return None
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON: {text!r}") from error
    if raw is None:
        return None
    fields = {str(k).lower(): v for k, v in raw.items()} if isinstance(raw, dict) else {}
    vni, mac = fields.get("vni", 1), fields.get("vtepmac")
    if isinstance(vni, bool) or not isinstance(vni, int) or not isinstance(mac, str):
        raise ValueError(f'must be like {{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}}, is {text!r}')  # noqa: TRY004  wrong text
    mac = mac.lower().replace("-", ":")
    if not _is_mac(mac) or int(mac[:2], 16) & 1 or not int(mac.replace(":", ""), 16):
        raise ValueError(f"VtepMAC: must be the MAC of one host, is {fields['vtepmac']!r}")
    return Vtep(vni, mac)


def print_vtep(vtep: Vtep) -> str:
    """Print ``backend-data`` byte for byte as flannel does."""
    return f'{{"VNI":{vtep.vni},"VtepMAC":"{vtep.mac}"}}'


def backend_type(backend: str) -> str:
    """Return a backend as leases and annotations name it: flannel's udp says nothing of itself."""
    return "" if backend == "udp" else backend


def print_annotations(backend: str, public_ips: Mapping[int, str], vteps: Mapping[int, Vtep]) -> dict[str, str]:
    """Return the annotations by which flannel's nodes find this one; ``public_ips`` and ``vteps`` by family."""
    found = {KUBE_SUBNET_MANAGER: "true", BACKEND_TYPE: backend_type(backend)}
    for family, address in public_ips.items():
        found[PUBLIC_IP[family]] = address
        found[BACKEND_DATA[family]] = print_vtep(vteps[family]) if family in vteps else "null"
    return found


def annotations_patch(wanted: Mapping[str, str], found: Mapping[str, str]) -> dict[str, object] | None:
    """Return the strategic merge patch of a Node's ``status`` subresource that makes ``wanted`` true; None: it is.

    Holds what differs from ``found`` and nothing else, so annotations of others stay. flannel patches the same subresource.
    """
    changed = {key: value for key, value in sorted(wanted.items()) if found.get(key) != value}
    return {"metadata": {"annotations": changed}} if changed else None


def derived_mac(node: str, vni: int, family: int) -> str:
    """Return the MAC of a node's end where no annotation states one: locally administered, unicast, from a hash of its name."""
    digest = bytearray(hashlib.sha256(f"vtep {node} {vni} {family}".encode()).digest()[:6])
    digest[0] = digest[0] & 0xFC | 0x02
    return digest.hex(":")
