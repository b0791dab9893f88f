"""From policies of both kinds, pods and namespaces to the table of one node; as incremental as the change is small. Pure.

    snapshot --changed--> which pods is a policy about?           (targets.py)      pods.policies, pods.tiers
                          which pods does a peer select?        (selections.py)    rule.pods
                          where do named ports lead?                               rule.doors

Only policies that are about a pod of this node are looked at any further: the peers of others cost nothing here. A pod is a pod in
this sense while it has addresses of its own: not before it is given any, not on the node's network, and not once it has ended,
for then its address may be another's (kubernetes#92697). Whether it is ready does not matter.

Of ClusterNetworkPolicies of one tier with one priority, which the API leaves to us, the first by name comes first.

Source: Kubernetes networking/v1 types.go, KEP-2079 (port ranges); sigs.k8s.io/network-policy-api v1alpha2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec

from clusterstate.objects import ClusterNetworkPolicy, ClusterPolicyRule, NetworkPolicy, ObjectRef, Pod, PolicyPort, PolicyRule
from clusterstate.snapshot import Name, Snapshot
from netpolicy.blocks import intervals
from netpolicy.selections import PeerChange, Selection, Selections
from netpolicy.table import (
    DIRECTIONS,
    AllowRule,
    Direction,
    Door,
    PodPolicy,
    PolicyTable,
    PortRange,
    RuleKey,
    Tiers,
    join_ports,
)
from netpolicy.targets import EVERYWHERE, Stated, Targets, stated_policy
from netpolicy.wording import rule_words

LAST_PORT = 65535


class PolicyChange(msgspec.Struct, frozen=True):
    """What of a table may differ from the one before: pods and policies by name, with what stood there (None: nothing)."""

    pods: dict[Name, PodPolicy | None]
    rules: dict[Name, tuple[AllowRule, ...] | None]
    peers: dict[RuleKey, PeerChange]
    """Rules of other policies than these that differ in nothing but the pods among their peers, and by which."""


def compile_policies(snapshot: Snapshot, node: str | None) -> PolicyTable:
    """Return the table of one node's pods; None: of every pod in the cluster."""
    compiler = PolicyCompiler(node)
    compiler.update(snapshot, None)
    return compiler.table


