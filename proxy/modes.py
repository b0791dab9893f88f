"""How the modes differ: one table of every behaviour that is not the same whichever way Services are written.

The meaning of a Service is one (``table.py``). Where the kernel's means cannot express it, or where kube-proxy's users rely on
what its mode does, a mode deviates, and each deviation has a name here. The oracle judges by it, docs/modes.md tells it with
its reason, and nothing else may differ (tests/property).
"""

from __future__ import annotations

import msgspec


class ModeTraits(msgspec.Struct, frozen=True):
    """What one mode does in its own way. The comment of a field says what True means."""

    name: str
    localhost_node_ports: bool = False
    """NodePorts can answer on 127.0.0.1 (IPv4), and 127.0.0.0/8 is then closed to everything but loopback."""
    firewall_first: bool = True
    """Source ranges are checked before anything else; False: only a frontend with somebody behind it checks them."""
    refuses_everywhere: bool = True
    """A frontend with nobody behind it refuses the node's own packets and packets to the node as well."""
    refuses_node_ports_in_scope: bool = True
    """An unanswered NodePort is refused only where it would answer; False: on every address of the node."""
    refuses_unknown_ports: bool = True
    """A port of a ClusterIP that no Service has is refused; False: the packet is let on."""
    drops_unallocated: bool = False
    """What goes to an address inside a ServiceCIDR that no Service has is dropped."""
    hairpin_everywhere: bool = False
    """A packet from an endpoint to itself is masqueraded wherever the endpoint runs; False: only on its own node."""
    opens_health_check_ports: bool = True
    """Health check ports are let in by a rule, whatever the rules of others say."""
    local_binds_all: bool = False
    """externalTrafficPolicy Local holds for pods and the node itself too: IPVS chooses by destination only."""
    addresses_are_local: bool = False
    """The node holds the Services' addresses itself, so they answer ping, and each of their unknown ports refuses.

    A health check port answers on them too, and a process of the node that asks for a ClusterIP has that as its source: it is
    masqueraded whether or not pods can be told from others.
    """
    one_server: bool = False
    """An address, protocol and port is one Service's alone: its own address before a NodePort, the first kind it is listed as.

    False: where that has nobody to send a packet to, the next that claims the same address and port is tried.
    """
    node_ports_off_link_local: bool = False
    """NodePorts do not answer on link-local addresses: a virtual server cannot tell the links they are on apart."""
    excludes_cidrs: bool = False
    """Service addresses inside excludeCIDRs are somebody else's, and nothing is done for them."""
    primary_node_ports: bool = False
    """Where nodePortAddresses is not set NodePorts answer on the Node's own address only; False: on every address."""
    hashes_clients: bool = True
    """Can send one client to the same endpoint from every node (consistent hashing)."""
    asks_sockets: bool = False
    """A process of the node or of its pods that asks for a Service speaks to an endpoint from its first packet on.

    No packet is translated then, and no source replaced; NodePorts answer the node's own processes on loopback. What sockets leave
    to packets happens as the other traits say.
    """


TRAITS = {
    "iptables": ModeTraits(
        "iptables",
        localhost_node_ports=True,
        firewall_first=False,
        refuses_everywhere=False,
        refuses_node_ports_in_scope=False,
        refuses_unknown_ports=False,
        hairpin_everywhere=True,
        hashes_clients=False,
    ),
    "ipvs": ModeTraits(
        "ipvs",
        local_binds_all=True,
        addresses_are_local=True,
        one_server=True,
        node_ports_off_link_local=True,
        excludes_cidrs=True,
    ),
    "nftables": ModeTraits(
        "nftables",
        drops_unallocated=True,
        opens_health_check_ports=False,
        primary_node_ports=True,
    ),
    "ebpf": ModeTraits(
        "ebpf",
        drops_unallocated=True,
        opens_health_check_ports=False,
        primary_node_ports=True,
        asks_sockets=True,
    ),
}
"""The traits of each mode by its name in the configuration."""
