"""The text of ``/run/flannel/subnet.env``, from which flannel's CNI plugin learns the node's pod network and MTU.

Only the text: whoever writes it replaces the file at once, so that a reader sees the old one or the new one.
Source: flannel pkg/subnet/subnet.go, WriteSubnetFile.
"""

from __future__ import annotations

import contextlib
from ipaddress import ip_interface

from clusterstate.objects import IPNetwork
from overlay.table import PeerTable

_NAMES: dict[int, tuple[str, str]] = {
    4: ("FLANNEL_NETWORK", "FLANNEL_SUBNET"),
    6: ("FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"),
}


def print_subnet_env(table: PeerTable, *, ip_masq: bool) -> str:
    """Return the file's text. The subnet is printed as its first host's address, which the pods' bridge takes."""
    lines = []
    for family, (network, subnet) in _NAMES.items():
        way = table.own_way(family)
        if way is not None:
            first = way.pod_cidr.network_address + 1
            lines += [f"{network}={table.net_conf.network_of(family)}", f"{subnet}={first}/{way.pod_cidr.prefixlen}"]
    lines += [f"FLANNEL_MTU={table.mtu}", f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}"]
    return "".join(f"{line}\n" for line in lines)


def read_subnet_env(text: str) -> tuple[IPNetwork, ...]:
    """Return the node's subnets that a file states, IPv4 first; what is not there or makes no sense is left out."""
    stated = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    found = []
    for _network, subnet in _NAMES.values():
        with contextlib.suppress(ValueError):
            found.append(ip_interface(stated.get(subnet, "").strip()).network)
    return tuple(found)
