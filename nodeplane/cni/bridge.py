"""Mode ``bridge``: pods are ports of a bridge, which is their gateway; as flannel's plugin has the bridge plugin do it.

    pod eth0  10.244.1.5/24                              node
      10.244.0.0/16 via 10.244.1.1                         cni0  10.244.1.1/24
      default via 10.244.1.1       ----- veth -----          '-- vethXXXXXXXX   (hairpin)

Two pods of one node meet on the bridge, below the rules: only with br_netfilter do these see such packets, and answers from a
neighbour that stands behind a Service need them. So where the kernel has it, it is turned on. A pod that reaches itself through a
Service needs the hairpin flag of its port.

Decides how bridge and pod look. Source: containernetworking/plugins, plugins/main/bridge.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

from kernelstate.errors import KernelRefusedError
from kernelstate.linux.pod_codec import IPInterface
from kernelstate.linux.pod_link import PodLinks, alias_of, links_in, open_links, random_mac, write_sysctl
from nodeplane.cni.attach import Ends, enable_forwarding, prepare_pod, routes_of
from nodeplane.cni.protocol import INVALID_CONFIG, Attachment, CniError, Json

ANYWHERE = {4: "0.0.0.0/0", 6: "::/0"}
NETFILTER = ("bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables")


def make_ends(conf: Json, attachment: Attachment, mac: str) -> Ends:
    """Make the bridge, unless it is there, and the veth pair. Raises KernelRefusedError, and then there is no pair."""
    far_mac, near_mac = mac or random_mac(), random_mac()
    with open_links() as links:
        bridge = links.make_bridge(conf["bridge"], conf["mtu"])
        write_sysctl(f"ipv6/conf/{conf['bridge']}/accept_ra", "0", optional=True)
        for name in NETFILTER:
            write_sysctl(name, "1", optional=True)
        alias = alias_of(conf["name"], attachment.container, attachment.ifname)
        near = links.make_pair(attachment.netns, (attachment.ifname, far_mac), near_mac, conf["mtu"], alias)
        try:
            links.plug(near, bridge, hairpin=conf["hairpinMode"])
        except BaseException:
            links.delete(near)
            raise
    return Ends(near, near_mac, far_mac)


def connect(conf: Json, attachment: Attachment, ends: Ends, given: Json) -> Json:
    """Give the bridge and the pod addresses and routes; return the result. ``given`` is what address management gave."""
    addresses = [ip_interface(one["address"]) for one in given["ips"]]
    families = {address.version for address in addresses}
    gateways = gateways_of(given)
    routes = planned_routes(conf, given)
    with links_in(attachment.netns) as pod:
        prepare_pod(attachment.ifname, families)
        pod.configure(attachment.ifname, addresses, (), routes_of(routes))
    with open_links() as node:
        found = node.link(conf["bridge"])
        if found is None:
            raise KernelRefusedError("find link", conf["bridge"], "somebody deleted it meanwhile")
        if conf["isGateway"]:
            _be_gateway(conf, node, found.ifindex, [one for one in gateways if one is not None])
            enable_forwarding(families)
    return {
        "interfaces": [
            {"name": conf["bridge"], "mac": found.mac, "mtu": found.mtu},
            {"name": ends.near, "mac": ends.near_mac, "mtu": conf["mtu"]},
            {"name": attachment.ifname, "mac": ends.far_mac, "mtu": conf["mtu"], "sandbox": attachment.netns},
        ],
        "ips": [
            {"address": str(a), **({"gateway": str(g.ip)} if g is not None else {}), "interface": 2}
            for a, g in zip(addresses, gateways, strict=True)
        ],
        "routes": routes,
        "dns": conf.get("dns") or given["dns"],
    }


def gateways_of(given: Json) -> list[IPInterface | None]:
    """Return each address's gateway with the length of its subnet, as the bridge bears it."""
    found: list[IPInterface | None] = []
    for one in given["ips"]:
        length = ip_interface(one["address"]).network.prefixlen
        found.append(ip_interface(f"{ip_address(one['gateway'])}/{length}") if one.get("gateway") else None)
    return found


def planned_routes(conf: Json, given: Json) -> list[Json]:
    """Return the pod's routes: through the bridge, where no other gateway is stated."""
    gateway = {one.version: str(one.ip) for one in gateways_of(given) if one is not None}
    routes = []
    for one in given["routes"]:
        family = ip_network(one["dst"], strict=False).version
        routes.append({**one, "gw": one.get("gw") or gateway[family]} if one.get("gw") or family in gateway else dict(one))
    if conf["isDefaultGateway"]:
        there = {one["dst"] for one in routes}
        routes = [{"dst": ANYWHERE[f], "gw": gateway[f]} for f in sorted(gateway) if ANYWHERE[f] not in there] + routes
    return routes


def _be_gateway(conf: Json, node: PodLinks, bridge: int, wanted: list[IPInterface]) -> None:
    """Give the bridge its addresses. One of another subnet is from before the node's changed, and goes only if that was stated."""
    there = node.addresses(bridge)
    families = {one.version for one in wanted}
    others = [one for one in there if one not in wanted and one.version in families and not one.ip.is_link_local]
    if others and not conf["forceAddress"]:
        asked = ", ".join(map(str, wanted))
        raise CniError(
            INVALID_CONFIG, f"bridge: {conf['bridge']} has address {others[0]}, must have {asked}; forceAddress replaces it"
        )
    node.set_addresses(bridge, [one for one in wanted if one not in there], others)
