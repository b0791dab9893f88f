"""CHECK: whether an attachment is still as ADD's result said, link by link, address by address, route by route.

    prevResult   interfaces  --> there, up, with MAC and MTU; the two ends of one veth
                 ips         --> on their interface
                 routes      --> in the pod
    what a result cannot say --> routed: the node's route and both neighbours; bridge: port, hairpin, gateway address

Plugins that come later may have changed a MAC or an MTU and said so in the result: so that is what counts, not what we made.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from kernelstate.linux.pod_codec import LinkFacts, PodRoute
from kernelstate.linux.pod_link import PodLinks, links_in, open_links
from nodeplane.cni import ipam
from nodeplane.cni.attach import routes_of
from nodeplane.cni.bridge import gateways_of
from nodeplane.cni.config import TYPE
from nodeplane.cni.delegate import call_plugin
from nodeplane.cni.protocol import INVALID_CONFIG, NOT_AS_IT_WAS, Attachment, CniError, Json
from nodeplane.cni.result import parse_result
from nodeplane.cni.routed import GATEWAY
from nodeplane.cni.verbs import Environment, check_netns, made_with


def check(conf: Json, attachment: Attachment, environment: Environment) -> None:
    """Compare. Raises CniError with code 101 naming the first difference."""
    check_netns(attachment, environment)
    if not conf.get("prevResult"):
        raise CniError(INVALID_CONFIG, "prevResult: must be the result of ADD, is missing")
    previous = parse_result(conf["prevResult"])
    made = made_with(conf, attachment)
    if made["type"] != TYPE:
        call_plugin("CHECK", {**made, "prevResult": previous}, environment)
        return
    ipam.ask("CHECK", {**made, "prevResult": previous}, environment)
    with links_in(attachment.netns) as pod:
        far = _check_links(pod, [one for one in previous["interfaces"] if one.get("sandbox")], attachment.netns)
        _check_pod(pod, far, previous, attachment.ifname)
        if made["mode"] == "routed":
            _check_gateways(pod, far[attachment.ifname], _own_ips(previous, attachment.ifname))
    with open_links() as node:
        near = _check_links(node, [one for one in previous["interfaces"] if not one.get("sandbox")], "the node")
        end = next((one for one in near.values() if one.ifindex == far[attachment.ifname].peer and one.kind == "veth"), None)
        if end is None:
            raise _differs(f"{attachment.ifname} in {attachment.netns}", "its other end is none of the result's interfaces")
        if made["mode"] == "routed":
            _check_node_routes(node, end, far[attachment.ifname], _own_ips(previous, attachment.ifname))
        else:
            _check_port(node, made, near, end, previous)


def _differs(what: str, how: str) -> CniError:
    return CniError(NOT_AS_IT_WAS, f"{what}: {how}")


def _check_links(links: PodLinks, stated: list[Json], where: str) -> dict[str, LinkFacts]:
    """Compare links with what a result states of them; return them by name."""
    found = {one.name: one for one in links.links()}
    for one in stated:
        name = one.get("name", "")
        link = found.get(name)
        if link is None:
            raise _differs(f"{name} in {where}", "is missing")
        if not link.up:
            raise _differs(f"{name} in {where}", "is down")
        if one.get("mac") and one["mac"].lower() != link.mac:
            raise _differs(f"{name} in {where}", f"has MAC {link.mac}, must have {one['mac']}")
        if one.get("mtu") and one["mtu"] != link.mtu and link.kind != "bridge":  # a bridge's follows its ports'
            raise _differs(f"{name} in {where}", f"has MTU {link.mtu}, must have {one['mtu']}")
    return {one["name"]: found[one["name"]] for one in stated}


def _check_pod(pod: PodLinks, far: dict[str, LinkFacts], previous: Json, ifname: str) -> None:
    """Compare addresses and routes inside the pod."""
    if ifname not in far:
        raise _differs(ifname, "is none of the result's interfaces")
    for one in previous["ips"]:
        holder = _holder(previous, one, ifname)
        if holder in far and ip_interface(one["address"]) not in pod.addresses(far[holder].ifindex):
            raise _differs(f"{holder} of the pod", f"lacks address {one['address']}")
    routes = pod.routes()
    for raw, wanted in zip(previous["routes"], routes_of(previous["routes"]), strict=True):
        if not any(_is_same(wanted, found) for found in routes):
            raise _differs("the pod", f"lacks route {raw['dst']} via {raw.get('gw') or 'no gateway'}")


def _holder(previous: Json, ip: Json, ifname: str) -> str:
    """Return the name of the interface an address is on; ours, where a result of an old version does not say."""
    index: Any = ip.get("interface")
    interfaces = previous["interfaces"]
    if isinstance(index, int) and 0 <= index < len(interfaces):
        return str(interfaces[index].get("name", ""))
    return ifname


def _own_ips(previous: Json, ifname: str) -> list[Json]:
    return [one for one in previous["ips"] if _holder(previous, one, ifname) == ifname]


def _is_same(wanted: PodRoute, found: PodRoute) -> bool:
    """Whether a route is the one a result states; what it leaves open may be anything."""
    if (wanted.destination, wanted.gateway) != (found.destination, found.gateway):
        return False
    stated = (
        (wanted.mtu, found.mtu),
        (wanted.advmss, found.advmss),
        (wanted.priority, found.priority),
        (wanted.table, found.table),
    )
    return all(want in {0, have} for want, have in stated) and wanted.scope in {-1, found.scope}


def _check_gateways(pod: PodLinks, far: LinkFacts, ips: list[Json]) -> None:
    neighbours = pod.neighbours(far.ifindex)
    for family in sorted({ip_interface(one["address"]).version for one in ips}):
        if GATEWAY[family] not in neighbours:
            raise _differs(f"{far.name} of the pod", f"lacks the permanent neighbour {GATEWAY[family]}")


def _check_node_routes(node: PodLinks, near: LinkFacts, far: LinkFacts, ips: list[Json]) -> None:
    routes = {one.destination for one in node.routes(near.ifindex)}
    neighbours = node.neighbours(near.ifindex)
    for ip in (ip_interface(one["address"]).ip for one in ips):
        if ip_network(ip) not in routes:
            raise _differs(f"{near.name} of the node", f"lacks route {ip_network(ip)}")
        if neighbours.get(ip) != far.mac:
            raise _differs(f"{near.name} of the node", f"lacks the permanent neighbour {ip} with MAC {far.mac}")


def _check_port(node: PodLinks, made: Json, near: dict[str, LinkFacts], end: LinkFacts, previous: Json) -> None:
    bridge = near.get(made["bridge"])
    if bridge is None or bridge.kind != "bridge" or end.master != bridge.ifindex:
        raise _differs(f"{end.name} of the node", f"is no port of {made['bridge']}")
    if made["hairpinMode"] and not end.hairpin:
        raise _differs(f"{end.name} of the node", "lacks hairpin")
    if made["isGateway"]:
        there = node.addresses(bridge.ifindex)
        wanted = [one for one in gateways_of(previous) if one is not None]
        for one in wanted:
            if one not in there:
                raise _differs(f"{made['bridge']} of the node", f"lacks address {ip_address(one.ip)}")