class PolicyCompiler:
    """One node's table (or with ``node`` None the whole cluster's), moved along by snapshots."""

    def __init__(self, node: str | None) -> None:
        self.node = node
        self.pods: dict[Name, PodPolicy] = {}
        self.rules: dict[Name, tuple[AllowRule, ...]] = {}
        self._snapshot = Snapshot()
        self._selections = Selections()
        self._targets = Targets()

    @property
    def table(self) -> PolicyTable:
        """The table as it stands; its mappings change with the next update."""
        return PolicyTable(self.pods, self.rules)

    def update(self, snapshot: Snapshot, changed: frozenset[ObjectRef] | None) -> PolicyChange:
        """Take in a snapshot. ``changed`` names every object that differs from the one before; None: any may."""
        before, self._snapshot = self._snapshot, snapshot
        pods, namespaces, policies = _changed(before, snapshot, changed)
        pods |= {name for name in {*before.pods, *snapshot.pods} if name[0] in namespaces} if namespaces else set()
        for name in pods:
            self._selections.move(name, live(snapshot.pods.get(name)), snapshot.namespaces)
        stale = {name for name in policies if name in self.rules}
        touched, about = self._targets.move(snapshot, pods, policies, self._here, self._selections.candidates)
        touched |= {name for name in pods if name in self.pods}
        stale |= {name for name in self._targets.used() if name not in self.rules}
        stale |= {name for name in self.rules if not self._targets.of(name)}
        stale |= self._with_doors(about)
        change = PolicyChange({}, {}, {})
        moved = self._selections.take_changes()
        for name in sorted(self._selections.users(moved) - stale):
            self._move_peers(name, moved, change.peers)
        for name in sorted(stale):
            _settle(self.rules, name, self._rules(name), change.rules)
        for name in sorted(touched):
            _settle(self.pods, name, self._pod(name), change.pods)
        return change

    def _move_peers(self, name: Name, moved: Mapping[Selection, PeerChange], noted: dict[RuleKey, PeerChange]) -> None:
        """Bring a policy's rules up to selections that changed; costs the change, not what they hold."""
        policy = stated_policy(self._snapshot, name)
        assert policy is not None
        after = []
        for rule in self.rules[name]:
            selections = _selections(policy, _stated_rules(policy, rule.key.direction)[rule.key.number])
            changes = [moved[one] for one in selections if one in moved]
            if changes:
                pods = self._selections.addresses(selections)
                come = frozenset(ip for one in changes for ip in one.come if ip not in rule.pods)
                gone = frozenset(ip for one in changes for ip in one.gone if ip not in pods)
                if come or gone:
                    noted[rule.key] = PeerChange(come, gone)
                rule = msgspec.structs.replace(rule, pods=pods)  # noqa: PLW2901
            after.append(rule)
        self.rules[name] = tuple(after)

    def _here(self, name: Name) -> Pod | None:
        pod = live(self._snapshot.pods.get(name))
        return pod if pod is not None and self.node in (None, pod.node) else None

    # -- what stands in the table --------------------------------------------------------------------------------------

    def _pod(self, name: Name) -> PodPolicy | None:
        pod = self._here(name)
        if pod is None:
            return None
        isolating: dict[Direction, list[Name]] = {"ingress": [], "egress": []}
        tiers: dict[str, list[tuple[int, Name]]] = defaultdict(list)
        for policy in self._targets.policies(name):
            stated = stated_policy(self._snapshot, policy)
            assert stated is not None
            for direction in DIRECTIONS:
                if isinstance(stated, NetworkPolicy):
                    isolating[direction] += [policy] if _isolates(stated, direction) else []
                elif _stated_rules(stated, direction):
                    tiers[direction + stated.tier].append((stated.priority, policy))
        ordered = {key: tuple(policy for _, policy in sorted(found)) for key, found in tiers.items()}
        ingress, egress = (tuple(isolating[direction]) or None for direction in DIRECTIONS)
        around = [Tiers(ordered.get(f"{d}Admin", ()), ordered.get(f"{d}Baseline", ())) for d in DIRECTIONS]
        found = PodPolicy(name, pod.ips, ingress, egress, *around)
        return found if any(map(found.has_say, DIRECTIONS)) else None

    def _rules(self, name: Name) -> tuple[AllowRule, ...] | None:
        policy = stated_policy(self._snapshot, name)
        if policy is None or not self._targets.of(name):
            self._selections.forget(name)
            return None
        self._selections.use(name, {s for rule in (*policy.ingress, *policy.egress) for s in _selections(policy, rule)})
        return tuple(
            self._rule(policy, RuleKey(name, direction, i), rule)
            for direction in DIRECTIONS
            if isinstance(policy, ClusterNetworkPolicy) or _isolates(policy, direction)
            for i, rule in enumerate(_stated_rules(policy, direction))
        )

    def _rule(self, policy: Stated, key: RuleKey, rule: PolicyRule) -> AllowRule:
        blocks = intervals(peer.ip_block for peer in rule.peers if peer.ip_block is not None)
        action, called = (rule.action, rule.name) if isinstance(rule, ClusterPolicyRule) else ("Accept", "")
        return AllowRule(
            key=key,
            everybody=not rule.peers,
            pods=self._selections.addresses(_selections(policy, rule)),
            blocks=blocks,
            every_port=not rule.ports,
            ports=join_ports(_range(port) for port in rule.ports if not isinstance(port.port, str)),
            doors=frozenset(self._doors(key, rule, policy)),
            says=rule_words(rule, inward=key.direction == "ingress"),
            action=action,
            name=called,
        )

    def _doors(self, key: RuleKey, rule: PolicyRule, policy: Stated) -> Iterator[Door]:
        """Yield where ports stated by name lead: at the pods that are selected, or at the peers that are pods."""
        wanted = {(port.protocol, port.port) for port in rule.ports if isinstance(port.port, str)}
        if not wanted:
            return
        names: Iterable[Name] = self._targets.of(key.policy)
        if key.direction == "egress":
            names = self._peers(rule, policy)
        for name in names:
            pod = self._snapshot.pods[name]
            for port in pod.ports:
                if (port.protocol, port.name) in wanted:
                    yield from (Door(address, port.protocol, port.port, name) for address in pod.ips)

    def _peers(self, rule: PolicyRule, policy: Stated) -> Iterator[Name]:
        """Yield the pods among a rule's peers, those inside its address blocks as well."""
        if not rule.peers:
            yield from self._selections.names
            return
        chosen = self._selections.members(_selections(policy, rule))
        blocks = intervals(peer.ip_block for peer in rule.peers if peer.ip_block is not None)
        for name in self._selections.names:
            ips = self._snapshot.pods[name].ips
            if name in chosen or any(b.family == ip.version and b.first <= int(ip) <= b.last for b in blocks for ip in ips):
                yield name

    def _with_doors(self, about: set[Name]) -> set[Name]:
        """Return the policies whose named ports have to be looked up again because pods changed."""
        found = set()
        for name in self.rules:
            policy = stated_policy(self._snapshot, name)
            if policy is None:
                continue
            at_peers = self._selections.moved and any(map(_has_names, policy.egress))
            if at_peers or (name in about and any(map(_has_names, policy.ingress))):
                found.add(name)
        return found


