"""Mode ``routed``: a veth for each pod, to which the node has a route. No bridge: every packet of a pod is routed, and seen by rules.

    pod eth0  10.244.1.5/32                              node
      169.254.1.1 dev eth0 scope link                      vethXXXXXXXX      (no address)
      default via 169.254.1.1          ----- veth -----    10.244.1.5 dev vethXXXXXXXX
      169.254.1.1 lladdr <node's end> PERMANENT            10.244.1.5 lladdr <pod's end> PERMANENT

    IPv6 likewise, with fe80::1. Neither gateway exists anywhere: the permanent neighbour entries make each end reach the other, so
    there is no proxy ARP, no first packet that waits for an answer, and no address that every pod's link would add to the node's.

A pod that reaches itself through a Service comes out of its veth and goes in again like any other packet: no hairpin flag.
Decides how a pod looks from inside. Which addresses it gets is for ``ipam.py``.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

from kernelstate.linux.pod_codec import IPAddress, IPInterface, PodRoute
from kernelstate.linux.pod_link import alias_of, links_in, open_links, random_mac, write_sysctl
from nodeplane.cni.attach import Ends, enable_forwarding, prepare_pod, routes_of
from nodeplane.cni.protocol import Attachment, Json

GATEWAY: dict[int, IPAddress] = {4: ip_address("169.254.1.1"), 6: ip_address("fe80::1")}
ANYWHERE = {4: "0.0.0.0/0", 6: "::/0"}


def make_ends(conf: Json, attachment: Attachment, mac: str) -> Ends:
    """Make the veth pair. Raises KernelRefusedError, and then there is none."""
    far_mac, near_mac = mac or random_mac(), random_mac()
    with open_links() as links:
        alias = alias_of(conf["name"], attachment.container, attachment.ifname)
        near = links.make_pair(attachment.netns, (attachment.ifname, far_mac), near_mac, conf["mtu"], alias)
    return Ends(near, near_mac, far_mac)


def connect(conf: Json, attachment: Attachment, ends: Ends, given: Json) -> Json:
    """Give both ends addresses and routes; return the result. ``given`` is what address management gave."""
    addresses = [host_address(one["address"]) for one in given["ips"]]
    families = {address.version for address in addresses}
    routes = planned_routes(conf, given)
    with links_in(attachment.netns) as pod:
        prepare_pod(attachment.ifname, families)
        gateways = [GATEWAY[family] for family in sorted(families)]
        onlink = [PodRoute(ip_network(GATEWAY[4]), None)] if 4 in families else []
        pod.configure(attachment.ifname, addresses, [(one, ends.near_mac) for one in gateways], [*onlink, *routes_of(routes)])
    enable_forwarding(families)
    if 6 in families:
        write_sysctl(f"ipv6/conf/{ends.near}/disable_ipv6", "0")
    with open_links() as node:
        pods = [address.ip for address in addresses]
        # Replace: a route that somebody left for this address leads nowhere, now that the address is this pod's.
        node.configure(
            ends.near, (), [(ip, ends.far_mac) for ip in pods], [PodRoute(ip_network(ip), None) for ip in pods], replace=True
        )
    return {
        "interfaces": [
            {"name": ends.near, "mac": ends.near_mac, "mtu": conf["mtu"]},
            {"name": attachment.ifname, "mac": ends.far_mac, "mtu": conf["mtu"], "sandbox": attachment.netns},
        ],
        "ips": [{"address": str(a), "gateway": str(GATEWAY[a.version]), "interface": 1} for a in addresses],
        "routes": routes,
        "dns": conf.get("dns") or given["dns"],
    }


def planned_routes(conf: Json, given: Json) -> list[Json]:
    """Return the pod's routes: a default route of each family unless told otherwise, then those that were given."""
    families = sorted({ip_interface(one["address"]).version for one in given["ips"]})
    stated = [one for one in given["routes"] if ip_network(one["dst"], strict=False).version in families]
    routes = [{**one, "gw": str(GATEWAY[ip_network(one["dst"], strict=False).version])} for one in stated]
    if conf.get("isDefaultGateway", True):
        there = {one["dst"] for one in routes}
        routes = [{"dst": ANYWHERE[f], "gw": str(GATEWAY[f])} for f in families if ANYWHERE[f] not in there] + routes
    return routes


def host_address(text: str) -> IPInterface:
    """Return an address as a pod has it: alone, for its neighbours are behind the node like everybody else."""
    return ip_interface(ip_interface(text).ip)
