"""Whether policies let a connection through, said slowly from the table; every renderer, and the kernel, is tested against it.

    egress of the source pod, ingress of the destination pod, each by itself:
      the first rule of the admin tier that fits     Accept: let through    Deny: not    Pass: go on, as if none fitted
      isolated by NetworkPolicies?                   then one rule of theirs must let it through
      else the first rule of the baseline tier       Accept, Deny; none: nobody has anything against it
    a pod's own node may always call it; a pod that calls itself by its own address is nobody's business

Both pods are judged by the address and port that the packet has at the pod: behind a Service those of the endpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

from clusterstate.objects import Action, IPAddress
from clusterstate.snapshot import Name
from netpolicy.table import AllowRule, Direction, Door, PodPolicy, PolicyTable, PortRange, policy_name

Decision: TypeAlias = Literal["allow", "deny", "none"]
"""``none``: no policy decides anything in this direction, so that it is let through."""


class Flow(msgspec.Struct, frozen=True):
    """The first packet of a connection, after Services have had their say. ``from_node``: sent by the destination's own node."""

    source: IPAddress
    destination: IPAddress
    protocol: str
    port: int
    from_node: bool = False


class Judgement(msgspec.Struct, frozen=True):
    """What policies say in each direction, and why, in sentences."""

    egress: Decision
    ingress: Decision
    because: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Whether the connection comes about."""
        return "deny" not in (self.egress, self.ingress)


class Oracle:
    """A table, which may be of one node's pods or of the whole cluster's."""

    def __init__(self, table: PolicyTable) -> None:
        self.table = table
        self._by_address: dict[IPAddress, list[PodPolicy]] = {}
        for pod in table.pods.values():
            for address in pod.addresses:
                self._by_address.setdefault(address, []).append(pod)

    def judge(self, flow: Flow) -> Judgement:
        """Return what is decided about a connection."""
        because: list[str] = []
        egress = self._side(flow, "egress", flow.source, because)
        ingress = self._side(flow, "ingress", flow.destination, because)
        return Judgement(egress, ingress, tuple(because))

    def _side(self, flow: Flow, direction: Direction, address: IPAddress, because: list[str]) -> Decision:
        pods = [pod for pod in self._by_address.get(address, ()) if pod.has_say(direction)]
        if not pods:
            return "none"
        if flow.source == flow.destination:
            because.append(f"{direction}: a pod may always reach its own address")
            return "allow"
        if direction == "ingress" and flow.from_node:
            because.append("ingress: the pod's own node may always reach it")
            return "allow"
        # Two pods may claim one address: a packet must pass what is said of either.
        decided = [self._pod(flow, pod, direction, because) for pod in pods]
        return next((decision for decision in _STRICT if decision in decided), "none")

    def _pod(self, flow: Flow, pod: PodPolicy, direction: Direction, because: list[str]) -> Decision:
        """Ask one tier after the other."""
        decision = self._tier(flow, pod, direction, "Admin", because)
        if decision != "none":
            return decision
        if pod.policies(direction) is not None:
            return "allow" if self._passes(flow, pod, direction, because) else "deny"
        return self._tier(flow, pod, direction, "Baseline", because)

    def _tier(self, flow: Flow, pod: PodPolicy, direction: Direction, tier: str, because: list[str]) -> Decision:
        """Return what the first rule that fits decides; none: none fits, or it passes."""
        tiers = pod.tiers(direction)
        for policy in tiers.admin if tier == "Admin" else tiers.baseline:
            for rule in self.table.rules_of(policy, direction):
                if fits(rule, flow, pod.pod):
                    called = f" ({rule.name})" if rule.name else ""
                    because.append(f"{direction}: {tier} ClusterNetworkPolicy {rule.key}{called} {_DOES[rule.action]}")
                    return _DECIDES[rule.action]
        return "none"

    def _passes(self, flow: Flow, pod: PodPolicy, direction: Direction, because: list[str]) -> bool:
        policies = pod.policies(direction) or ()
        rules = [rule for policy in policies for rule in self.table.rules_of(policy, direction)]
        for rule in rules:
            if fits(rule, flow, pod.pod):
                because.append(f"{direction}: NetworkPolicy {rule.key} lets it through")
                return True
        name = "/".join(pod.pod)
        because.append(f"{direction}: Pod {name} is isolated by NetworkPolicy {_names(policies)}, and no rule fits")
        because += [f"{direction}: {rule.key}: {_why_not(rule, flow, pod.pod)}" for rule in rules]
        return False


_STRICT: tuple[Decision, ...] = ("deny", "allow")
_DECIDES: dict[Action, Decision] = {"Accept": "allow", "Deny": "deny", "Pass": "none"}
_DOES: dict[Action, str] = {"Accept": "accepts it", "Deny": "denies it", "Pass": "passes it on"}


def fits(rule: AllowRule, flow: Flow, pod: Name) -> bool:
    """Whether a connection of a pod is one that a rule is about: one that a rule of a NetworkPolicy lets through."""
    peer = flow.source if rule.key.direction == "ingress" else flow.destination
    if rule.key.direction == "egress":
        return (is_peer(rule, peer) and _is_numbered(rule, flow)) or _is_named(rule, flow, pod)
    return is_peer(rule, peer) and (_is_numbered(rule, flow) or _is_named(rule, flow, pod))


def is_peer(rule: AllowRule, address: IPAddress) -> bool:
    """Whether an address is among a rule's peers."""
    if rule.everybody or address in rule.pods:
        return True
    return any(b.family == address.version and b.first <= int(address) <= b.last for b in rule.blocks)


def _is_numbered(rule: AllowRule, flow: Flow) -> bool:
    return rule.every_port or _in_ports(rule.ports, flow)


def _is_named(rule: AllowRule, flow: Flow, pod: Name) -> bool:
    doors = [d for d in rule.doors if d.address == flow.destination and (d.protocol, d.port) == (flow.protocol, flow.port)]
    return bool(doors) if rule.key.direction == "egress" else any(door.pod == pod for door in doors)


def _in_ports(ports: Iterable[PortRange], flow: Flow) -> bool:
    return any(p.protocol == flow.protocol and p.first <= flow.port <= p.last for p in ports)


def _why_not(rule: AllowRule, flow: Flow, pod: Name) -> str:
    """Say how near a rule came."""
    peer = flow.source if rule.key.direction == "ingress" else flow.destination
    if is_peer(rule, peer):
        return f"fits {peer}, but not {flow.protocol} {flow.port}: it lets through {_port_names(rule.ports, rule.doors)}"
    if _is_numbered(rule, flow) or _is_named(rule, flow, pod):
        return f"fits {flow.protocol} {flow.port}, but not {peer}"
    return f"fits neither {peer} nor {flow.protocol} {flow.port}"


def _port_names(ports: Sequence[PortRange], doors: Collection[Door]) -> str:
    told = [_port_name(p) for p in ports]
    told += sorted({f"{d.protocol} {d.port} at {d.address}" for d in doors})
    return ", ".join(told) or "no port: none of its names is known at the pod"


def _port_name(port: PortRange) -> str:
    if (port.first, port.last) == (0, 65535):
        return f"{port.protocol} on every port"
    return f"{port.protocol} {port.first}" + (f"-{port.last}" if port.last != port.first else "")


def _names(policies: Sequence[Name]) -> str:
    return ", ".join(map(policy_name, policies))
