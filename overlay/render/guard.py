"""The peer table as a guard at the uplink: who may send what, whatever the backend.

    eth0 <-- vxlan from 192.168.1.2, inner source 10.244.2.7     node B's, and B is there: passes
         <-- vxlan from 192.168.1.2, inner source 10.244.3.9     node C's: dropped
         <-- plain, source 10.244.1.5                            this node's own: dropped

Without it anybody who can send a packet to a node can speak as any pod, and replies of Services and policies believe him.
"""

from __future__ import annotations

from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import SourceGuard, TunnelPeer
from overlay.netconf import VxlanBackend
from overlay.table import PeerTable


def render_guard(table: PeerTable) -> SourceGuard | None:
    """Return the guard; None where the node has no end of its own, and so no peers that could be told apart."""
    if not table.own:
        return None
    backend, conf = table.net_conf.backend, table.net_conf
    families = {end.family for end in table.own}
    networks = [conf.network_of(family) for family in sorted(families)]
    return SourceGuard(
        uplink=table.uplink.name,
        own=tuple(sorted(Prefix.of(end.pod_cidr) for end in table.own)),
        network=tuple(Prefix.of(network) for network in networks if network is not None),
        vxlan=((backend.port, backend.vni),) if isinstance(backend, VxlanBackend) else (),
        peers=tuple(sorted(TunnelPeer(Prefix.of(way.pod_cidr), way.public_ip) for peer in table.peers for way in peer.ways)),
    )
