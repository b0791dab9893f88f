"""Where a packet leaves to under a ``LinkState``, by the kernel's own steps: route, gateway, neighbour, forwarding entry.

    destination --longest prefix--> Route --via, or the destination itself--> Neigh --MAC--> FdbEntry --> outer destination
                                      '-- dev is a TUN --longest prefix--> TunnelPeer -------------------> outer destination

Only what is in the state is looked at: a packet that no route of ours takes goes the node's other ways (None), and those that a
longer route of somebody else takes, as to the node's own pods, are not known here. A step that finds nothing is a packet that is
dropped (by a TUN's reader: refused), and the answer says at which step.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kernelstate.objects.address import IPAddress
from kernelstate.objects.links import LinkState, Route, Tun
from kernelstate.objects.tunnel import UdpTunnel


class Leaving(msgspec.Struct, frozen=True):
    """A packet leaves through ``link`` to the next hop: the gateway, or through a tunnel the outer destination.

    ``lost`` names the step that found nothing; the packet is then dropped.
    """

    link: str
    next_hop: IPAddress | None
    tunnel: bool
    lost: Literal["", "neighbour", "forwarding entry", "peer"] = ""


def simulate_links(state: LinkState, destination: IPAddress, tunnel: UdpTunnel | None = None) -> Leaving | None:
    """Return how a packet leaves, or None if no route of this state takes it; ``tunnel`` is what the TUN's reader knows."""
    route = _lookup(state, destination)
    if route is None:
        return None
    gateway = route.via or destination
    if route.link not in state.own_links:
        return Leaving(route.link, gateway, tunnel=False)
    if any(link.name == route.link and isinstance(link.kind, Tun) for link in state.links):
        outer = _peer(tunnel, route.link, destination)
        return Leaving(route.link, outer, tunnel=True, lost="" if outer else "peer")
    mac = next((n.mac for n in state.neighbours if (n.link, n.address) == (route.link, gateway)), None)
    if mac is None:
        return Leaving(route.link, None, tunnel=True, lost="neighbour")
    outer = next((e.destination for e in state.fdb if (e.link, e.mac) == (route.link, mac)), None)
    return Leaving(route.link, outer, tunnel=True, lost="" if outer else "forwarding entry")


def _peer(tunnel: UdpTunnel | None, link: str, destination: IPAddress) -> IPAddress | None:
    """Return where the peer with the longest prefix is."""
    if tunnel is None or tunnel.link != link:
        return None
    fitting = [p for p in tunnel.peers if p.prefix.contains(destination)]
    return max(fitting, key=lambda p: p.prefix.length).address if fitting else None


def _lookup(state: LinkState, destination: IPAddress) -> Route | None:
    """Return the route with the longest prefix, of these the one with the lowest metric."""
    if any(a.address == destination for a in state.addresses):
        return None  # the local table comes before all others
    fitting = [r for r in state.routes if r.destination.contains(destination)]
    return min(fitting, key=lambda r: (-r.destination.length, r.metric), default=None)
