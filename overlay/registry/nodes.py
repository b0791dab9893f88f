"""Who is in the overlay, by the Node objects: each node's pod network, address and tunnel end, as far as each states them.

Looks at one node at a time; what nodes claim against each other is judged in ``compile.py``. Where flannel's annotations are
there they count, so that a node may be run by either; the order for the address is flannel's. ``public-ip`` comes before
``node-public-ip``, since it is what flannel's nodes send to, and all nodes must send to the same:

    public-ip-overwrite  >  public-ip (not the own node's)  >  node-public-ip  >  status.addresses (InternalIP)

    kube-subnet-manager   others of flannel's annotations    a peer?
    "true"                any                                yes: flannel runs it, or we and somebody wrote them
    anything else, none   some that flannel writes           no: flannel has begun with it or left it, and no node of its takes it
    none                  none                               yes: one of ours, about which nobody had to write anything
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

from clusterstate.objects import IPAddress, Node
from overlay import lease
from overlay.lease import Vtep
from overlay.netconf import NetConf, VxlanBackend
from overlay.registration import Member, Registration, why_no_node_address
from overlay.table import PeerProblem, PeerTable


def read_nodes(nodes: Mapping[str, Node], own: str, net_conf: NetConf) -> list[Member]:
    """Return every node as its object states it, seen from node ``own``."""
    members = []
    for name, node in nodes.items():
        found, problems = read_node(node, net_conf, own=name == own)
        members.append(Member(name, tuple(found), tuple(problems)))
    return members


def read_node(node: Node, net_conf: NetConf, *, own: bool) -> tuple[list[Registration], list[PeerProblem]]:
    """Return the node's registrations in the families that are on, and what keeps others out.

    On the ``own`` node only the configuration says which backend runs: annotations of an earlier one do not count.
    """
    found: list[Registration] = []
    problems: list[PeerProblem] = []
    manager = node.annotations.get(lease.KUBE_SUBNET_MANAGER)
    if manager != "true" and not own and any(key in node.annotations for key in lease.WRITTEN):
        reason = "flannel has annotated the node but does not run it: this must be true"
        return [], [PeerProblem(node.name, f"annotation {lease.KUBE_SUBNET_MANAGER}", manager or "", reason)]
    stated = node.annotations.get(lease.BACKEND_TYPE)
    if stated is not None and not own and lease.backend_type(stated.lower()) != lease.backend_type(net_conf.backend.type):
        reason = f"the backend here is {net_conf.backend.type}; nodes of different backends do not reach each other"
        return [], [PeerProblem(node.name, f"annotation {lease.BACKEND_TYPE}", stated, reason)]
    for family in net_conf.families:
        try:
            found.append(_read_family(node, family, net_conf, own=own))
        except _Left as left:
            problems.append(PeerProblem(node.name, left.field, left.value, left.reason))
    return found, problems


class _Left(Exception):  # noqa: N818  not an error of ours: a node that cannot be taken, and why
    def __init__(self, field: str, value: str, reason: str) -> None:
        self.field, self.value, self.reason = field, value, reason
        super().__init__(reason)


def _read_family(node: Node, family: int, net_conf: NetConf, *, own: bool) -> Registration:
    network = net_conf.network_of(family)
    pod_cidr = next((c for c in node.pod_cidrs if c.version == family), None)
    if pod_cidr is None:
        raise _Left("spec.podCIDRs", ", ".join(map(str, node.pod_cidrs)), f"has no IPv{family} pod network")
    if not (network is not None and network.version == pod_cidr.version and pod_cidr.subnet_of(network)):  # type: ignore[arg-type]
        raise _Left("spec.podCIDRs", str(pod_cidr), f"is not inside Network {network}")
    address, field = _public_ip(node, family, own=own)
    reason = why_no_node_address(address, network)
    if reason:
        raise _Left(field, str(address), reason)
    return Registration(node.name, family, pod_cidr, address, field, _vtep(node, family, net_conf, own=own))


def _public_ip(node: Node, family: int, *, own: bool) -> tuple[IPAddress, str]:
    """Return a node's address and who says it; of the own node ``public-ip`` is what we say, and nothing to go by."""
    said = () if own else (lease.PUBLIC_IP[family],)
    for key in (lease.PUBLIC_IP_OVERWRITE[family], *said, lease.NODE_PUBLIC_IP[family]):
        text = node.annotations.get(key)
        if not text:
            continue
        try:
            address = ip_address(text)
        except ValueError as error:
            raise _Left(f"annotation {key}", text, f"is not an IPv{family} address") from error
        if address.version != family:
            raise _Left(f"annotation {key}", text, f"is not an IPv{family} address")
        return address, f"annotation {key}"
    internal = node.internal_ip(family)
    if internal is None:
        raise _Left("status.addresses", ", ".join(str(a.ip) for a in node.addresses), f"has no IPv{family} InternalIP")
    return internal, "status.addresses"


def own_annotations(table: PeerTable, node: Node) -> dict[str, str]:
    """Return the annotations by which flannel's nodes find the own one; ``public-ip`` as it stands on the Node does not count.

    The address is the one that people state (``read_node`` saw that it is one); else the Node's own, if the link to the others has it, else that link's.
    """
    addresses: dict[int, str] = {}
    for way in table.own:
        family = way.family
        stated = (node.annotations.get(key) for key in (lease.PUBLIC_IP_OVERWRITE[family], lease.NODE_PUBLIC_IP[family]))
        internal, held = node.internal_ip(family), [own.ip for own in table.uplink.addresses]
        address = internal if internal in held else table.uplink.address(family) or internal
        addresses[family] = next(filter(None, stated), str(address or way.public_ip))
    vteps = {way.family: way.vtep for way in table.own if way.vtep is not None}
    return lease.print_annotations(table.net_conf.backend.type, addresses, vteps)


def _vtep(node: Node, family: int, net_conf: NetConf, *, own: bool) -> Vtep | None:
    """Return the tunnel end that an annotation states, else the one that follows from the name; None without tunnels."""
    backend = net_conf.backend
    if not isinstance(backend, VxlanBackend):
        return None
    derived = Vtep(backend.vni, lease.derived_mac(node.name, backend.vni, family))
    key = lease.BACKEND_DATA[family]
    text = node.annotations.get(key, "")
    try:
        stated = lease.parse_vtep(text)
    except ValueError as error:
        raise _Left(f"annotation {key}", text, str(error)) from error
    if stated is None or (own and stated.vni != backend.vni):
        return derived
    if stated.vni != backend.vni:
        raise _Left(f"annotation {key}", text, f"the VNI here is {backend.vni}; tunnels of different VNIs do not meet")
    return stated
