"""Prints links, addresses, neighbours, routes and forwarding entries as input for ``ip -batch`` and ``bridge -batch``.

One text with a section for each tool; every line that starts with ``#`` is a comment to both. Given to an empty namespace with
the underlay link in it, the text makes exactly the state it was printed from. Source: ip-link(8), ip-route(8), bridge(8).
"""

from __future__ import annotations

from collections.abc import Iterable

from kernelstate.objects.address import Prefix
from kernelstate.objects.links import LinkState, Tun

IP_HEADER = "# ip -batch -"
BRIDGE_HEADER = "# bridge -batch -"


def print_links(state: LinkState) -> str:
    """Return both sections, in the order in which they are to be run; same state, same bytes. Empty for an empty state."""
    ip: list[str] = []
    for link in state.links:
        if not link.accept_ra:
            ip.append(f"# sysctl -w net/ipv6/conf/{link.name}/accept_ra=0")
        if isinstance(link.kind, Tun):
            ip += [f"tuntap add dev {link.name} mode tun multi_queue vnet_hdr", f"link set dev {link.name} mtu {link.mtu}"]
        else:
            ip.append(f"link add name {link}")
        if link.tx_checksum is not None:
            ip.append(f"# ethtool -K {link.name} tx {'on' if link.tx_checksum else 'off'}")
        ip.append(f"link set dev {link.name} alias {link.alias} {'up' if link.up else 'down'}")
    # The kernel probes for duplicates of IPv6 addresses for a second or more; nobody else can have these.
    ip += [f"address replace {a}{' nodad' if a.address.version == 6 else ''}" for a in state.addresses]
    ip += [f"neigh replace {n}" for n in state.neighbours]
    ip += [f"route replace {r}" for r in state.routes]
    bridge = [f"fdb replace {e}" for e in state.fdb]
    sections = [(IP_HEADER, ip), (BRIDGE_HEADER, bridge)]
    return "".join(f"{header}\n" + "".join(f"{line}\n" for line in lines) for header, lines in sections if lines)


def print_service_link(name: str, addresses: Iterable[Prefix]) -> str:
    """Return the lines for a dummy link that holds host addresses, for ``ip -batch`` alone."""
    lines = [f"link add name {name} type dummy"]
    lines += [f"address replace {a}{' nodad' if a.family == 6 else ''} dev {name}" for a in addresses]
    return "".join(f"{line}\n" for line in lines)
