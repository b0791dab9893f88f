"""A cluster that goes on changing at random, while one flow is forbidden and another allowed in every state of it.

    state --one to three changes--> candidate --what Kubernetes says of the two flows--> next state
                                        ^------------- otherwise: another one ----------'

The flow that is forbidden may be so by egress, by ingress, or by both, and by other policies each time. From one state to the next one
of the two sides goes on forbidding it: a packet is judged on its way out first and on its way in after that, so that where both sides
change their minds at once, one packet in between may meet each while it says yes.
Judged by ``policy_worlds.allowed``, straight from the objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from itertools import count
from random import Random
from typing import NamedTuple, TypeAlias

import msgspec
from immutables import Map
from policy_worlds import allowed

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
from clusterstate.snapshot import Snapshot, Update
from netpolicy.oracle import Flow

SPACES, KEYS, VALUES = ("a", "b"), ("app", "tier"), ("x", "y")
FORBIDDEN, ALLOWED = 90, 80
"""UDP ports."""
ANY = LabelSelector()
FIXED = (("a", "client"), ("a", "friend"), ("a", "server"))
EXTRA = tuple(f"e{i}" for i in range(6))
"""Pods that come and go."""
ADDRESSES = tuple(range(20, 25))
"""Of which they have one each, now this one and now that."""
TRIES = 300

Change: TypeAlias = Callable[[Random, Snapshot], Snapshot]


class World(NamedTuple):
    """Three pods that stay: packets of both kinds go from the client and from the friend to the server."""

    client: tuple[str, str]
    friend: tuple[str, str]
    server: tuple[str, str]
    """Addresses, IPv4 and IPv6."""

    @property
    def forbidden(self) -> list[Flow]:
        return [_flow(a, b, FORBIDDEN) for a, b in zip(self.client, self.server, strict=True)]

    @property
    def allowed(self) -> list[Flow]:
        return [_flow(a, b, ALLOWED) for a, b in zip(self.friend, self.server, strict=True)]

    def start(self) -> Snapshot:
        """Return the first state: the server lets nobody in but its friend."""
        fixed = {"client": self.client, "friend": self.friend, "server": self.server}
        pods = [_pod("a", name, ips, Map({"app": "x", "name": name})) for name, ips in fixed.items()]
        friend = PolicyRule(
            (PolicyPeer(LabelSelector((Requirement("name", "In", ("friend",)),))),), (PolicyPort("UDP", ALLOWED),)
        )
        policy = NetworkPolicy("a", "q0", ANY, ingress=(friend,))
        return Snapshot(
            pods=Map({(one.namespace, one.name): one for one in pods}),
            policies=Map({("a", "q0"): policy}),
            namespaces=Map({name: _namespace(name, Map()) for name in SPACES}),
        )

    def states(self, seed: int) -> Iterator[Update]:
        """Yield one state after the other, for ever, each with what differs from the one before."""
        pick, last = Random(seed), self.start()
        yield Update(last, None)
        for number in count():
            fresh = self._next(pick, last, SEASONS[number // SEASON % len(SEASONS)])
            refs = frozenset(one.ref for one in {*last.objects()} ^ {*fresh.objects()})
            last = fresh
            yield Update(fresh, refs, service_changed=frozenset())

    def verdicts(self, state: Snapshot) -> set[tuple[str, str]]:
        """Return how the forbidden flow is judged on its way out and on its way in, in each family."""
        return {allowed(state, flow) for flow in self.forbidden}

    def _next(self, pick: Random, last: Snapshot, changes: tuple[Change, ...]) -> Snapshot:
        for _ in range(TRIES):
            fresh = last
            for _ in range(pick.choice((1, 1, 2, 3))):
                fresh = pick.choice(changes)(pick, fresh)
            if fresh != last and self._is_fit(last, fresh):
                return fresh
        raise AssertionError("no change leaves the two flows as they are")

    def _is_fit(self, last: Snapshot, fresh: Snapshot) -> bool:
        stays = all(("deny", "deny") in zip(allowed(last, flow), allowed(fresh, flow), strict=True) for flow in self.forbidden)
        return stays and not any("deny" in allowed(fresh, flow) for flow in self.allowed)


def _flow(source: str, destination: str, port: int) -> Flow:
    return Flow(ip_address(source), ip_address(destination), "UDP", port, False)


def _pod(namespace: str, name: str, ips: tuple[str, ...], labels: Map[str, str], node: str = "n1") -> Pod:
    ports = (ContainerPort("web", "UDP", ALLOWED), ContainerPort("db", "UDP", FORBIDDEN))
    return Pod(namespace, name, node, tuple(map(ip_address, ips)), labels=labels, ports=ports)


def _namespace(name: str, labels: Map[str, str]) -> Namespace:
    return Namespace(name, labels.set("kubernetes.io/metadata.name", name))


# -- changes -----------------------------------------------------------------------------------------------------------


def _labels(pick: Random) -> Map[str, str]:
    return Map({key: pick.choice(VALUES) for key in KEYS if pick.random() < 0.6})


def _selector(pick: Random, *, of_pods: bool = True) -> LabelSelector:
    if pick.random() < 0.4:
        return ANY
    if of_pods and pick.random() < 0.4:
        return LabelSelector((Requirement("name", "In", (pick.choice(("client", "friend", "server")),)),))
    operator = pick.choice(("In", "NotIn", "Exists", "DoesNotExist"))
    values = (pick.choice(VALUES),) if operator.endswith("In") else ()
    return LabelSelector((Requirement(pick.choice(KEYS), operator, values),))


def _peer(pick: Random) -> PolicyPeer:
    match pick.randrange(5):
        case 0:
            return PolicyPeer(_selector(pick), _selector(pick, of_pods=False))
        case 1:
            whole, part = pick.choice((("10.244.0.0/16", "10.244.1.0/24"), ("fd00:244::/32", "fd00:244:1::/48")))
            return PolicyPeer(ip_block=IPBlock(ip_network(whole), (ip_network(part),) if pick.random() < 0.5 else ()))
        case _:
            return PolicyPeer(_selector(pick))


def _port(pick: Random) -> PolicyPort:
    match pick.randrange(5):
        case 0:
            return PolicyPort("UDP", pick.choice(("web", "db")))
        case 1:
            return PolicyPort("UDP", 70, pick.choice((85, 95)))
        case 2:
            return PolicyPort("UDP")
        case _:
            return PolicyPort("UDP", pick.choice((ALLOWED, FORBIDDEN)))


def _rules(pick: Random) -> tuple[PolicyRule, ...]:
    return tuple(
        PolicyRule(
            tuple(_peer(pick) for _ in range(pick.choice((0, 1, 1, 2)))),
            tuple(_port(pick) for _ in range(pick.choice((0, 1, 1, 2)))),
        )
        for _ in range(pick.choice((0, 1, 2, 2)))
    )


def change_policy(pick: Random, state: Snapshot) -> Snapshot:
    """Let a policy come, say something else, or go."""
    name = ("a", f"q{pick.randrange(5)}")
    if name in state.policies and pick.random() < 0.3:
        return msgspec.structs.replace(state, policies=state.policies.delete(name))
    ways = pick.choice(((True, False), (False, True), (True, True)))
    policy = NetworkPolicy(*name, _selector(pick), *ways, _rules(pick), _rules(pick))
    return msgspec.structs.replace(state, policies=state.policies.set(name, policy))


def change_cluster_policy(pick: Random, state: Snapshot) -> Snapshot:
    """Let a policy about the whole cluster come, say something else, or go."""
    name = f"c{pick.randrange(2)}"
    if name in state.cluster_policies and pick.random() < 0.5:
        return msgspec.structs.replace(state, cluster_policies=state.cluster_policies.delete(name))
    ways = [tuple(_cluster_rule(pick) for _ in range(pick.choice((0, 1, 2)))) for _ in range(2)]
    subject = PolicyPeer(_selector(pick), _selector(pick, of_pods=False))
    policy = ClusterNetworkPolicy(name, pick.choice(("Admin", "Baseline")), pick.choice((0, 5)), subject, *ways)
    return msgspec.structs.replace(state, cluster_policies=state.cluster_policies.set(name, policy))


def _cluster_rule(pick: Random) -> ClusterPolicyRule:
    peers = (PolicyPeer(_selector(pick), _selector(pick, of_pods=False)),)
    ports = (PolicyPort("UDP", pick.choice((ALLOWED, FORBIDDEN))),) if pick.random() < 0.5 else ()
    return ClusterPolicyRule(peers, ports, pick.choice(("Accept", "Deny", "Pass")))


def change_labels(pick: Random, state: Snapshot) -> Snapshot:
    """Let a pod have other labels."""
    name = pick.choice((*sorted(state.pods), *FIXED, *FIXED))
    pod = state.pods[name]
    own = Map({"name": pod.labels["name"]}) if "name" in pod.labels else Map()
    fresh = msgspec.structs.replace(pod, labels=own.update(_labels(pick)))
    return msgspec.structs.replace(state, pods=state.pods.set(name, fresh))


def change_namespace(pick: Random, state: Snapshot) -> Snapshot:
    """Let a namespace have other labels."""
    name = pick.choice(SPACES)
    return msgspec.structs.replace(state, namespaces=state.namespaces.set(name, _namespace(name, _labels(pick))))


def change_pods(pick: Random, state: Snapshot) -> Snapshot:
    """Let a pod come, here or elsewhere, at an address that may have been another's a moment ago; or go."""
    name = pick.choice(SPACES), pick.choice(EXTRA)
    if name in state.pods and pick.random() < 0.6:
        return msgspec.structs.replace(state, pods=state.pods.delete(name))
    number = pick.choice(ADDRESSES)
    pods = {key: pod for key, pod in state.pods.items() if ip_address(f"10.244.9.{number}") not in pod.ips}
    pods[name] = _pod(*name, (f"10.244.9.{number}", f"fd00:244:9::{number}"), _labels(pick), pick.choice(("n1", "n2")))
    return msgspec.structs.replace(state, pods=Map(pods))


SEASON = 20
"""Updates."""
SEASONS: tuple[tuple[Change, ...], ...] = (
    (change_policy, change_policy, change_policy, change_labels, change_namespace, change_pods, change_cluster_policy),
    (change_labels, change_labels, change_labels, change_namespace, change_pods),
)
"""Either policies change and all else, or what they are about: then nothing is written but who is meant by what is there."""