_Value = TypeVar("_Value")


def _settle(held: dict[Name, _Value], name: Name, after: _Value | None, noted: dict[Name, _Value | None]) -> None:
    """Let ``after`` stand under a name (None: nothing), and note what stood there if that is a change."""
    before = held.get(name)
    if before == after:
        return
    noted[name] = before
    if after is None:
        del held[name]
    else:
        held[name] = after


def _isolates(policy: NetworkPolicy, direction: Direction) -> bool:
    return policy.isolates_ingress if direction == "ingress" else policy.isolates_egress


def _stated_rules(policy: Stated, direction: Direction) -> tuple[PolicyRule, ...]:
    return policy.ingress if direction == "ingress" else policy.egress


def _selections(policy: Stated, rule: PolicyRule) -> tuple[Selection, ...]:
    """Return what a rule's peers select; a podSelector alone is of the policy's own namespace."""
    own = policy.namespace if isinstance(policy, NetworkPolicy) else ""
    return tuple(
        Selection(own if peer.namespace_selector is None else "", peer.namespace_selector, peer.pod_selector)
        for peer in rule.peers
        if peer.ip_block is None
    )


def _has_names(rule: PolicyRule) -> bool:
    return any(isinstance(port.port, str) for port in rule.ports)


def _range(port: PolicyPort) -> PortRange:
    if port.port is None:
        return PortRange(port.protocol, 0, LAST_PORT)
    assert isinstance(port.port, int)
    return PortRange(port.protocol, port.port, port.end_port or port.port)


def live(pod: Pod | None) -> Pod | None:
    """Return a pod that has addresses of its own now, else None."""
    ended = pod is None or pod.phase in ("Succeeded", "Failed")
    return None if ended or pod.host_network or not pod.ips else pod  # type: ignore[union-attr]


def _changed(before: Snapshot, after: Snapshot, changed: frozenset[ObjectRef] | None) -> tuple[set[Name], set[str], set[Name]]:
    """Return the names of pods, namespaces and policies that may differ."""
    if changed is None:
        pods = {name for name in {*before.pods, *after.pods} if before.pods.get(name) != after.pods.get(name)}
        spaces = {n for n in {*before.namespaces, *after.namespaces} if before.namespaces.get(n) != after.namespaces.get(n)}
        policies = {n for n in {*before.policies, *after.policies} if before.policies.get(n) != after.policies.get(n)}
        old, new = before.cluster_policies, after.cluster_policies
        return pods, spaces, policies | {(EVERYWHERE, n) for n in {*old, *new} if old.get(n) != new.get(n)}
    by_kind: dict[str, set[Name]] = defaultdict(set)
    for ref in changed:
        by_kind[ref.kind].add((ref.namespace, ref.name))
    return (
        by_kind["Pod"],
        {name for _, name in by_kind["Namespace"]},
        by_kind["NetworkPolicy"] | by_kind["ClusterNetworkPolicy"],
    )
