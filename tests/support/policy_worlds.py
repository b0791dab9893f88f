"""Small clusters with pods, namespaces and policies of both kinds, made so that things meet; and what Kubernetes says of connections.

The latter is evaluated straight from the objects: no table, no index, one policy after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from random import Random
from typing import Protocol

import msgspec
from hypothesis import strategies as st
from immutables import Map

from clusterstate.objects import (
    ClusterNetworkPolicy,
    ClusterPolicyRule,
    ContainerPort,
    IPBlock,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Requirement,
)
from clusterstate.snapshot import Snapshot
from kernelstate.simulate import Packet, Path
from netpolicy.oracle import Flow, Oracle
from netpolicy.table import DIRECTIONS, PolicyTable

NODES = ("n1", "n2")
NAMESPACES = ("a", "b")
MOSTLY_A = ("a", "a", "a", "b")
KEYS, VALUES = ("app", "tier"), ("", "x", "y")
NUMBERS = (80, 81, 443)
NAMES = ("web", "db")
NODE_ADDRESS = ip_address("192.168.1.1")
OUTSIDE = ("192.0.2.7", str(NODE_ADDRESS), "2001:db8::7")
"""Addresses that are no pod's. Pods are 10.244.1.1 to .5 and fd00:244::1 to ::5."""
BLOCKS = (
    "10.244.0.0/16",
    "10.244.1.0/24",
    "10.244.1.0/30",
    "10.244.1.2/32",
    "0.0.0.0/0",
    "192.0.2.0/24",
    "fd00:244::/64",
    "::/0",
)


class Walker(Protocol):
    """A simulator of what is written."""

    def walk(self, packet: Packet) -> tuple[Path, ...]:
        """Return everything that may happen to a packet."""


@st.composite
def selectors(draw) -> LabelSelector:
    requirements = []
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2]))):
        operator = draw(st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]))
        values = tuple(draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=2))) if operator.endswith("In") else ()
        requirements.append(Requirement(draw(st.sampled_from(KEYS)), operator, values))
    return LabelSelector(tuple(requirements))


labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES)).map(Map)


@st.composite
def blocks(draw) -> IPBlock:
    whole = ip_network(draw(st.sampled_from(BLOCKS)))
    smaller = [n for n in map(ip_network, BLOCKS) if n.version == whole.version and n != whole and n.subnet_of(whole)]
    return IPBlock(whole, tuple(draw(st.lists(st.sampled_from(smaller), max_size=2)) if smaller else ()))


@st.composite
def peers(draw) -> PolicyPeer:
    match draw(st.integers(0, 3)):
        case 0:
            return PolicyPeer(draw(selectors()))
        case 1:
            return PolicyPeer(None, draw(selectors()))
        case 2:
            return PolicyPeer(draw(selectors()), draw(selectors()))
        case _:
            return PolicyPeer(ip_block=draw(blocks()))


@st.composite
def ports(draw) -> PolicyPort:
    protocol = draw(st.sampled_from(["TCP", "TCP", "UDP", "SCTP"]))
    match draw(st.integers(0, 3)):
        case 0:
            return PolicyPort(protocol)
        case 1:
            return PolicyPort(protocol, draw(st.sampled_from(NAMES)))
        case 2:
            return PolicyPort(protocol, 80, draw(st.sampled_from([80, 81, 90])))
        case _:
            return PolicyPort(protocol, draw(st.sampled_from(NUMBERS)))


rules = st.builds(PolicyRule, st.lists(peers(), max_size=2).map(tuple), st.lists(ports(), max_size=2).map(tuple))


@st.composite
def policies(draw, name: str) -> NetworkPolicy:
    ingress, egress = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    found = st.lists(rules, max_size=2).map(tuple)
    return NetworkPolicy(draw(st.sampled_from(MOSTLY_A)), name, draw(selectors()), ingress, egress, draw(found), draw(found))


@st.composite
def cluster_rules(draw, direction: str) -> ClusterPolicyRule:
    """Draw a rule as the API has it, or what stands for one with a fault: it denies everything."""
    action = draw(st.sampled_from(["Accept", "Deny", "Pass"]))
    if draw(st.sampled_from([False] * 11 + [True])):
        return ClusterPolicyRule(action="Deny")
    who = [PolicyPeer(draw(st.none() | selectors()), draw(selectors())) for _ in range(draw(st.integers(1, 2)))]
    if direction == "egress" and draw(st.booleans()):
        who += [PolicyPeer(ip_block=IPBlock(ip_network(draw(st.sampled_from(BLOCKS)))))]
        named = False
    else:
        named = draw(st.sampled_from([False, False, True]))
    where = [one for one in draw(st.lists(ports(), max_size=2)) if not isinstance(one.port, str)]
    if named:
        name = draw(st.sampled_from(NAMES))
        where += [PolicyPort(protocol, name) for protocol in ("TCP", "UDP", "SCTP")]
    return ClusterPolicyRule(tuple(who), tuple(where), action, draw(st.sampled_from(["", "why"])))


