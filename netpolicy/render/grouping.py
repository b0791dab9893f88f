"""Which pods share which group, moved along with the policy table; what every renderer of policies starts from.

    PolicyChange --> Grouping --> addresses that lead elsewhere now      10.244.1.10 ingress -> in-6f1c2a90b3d4
                                  groups and clauses that are new or changed, or that nobody is in any more
                                  clauses whose peers moved

Several pods may claim one address; then it leads to the groups of all of them, and each has to let a packet through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from clusterstate.objects import IPAddress
from clusterstate.snapshot import Name
from netpolicy.compile import PolicyChange
from netpolicy.render.clauses import Clause, ClauseKey, Touched, rules_of
from netpolicy.render.groups import Group, GroupKey, group_key
from netpolicy.table import DIRECTIONS, Direction, PodPolicy, PolicyTable, RuleKey

Place: TypeAlias = tuple[Direction, IPAddress]
"""An address of a pod here, and in which direction packets are looked at."""


class GroupChange(NamedTuple):
    """What a change of policies comes to. A clause is there before the groups that ask it, and goes after them."""

    places: set[Place]
    """Those that may lead to other groups now."""
    groups: list[Group]
    """Groups that are new; sorted."""
    clauses: list[Clause]
    """Clauses that are new, or of which anything may differ; sorted."""
    moved: list[tuple[Clause, Touched]]
    """Clauses of which only peers may differ, and which; a clause may be there several times."""
    gone_groups: list[Group]
    gone_clauses: list[Clause]


class Grouping:
    """The groups of one node's pods."""

    def __init__(self) -> None:
        self.groups: dict[GroupKey, Group] = {}
        self.clauses: dict[ClauseKey, Clause] = {}
        self._pods: dict[Name, tuple[PodPolicy, dict[Direction, GroupKey]]] = {}
        self._pods_of: dict[Name, set[Name]] = defaultdict(set)
        """By policy: the pods that it is about, be it in their groups or not, where what it says may make no difference."""
        self._members: dict[GroupKey, set[Name]] = defaultdict(set)
        self._users: dict[ClauseKey, set[GroupKey]] = defaultdict(set)
        self._clauses_of: dict[Name, dict[str, Clause]] = defaultdict(dict)
        """By policy and their names: the clauses that have rules of it."""
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
        wanted = sorted({key for name in pods if name in self._pods for key in self._pods[name][1].values()})
        clauses = [self._fill(key, table) for key in sorted(self._stale(wanted, change))]
        groups = [self._add(key) for key in wanted if key not in self.groups]
        gone = [self._forget(key) for key in sorted(left) if not self._members[key]]
        unused = sorted({key for group in gone for key in group.key.clauses if not self._users[key]})
        return GroupChange(places, groups, clauses, moved, gone, [self._drop(key) for key in unused])

    def _stale(self, groups: Iterable[GroupKey], change: PolicyChange) -> set[ClauseKey]:
        """Return the clauses of these groups that are new, or have rules that changed."""
        asked = {key for group in groups for key in group.clauses}
        return {key for key in asked if key not in self.clauses or any(policy in change.rules for policy, _ in key.policies)}

    def _fill(self, key: ClauseKey, table: PolicyTable) -> Clause:
        """Make a clause, or let the one there is have its rules as they are now."""
        clause = self.clauses.get(key)
        if clause is not None:
            clause.take(rules_of(key, table))
            return clause
        clause = self.clauses[key] = Clause(key, rules_of(key, table))
        for policy, _ in key.policies:
            self._clauses_of[policy][clause.name] = clause
        return clause

    def _settle(self, name: Name, table: PolicyTable, left: set[GroupKey]) -> set[Place]:
        """Find a pod's groups anew; return the places that may lead elsewhere now."""
        places: set[Place] = set()
        if name in self._pods:
            before, keys = self._pods.pop(name)
            for policy in before.every_policy:
                self._pods_of[policy].discard(name)
            for direction, key in keys.items():
                self._members[key].discard(name)
                left.add(key)
                for address in before.addresses:
                    del self._at[direction, address][name]
                    places.add((direction, address))
        pod = table.pods.get(name)
        if pod is None:
            return places
        groups = {direction: group_key(pod, direction, table) for direction in DIRECTIONS}
        found = {direction: group for direction, group in groups.items() if group is not None}
        self._pods[name] = (pod, found)
        for policy in pod.every_policy:
            self._pods_of[policy].add(name)
        for direction, key in found.items():
            self._members[key].add(name)
            for address in pod.addresses:
                self._at[direction, address][name] = key
                places.add((direction, address))
        return places

    def _move_peers(self, table: PolicyTable, change: PolicyChange) -> list[tuple[Clause, Touched]]:
        """Let peers come and go in the clauses that hold them."""
        by_policy: dict[Name, list[RuleKey]] = defaultdict(list)
        for rule in change.peers:
            by_policy[rule.policy].append(rule)
        moved = []
        for policy, keys in by_policy.items():
            rules = {rule.key: rule for rule in table.rules.get(policy, ())}
            for clause in self._clauses_of[policy].values():
                moved += [(clause, clause.move(rules[key], change.peers[key])) for key in keys if key in clause.rules]
        return moved

    def _add(self, key: GroupKey) -> Group:
        self.groups[key] = Group(key, self.clauses)
        for clause in key.clauses:
            self._users[clause].add(key)
        return self.groups[key]

    def _forget(self, key: GroupKey) -> Group:
        del self._members[key]
        for clause in key.clauses:
            self._users[clause].discard(key)
        return self.groups.pop(key)

    def _drop(self, key: ClauseKey) -> Clause:
        del self._users[key]
        clause = self.clauses.pop(key)
        for policy, _ in key.policies:
            del self._clauses_of[policy][clause.name]
        return clause
