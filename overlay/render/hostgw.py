"""The peer table as plain routes: each peer's pod network through the peer itself, which must be on the same segment.

    pod --> route 10.244.2.0/24 via 192.168.1.2 dev eth0 --> node B --> pod

Packets travel as they are, at the uplink's full MTU.
"""

from __future__ import annotations

from kernelstate.objects.address import Prefix
from kernelstate.objects.links import LinkState, Route
from overlay.table import PeerTable, Reach, Way


def render_hostgw(table: PeerTable) -> LinkState:
    """Return the routes to peers that are reached directly; there are no others in a host-gw table."""
    ways = [way for peer in table.peers for way in peer.ways if way.reach is Reach.DIRECT]
    return LinkState.of([direct_route(way, table.uplink.name) for way in ways])


def direct_route(way: Way, uplink: str) -> Route:
    """Return the route to one peer's pods through its node."""
    return Route(Prefix.of(way.pod_cidr), way.public_ip, uplink)