@st.composite
def cluster_policies(draw, name: str) -> ClusterNetworkPolicy:
    found = {way: tuple(draw(st.lists(cluster_rules(way), max_size=3))) for way in ("ingress", "egress")}
    subject = PolicyPeer(draw(st.none() | selectors()), draw(selectors()))
    tier = draw(st.sampled_from(["Admin", "Admin", "Baseline"]))
    return ClusterNetworkPolicy(name, tier, draw(st.sampled_from([0, 5, 5, 9])), subject, **found)


@st.composite
def pods(draw, name: str) -> Pod:
    number = draw(st.integers(1, 5))
    families = draw(st.sampled_from([(4,), (4,), (6,), (4, 6)]))
    ips = tuple(ip_address(f"10.244.1.{number}" if family == 4 else f"fd00:244::{number}") for family in families)
    return Pod(
        draw(st.sampled_from(MOSTLY_A)),
        name,
        node=draw(st.sampled_from(("n1", "n1", "n1", "n2"))),
        ips=draw(st.sampled_from([ips] * 9 + [()])),
        host_network=draw(st.sampled_from([False] * 11 + [True])),
        phase=draw(st.sampled_from(["Running"] * 9 + ["Succeeded", "Pending"])),
        labels=draw(labels),
        ports=tuple(
            ContainerPort(draw(st.sampled_from((*NAMES, ""))), draw(st.sampled_from(["TCP", "UDP"])), n)
            for n in draw(st.lists(st.sampled_from(NUMBERS), max_size=2))
        ),
    )


@st.composite
def drawn_clusters(draw) -> Snapshot:
    """Draw up to six pods, some of them finished, without address, or claiming one address; up to four policies, and two for all."""
    made_pods = [draw(pods(f"p{i}")) for i in range(draw(st.integers(2, 6)))]
    made_policies = [draw(policies(f"q{i}")) for i in range(draw(st.integers(0, 4)))]
    made_for_all = [draw(cluster_policies(f"c{i}")) for i in range(draw(st.sampled_from([0, 0, 1, 2])))]
    spaces = [Namespace(name, draw(labels).set("kubernetes.io/metadata.name", name)) for name in NAMESPACES]
    return Snapshot(
        pods=Map({(p.namespace, p.name): p for p in made_pods}),
        policies=Map({(p.namespace, p.name): p for p in made_policies}),
        cluster_policies=Map({p.name: p for p in made_for_all}),
        namespaces=Map({s.name: s for s in draw(st.sampled_from([spaces, spaces, spaces[:1]]))}),
    )


ANY = LabelSelector()
CROSSED_PORTS = (
    (),
    (),
    (PolicyPort("TCP", 80),),
    (PolicyPort("UDP"),),
    (PolicyPort("TCP", 80, 443),),
    (PolicyPort("TCP", "http"),),
)


