"""Which pods share which group, moved along with the policy table; what every renderer of policies starts from.

    PolicyChange --> Grouping --> addresses that lead elsewhere now      10.244.1.10 ingress -> in-6f1c2a90b3d4
                                  groups that are new or say something else, groups whose peers moved, groups that nobody is in

Several pods may claim one address; then it leads to the groups of all of them, and each has to let a packet through.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple, TypeAlias

from clusterstate.objects import IPAddress
from clusterstate.snapshot import Name
from netpolicy.compile import PolicyChange
from netpolicy.render.groups import Group, GroupKey, Touched, group_key, rules_of
from netpolicy.table import DIRECTIONS, Direction, PolicyTable, RuleKey

Place: TypeAlias = tuple[Direction, IPAddress]
"""An address of a pod here, and in which direction packets are looked at."""


class GroupChange(NamedTuple):
    """What a change of policies comes to."""

    places: set[Place]
    """Those that may lead to other groups now."""
    written: list[Group]
    """Groups that are new, or of which anything may differ; sorted."""
    moved: list[tuple[Group, Touched]]
    """Groups of which only peers may differ, and which; a group may be there several times."""
    gone: list[Group]


class Grouping:
    """The groups of one node's pods."""

    def __init__(self) -> None:
        self.groups: dict[GroupKey, Group] = {}
        self._pods: dict[Name, tuple[tuple[IPAddress, ...], dict[Direction, GroupKey]]] = {}
        self._pods_of: dict[Name, set[Name]] = defaultdict(set)
        """By policy: the pods in whose groups it is."""
        self._users: dict[GroupKey, set[Name]] = defaultdict(set)
        self._at: dict[Place, dict[Name, GroupKey]] = defaultdict(dict)

    def at(self, direction: Direction, address: IPAddress) -> list[Group]:
        """Return the groups of all pods that claim an address, sorted; none: nobody there is isolated in that direction."""
        return [self.groups[key] for key in sorted(set(self._at.get((direction, address), {}).values()))]

    def claims(self, direction: Direction, address: IPAddress) -> list[tuple[Name, Group]]:
        """Return who claims an address, sorted, and the group of each."""
        return [(name, self.groups[key]) for name, key in sorted(self._at.get((direction, address), {}).items())]

    def is_isolated(self, address: IPAddress) -> bool:
        """Whether a pod that claims an address is isolated in some direction."""
        return any(self._at.get((direction, address)) for direction in DIRECTIONS)

    def update(self, table: PolicyTable, change: PolicyChange) -> GroupChange:
        """Take in a change of the policy table."""
        pods = set(change.pods)
        for policy in change.rules:
            pods |= self._pods_of[policy]
        moved = list(self._move_peers(table, change))
        places: set[Place] = set()
        left: set[GroupKey] = set()
        for name in sorted(pods):
            places |= self._settle(name, table, left)
        written = []
        for key in sorted({key for name in pods if name in self._pods for key in self._pods[name][1].values()}):
            if key not in self.groups or any(policy in change.rules for policy, _ in key.policies):
                self.groups[key] = Group(key, rules_of(key, table))
                written.append(self.groups[key])
        gone = [self._forget(key) for key in sorted(left) if not self._users[key]]
        return GroupChange(places, written, moved, gone)

    def _settle(self, name: Name, table: PolicyTable, left: set[GroupKey]) -> set[Place]:
        """Find a pod's groups anew; return the places that may lead elsewhere now."""
        places: set[Place] = set()
        addresses, keys = self._pods.pop(name, ((), {}))
        for direction, key in keys.items():
            self._users[key].discard(name)
            left.add(key)
            for policy, _ in key.policies:
                self._pods_of[policy].discard(name)
            for address in addresses:
                del self._at[direction, address][name]
                places.add((direction, address))
        pod = table.pods.get(name)
        if pod is None:
            return places
        groups = {direction: group_key(pod, direction, table) for direction in DIRECTIONS}
        found = {direction: group for direction, group in groups.items() if group is not None}
        self._pods[name] = (pod.addresses, found)
        for direction, key in found.items():
            self._users[key].add(name)
            for policy, _ in key.policies:
                self._pods_of[policy].add(name)
            for address in pod.addresses:
                self._at[direction, address][name] = key
                places.add((direction, address))
        return places

    def _move_peers(self, table: PolicyTable, change: PolicyChange) -> list[tuple[Group, Touched]]:
        """Let peers come and go in the groups that hold them."""
        by_policy: dict[Name, list[RuleKey]] = defaultdict(list)
        for rule in change.peers:
            by_policy[rule.policy].append(rule)
        moved = []
        for policy, keys in by_policy.items():
            rules = {rule.key: rule for rule in table.rules.get(policy, ())}
            for group_name in {key for name in self._pods_of[policy] for key in self._pods[name][1].values()}:
                group = self.groups[group_name]
                moved += [(group, group.move(rules[key], change.peers[key])) for key in keys if key in group.rules]
        return moved

    def _forget(self, key: GroupKey) -> Group:
        del self._users[key]
        return self.groups.pop(key)
