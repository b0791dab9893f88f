"""The policy table: which pods of this node are isolated in which direction, what their policies let through, and what tiers say.

    PodPolicy default/db   ingress: isolated by (default/db-in)      egress: not isolated
                              |
    AllowRule default/db-in ingress 0:   peers 10.244.1.7, 10.244.2.9    ports TCP 5432

A rule is there once, whatever number of pods its policy selects. Everything is looked up: addresses and numbers, no selector and
no port name. A connection passes a pod in a direction if it is not isolated there or one rule of one of its policies lets it
through (``oracle.py`` says it slowly). How it becomes rules and sets is for ``render/``.

ClusterNetworkPolicies stand around that, in two tiers, each in order; their first rule that fits decides:

    admin tier -- Pass, or none fits --> isolated? NetworkPolicies : baseline tier -- Pass, or none fits --> let through
      `-- Accept, Deny                                                  `-- Accept, Deny

Source: Kubernetes networking/v1 types.go; sigs.k8s.io/network-policy-api v1alpha2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from immutables import Map

from clusterstate.objects import Action, IPAddress, Protocol
from clusterstate.snapshot import Name
from netpolicy.blocks import Interval

Direction: TypeAlias = Literal["ingress", "egress"]
DIRECTIONS: tuple[Direction, ...] = ("ingress", "egress")
Addresses: TypeAlias = Map[IPAddress, int]
"""A set of pod addresses that costs little to change; the value counts the pods that claim it."""
NO_ADDRESSES: Addresses = Map()


class PortRange(NamedTuple):
    """Ports of one protocol, both ends included; 0 to 65535 is all of it."""

    protocol: Protocol
    first: int
    last: int


def join_ports(ports: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Return the union of port ranges, sorted, with no two that overlap or touch."""
    found: list[PortRange] = []
    for part in sorted(ports):
        before = found[-1] if found else None
        if before is not None and before.protocol == part.protocol and part.first <= before.last + 1:
            found[-1] = PortRange(part.protocol, before.first, max(before.last, part.last))
        else:
            found.append(part)
    return tuple(found)


def is_of_cluster(policy: Name) -> bool:
    """Whether a policy is a ClusterNetworkPolicy, which has no namespace."""
    return not policy[0]


def policy_name(policy: Name) -> str:
    """Print a policy's name: ``default/db-in``, or ``no-telnet`` for one of the whole cluster, whose namespace is empty."""
    return "/".join(filter(None, policy))


class Door(NamedTuple):
    """A port that a policy states by its name, looked up at one pod: where it leads there."""

    address: IPAddress
    protocol: Protocol
    port: int
    pod: Name
    """Another pod that claims the address may have no such name, or elsewhere."""


class RuleKey(NamedTuple):
    """Which rule: ``spec.ingress[2]`` of a policy."""

    policy: Name
    direction: Direction
    number: int

    def __str__(self) -> str:
        """Print as ``default/db-in: ingress[2]``."""
        return f"{policy_name(self.policy)}: {self.direction}[{self.number}]"


class AllowRule(msgspec.Struct, frozen=True):
    """What one rule lets through, or in a tier: what it does ``action`` with. The peer is ingress' source, egress' destination.

    ``doors`` are ports stated by name. For ingress they are those of the selected pods, open to the peers; for egress those of
    the peers themselves.
    """

    key: RuleKey
    everybody: bool
    """No peers are stated: whoever it is, inside the cluster or not."""
    pods: Addresses
    """Peers that are pods."""
    blocks: tuple[Interval, ...]
    """Peers that are address blocks; sorted and disjoint."""
    every_port: bool
    """No ports are stated: whatever port and protocol."""
    ports: tuple[PortRange, ...]
    """Ports stated by number; sorted and disjoint."""
    doors: frozenset[Door] = frozenset()
    says: str = ""
    """The rule in words; two rules of one policy that say the same are the same, whoever their peers are at the moment."""
    action: Action = "Accept"
    name: str = ""
    """What a tier's rule is called by who wrote it."""

    @property
    def is_about_all(self) -> bool:
        """Whether every packet fits."""
        return self.everybody and self.every_port


class Tiers(NamedTuple):
    """The ClusterNetworkPolicies with rules for a pod in one direction, in the order in which they are asked."""

    admin: tuple[Name, ...] = ()
    baseline: tuple[Name, ...] = ()


NO_TIERS = Tiers()


class PodPolicy(msgspec.Struct, frozen=True):
    """A pod of this node that some policy is about: by which it is isolated, sorted; None where it is not isolated."""

    pod: Name
    addresses: tuple[IPAddress, ...]
    ingress: tuple[Name, ...] | None
    egress: tuple[Name, ...] | None
    ingress_tiers: Tiers = NO_TIERS
    egress_tiers: Tiers = NO_TIERS

    def policies(self, direction: Direction) -> tuple[Name, ...] | None:
        """Return the policies that isolate it in a direction; None: it is not isolated."""
        return self.ingress if direction == "ingress" else self.egress

    def tiers(self, direction: Direction) -> Tiers:
        """Return what stands around these policies."""
        return self.ingress_tiers if direction == "ingress" else self.egress_tiers

    def has_say(self, direction: Direction) -> bool:
        """Whether any policy has a say in a direction."""
        return self.policies(direction) is not None or any(self.tiers(direction))

    @property
    def is_isolated(self) -> bool:
        """Whether NetworkPolicies isolate it in some direction."""
        return self.ingress is not None or self.egress is not None

    @property
    def is_governed(self) -> bool:
        """Whether a tier has rules for it in some direction."""
        return any(self.ingress_tiers) or any(self.egress_tiers)

    @property
    def every_policy(self) -> frozenset[Name]:
        """The policies of every kind that are about it."""
        named = (self.ingress or (), self.egress or (), *self.ingress_tiers, *self.egress_tiers)
        return frozenset(policy for policies in named for policy in policies)


class PolicyTable(msgspec.Struct, frozen=True):
    """Pods by name that a policy is about, and the rules of every policy that is about one of them."""

    pods: Mapping[Name, PodPolicy]
    rules: Mapping[Name, tuple[AllowRule, ...]]
    """By policy: ingress rules in order, then egress rules."""

    def rules_of(self, policy: Name, direction: Direction) -> list[AllowRule]:
        """Return a policy's rules of one direction."""
        return [rule for rule in self.rules.get(policy, ()) if rule.key.direction == direction]