def crossed(seed: int) -> Snapshot:
    """Return five pods with addresses of their own, and policies of both kinds about nearly all of them that contradict one another.

    Made of a seed, because drawn value by value so many rules would hardly ever all be drawn; what fails is not made smaller.
    """
    pick = Random(seed)

    def some() -> LabelSelector:
        return LabelSelector((Requirement(pick.choice(KEYS), pick.choice(("Exists", "DoesNotExist"))),))

    def pod(i: int) -> Pod:
        ips = [f"10.244.1.{i}", *([f"fd00:244::{i}"] if pick.random() < 0.7 else [])]
        marks = Map({key: VALUES[0] for key in KEYS if pick.random() < 0.5})
        http = (ContainerPort("http", "TCP", pick.choice(NUMBERS)),) if pick.random() < 0.5 else ()
        return Pod("a", f"p{i}", pick.choice(("n1", "n1", "n1", "n2")), tuple(map(ip_address, ips)), labels=marks, ports=http)

    def policy(i: int) -> NetworkPolicy:
        ways = [
            [PolicyRule((PolicyPeer(some()),), pick.choice(CROSSED_PORTS)) for _ in range(pick.choice((0, 1, 2)))]
            for _ in DIRECTIONS
        ]
        return NetworkPolicy(
            "a", f"q{i}", pick.choice((ANY, some())), *pick.choice(((True, False), (True, True))), *map(tuple, ways)
        )

    def for_all(i: int) -> ClusterNetworkPolicy:
        ways = []
        for _ in DIRECTIONS:
            actions = [pick.choice(("Accept", "Deny", "Pass")) for _ in range(pick.choice((1, 2, 3, 4)))]
            stated = [ClusterPolicyRule((PolicyPeer(some(), ANY),), pick.choice(CROSSED_PORTS), action) for action in actions]
            ways.append((*stated, *([ClusterPolicyRule(action="Deny")] if pick.random() < 0.15 else [])))
        tier, priority = pick.choice(("Admin", "Admin", "Baseline")), pick.choice((0, 5))
        return ClusterNetworkPolicy(f"c{i}", tier, priority, PolicyPeer(pick.choice((ANY, ANY, some())), ANY), *ways)

    return Snapshot(
        pods=Map({("a", one.name): one for one in map(pod, range(1, 6))}),
        policies=Map({("a", one.name): one for one in map(policy, range(pick.choice((0, 1, 2))))}),
        cluster_policies=Map({one.name: one for one in map(for_all, range(pick.choice((1, 2, 3))))}),
        namespaces=Map({"a": Namespace("a", Map({"kubernetes.io/metadata.name": "a"}))}),
    )


def clusters() -> st.SearchStrategy[Snapshot]:
    """Draw clusters of both sorts: of everything a little, and of policies that contradict one another."""
    return drawn_clusters() | st.integers(0, 2**32).map(crossed)


@st.composite
def histories(draw) -> list[Snapshot]:
    """Draw up to five clusters, of which each is the one before but for its pods, its namespaces or its policies of one kind."""
    stages = [draw(clusters())]
    for _ in range(draw(st.integers(0, 4))):
        part = draw(st.sampled_from(["pods", "pods", "policies", "cluster_policies", "namespaces"]))
        other, last = draw(clusters()), stages[-1]
        fresh = getattr(other, part)
        if part == "pods" and draw(st.booleans()):
            fresh = last.pods.update(dict(list(other.pods.items())[:1]))
        stages.append(msgspec.structs.replace(last, **{part: fresh}))
    return stages


def flows(snapshot: Snapshot) -> list[Flow]:
    """Return every connection worth asking about: between all addresses, on all ports."""
    inside = sorted({ip for pod in snapshot.pods.values() for ip in pod.ips}, key=lambda ip: (ip.version, ip))
    everyone = [*inside, *map(ip_address, OUTSIDE)]
    return [
        Flow(source, destination, protocol, port, from_node)
        for source in everyone
        for destination in everyone
        if source.version == destination.version
        for protocol in ("TCP", "UDP", "SCTP")
        for port in (80, 90, 443)
        for from_node in ((False, True) if source == NODE_ADDRESS else (False,))
    ]


# -- what Kubernetes says, from the objects ----------------------------------------------------------------------------


def assert_met(snapshot: Snapshot, table: PolicyTable, simulator: Walker) -> None:
    """See that each connection fares, walked through what is written, as the oracle says."""
    oracle = Oracle(table)
    for flow in flows(snapshot):
        if (flow.source == NODE_ADDRESS) != flow.from_node or flow.source == flow.destination == NODE_ADDRESS:
            continue
        packet = Packet(flow.protocol.lower(), flow.source, flow.destination, flow.port, from_local=flow.from_node)
        verdicts = {path.verdict for path in simulator.walk(packet)}
        judgement = oracle.judge(flow)
        assert verdicts == {"accept" if judgement.allowed else "drop"}, (flow, judgement)


def allowed(snapshot: Snapshot, flow: Flow) -> tuple[str, str]:
    """Return what is decided for egress and for ingress: allow, deny or none."""
    return _direction(snapshot, flow, "egress"), _direction(snapshot, flow, "ingress")


def _direction(snapshot: Snapshot, flow: Flow, direction: str) -> str:
    own = flow.source if direction == "egress" else flow.destination
    verdicts = [_pod(snapshot, flow, direction, pod) for pod in _living(snapshot) if own in pod.ips]
    return next((word for word in ("deny", "allow") if word in verdicts), "none")


