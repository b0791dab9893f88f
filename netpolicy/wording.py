"""Rules in words, for comments beside the kernel's rules and for people who ask why.

from pods with app=web in namespaces with team=a; from 10.0.0.0/8 except 10.1.0.0/16; to ports TCP 80, TCP 8000-8080, TCP http
"""

from __future__ import annotations

from clusterstate.objects import ClusterPolicyRule, LabelSelector, PolicyPeer, PolicyPort, PolicyRule, Requirement
from clusterstate.parse_policy import NOBODY


def rule_words(rule: PolicyRule, *, inward: bool) -> str:
    """Say what a rule is about, and in a tier what it does; ``inward`` for ingress."""
    word = "from" if inward else "to"
    parts = [f"{word} {peer_words(peer)}" for peer in rule.peers] or [f"{word} anywhere"]
    ports = ", ".join(port_words(port) for port in rule.ports) or "all ports"
    words = "; ".join([*parts, f"on {ports}"])
    if not isinstance(rule, ClusterPolicyRule):
        return words
    return f"{rule.action} ({rule.name}): {words}" if rule.name else f"{rule.action}: {words}"


def peer_words(peer: PolicyPeer) -> str:
    """Say who a peer is."""
    if peer == NOBODY:
        return "nobody"
    if peer.ip_block is not None:
        excepts = ", ".join(map(str, peer.ip_block.excepts))
        return f"{peer.ip_block.cidr}" + (f" except {excepts}" if excepts else "")
    chosen = selector_words(peer.pod_selector)
    pods = f"pods with {chosen}" if chosen else "pods"
    if peer.namespace_selector is None:
        return f"{pods} of its namespace"
    spaces = selector_words(peer.namespace_selector)
    return f"{pods} in namespaces with {spaces}" if spaces else f"{pods} in all namespaces"


def selector_words(selector: LabelSelector | None) -> str:
    """Say what labels must be; empty where nothing is required."""
    return " and ".join(_requirement(one) for one in selector.requirements) if selector else ""


def port_words(port: PolicyPort) -> str:
    """Say which port."""
    if port.port is None:
        return f"{port.protocol} on every port"
    return f"{port.protocol} {port.port}" + (f"-{port.end_port}" if port.end_port else "")


def shorten(text: str, most: int) -> str:
    """Cut a comment to the number of bytes that the kernel keeps; quotes would end it."""
    text = text.replace('"', "'")
    return text if len(text.encode()) <= most else text.encode()[: most - 3].decode(errors="ignore") + "..."


def _requirement(one: Requirement) -> str:
    match one.operator:
        case "Exists":
            return one.key
        case "DoesNotExist":
            return f"no {one.key}"
        case "In" if len(one.values) == 1:
            return f"{one.key}={one.values[0]}"
        case _:
            return f"{one.key} {'in' if one.operator == 'In' else 'not in'} ({', '.join(one.values)})"