def _pod(snapshot: Snapshot, flow: Flow, direction: str, pod: Pod) -> str:
    isolating = [
        policy
        for policy in snapshot.policies.values()
        if policy.namespace == pod.namespace
        and (policy.isolates_egress if direction == "egress" else policy.isolates_ingress)
        and _fits(policy.pod_selector, pod.labels)
    ]
    around = [
        policy
        for policy in snapshot.cluster_policies.values()
        if getattr(policy, direction) and _is_selected(snapshot, policy.subject, "", pod)
    ]
    if not isolating and not around:
        return "none"
    if flow.source == flow.destination or (direction == "ingress" and flow.from_node):
        return "allow"
    first = _first(snapshot, flow, direction, pod, [policy for policy in around if policy.tier == "Admin"])
    if first in ("Accept", "Deny"):
        return {"Accept": "allow", "Deny": "deny"}[first]
    if isolating:
        every = [(policy.namespace, rule) for policy in isolating for rule in getattr(policy, direction)]
        return "allow" if any(_is_about(snapshot, flow, direction, pod, one) for one in every) else "deny"
    first = _first(snapshot, flow, direction, pod, [policy for policy in around if policy.tier == "Baseline"])
    return {"Accept": "allow", "Deny": "deny"}.get(first, "none")


def _first(snapshot: Snapshot, flow: Flow, direction: str, pod: Pod, tier: list[ClusterNetworkPolicy]) -> str:
    """Return what the first rule of a tier that is about a flow does; nothing if there is none."""
    for policy in sorted(tier, key=lambda one: (one.priority, one.name)):
        for rule in getattr(policy, direction):
            if _is_about(snapshot, flow, direction, pod, ("", rule)):
                return rule.action
    return ""


def _is_about(snapshot: Snapshot, flow: Flow, direction: str, pod: Pod, stated: tuple[str, PolicyRule]) -> bool:
    """Whether a rule, stated by a policy of some namespace, is about a flow."""
    own, rule = stated
    peer = flow.destination if direction == "egress" else flow.source
    there = [pod] if direction == "ingress" else [p for p in _living(snapshot) if flow.destination in p.ips]
    # A name is looked up at a destination that is the peer itself: of two pods with one address, at the one that fits.
    if direction == "egress" and rule.peers:
        there = [p for p in there if any(_is_peer(snapshot, own, one, flow.destination, [p]) for one in rule.peers)]
    if rule.peers and not any(_is_peer(snapshot, own, one, peer) for one in rule.peers):
        return False
    return not rule.ports or any(_is_port(port, flow, there) for port in rule.ports)


def _is_peer(snapshot: Snapshot, own: str, peer: PolicyPeer, address, among: Iterable[Pod] | None = None) -> bool:
    if peer.ip_block is not None:
        block = peer.ip_block
        return address in block.cidr and not any(address in part for part in block.excepts)
    pods_there = _living(snapshot) if among is None else among
    return any(address in pod.ips and _is_selected(snapshot, peer, own, pod) for pod in pods_there)


def _is_selected(snapshot: Snapshot, peer: PolicyPeer, own: str, pod: Pod) -> bool:
    """Whether selectors select a pod, those of a policy in namespace ``own``."""
    if peer.namespace_selector is None:
        in_namespace = pod.namespace == own
    else:
        known = snapshot.namespaces.get(pod.namespace)
        in_namespace = _fits(peer.namespace_selector, known.labels if known else {"kubernetes.io/metadata.name": pod.namespace})
    return in_namespace and (peer.pod_selector is None or _fits(peer.pod_selector, pod.labels))


def _is_port(port: PolicyPort, flow: Flow, there: Iterable[Pod]) -> bool:
    if port.protocol != flow.protocol:
        return False
    if isinstance(port.port, str):
        return any((c.name, c.protocol, c.port) == (port.port, flow.protocol, flow.port) for pod in there for c in pod.ports)
    return port.port is None or port.port <= flow.port <= (port.end_port or port.port)


def _fits(selector: LabelSelector, found) -> bool:
    answers = {
        "In": lambda r: r.key in found and found[r.key] in r.values,
        "NotIn": lambda r: not (r.key in found and found[r.key] in r.values),
        "Exists": lambda r: r.key in found,
        "DoesNotExist": lambda r: r.key not in found,
    }
    return all(answers[r.operator](r) for r in selector.requirements)


def _living(snapshot: Snapshot) -> list[Pod]:
    return [p for p in snapshot.pods.values() if not p.host_network and p.phase not in ("Succeeded", "Failed") and p.ips]
