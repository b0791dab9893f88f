"""Pods of whom policies say the same share what is written for them: a group, which is clauses in the order they are asked.

    pod a/web-1 --.            steps    deny    no-telnet[0], no-telnet[1]       the admin tier; the first that fits decides
                   +--> Group           accept  monitoring[0]
    pod a/web-2 --'                     pass    tenants[0]       go on with the rest at once
                               rest     accept  a/web-in, a/deny-all             NetworkPolicies, or else the baseline tier
                               at the end: denied if NetworkPolicies isolate the pods, let through if none does

Neighbours that do the same are one clause, so a tier costs as often as it changes its mind. What changes nothing is not written: what
passes before the end of its tier, what lets through before an end that does, and whatever stands behind a rule about everything.
Clauses are shared by all groups that ask the same (``clauses.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

from clusterstate.objects import Action
from clusterstate.snapshot import Name
from netpolicy.render.clauses import Clause, ClauseKey, clause_key, rules_words, short_name
from netpolicy.table import AllowRule, Direction, PodPolicy, PolicyTable, policy_name

Does: TypeAlias = Literal["accept", "deny", "pass"]
"""What becomes of a packet that a clause is about: let through in this direction, denied, or judged by the rest alone."""
_Stated: TypeAlias = list[tuple[Does, AllowRule]]
_DOES: Mapping[Action, Does] = {"Accept": "accept", "Deny": "deny", "Pass": "pass"}


class StepKey(NamedTuple):
    """What tells steps apart."""

    does: Does
    clause: ClauseKey


class GroupKey(NamedTuple):
    """What tells groups apart."""

    direction: Direction
    steps: tuple[StepKey, ...]
    rest: tuple[StepKey, ...]
    closed: bool

    @property
    def clauses(self) -> Iterator[ClauseKey]:
        """Yield every clause it asks, in order."""
        return (step.clause for step in (*self.steps, *self.rest))

    @property
    def policies(self) -> frozenset[Name]:
        """The policies of every kind that it is made of."""
        return frozenset(policy for clause in self.clauses for policy, _ in clause.policies)

    @property
    def name(self) -> str:
        """Return a short name; a group of NetworkPolicies alone has that of its clause."""
        if self.closed and not self.steps and len(self.rest) == 1:
            return self.rest[0].clause.name
        return short_name(self.direction, tuple(self))


class Step(NamedTuple):
    """A clause, and what it does."""

    does: Does
    clause: Clause


class Group:
    """One group."""

    def __init__(self, key: GroupKey, clauses: Mapping[ClauseKey, Clause]) -> None:
        self.key = key
        self.name = key.name
        self.steps = tuple(Step(step.does, clauses[step.clause]) for step in key.steps)
        self.rest = tuple(Step(step.does, clauses[step.clause]) for step in key.rest)
        self.passes = any(step.does == "pass" for step in key.steps)
        """Whether the rest is somewhere to go to."""
        isolating = [policy_name(policy) for step in key.rest for policy, _ in step.clause.policies] if key.closed else []
        self.who = f"{key.direction} of pods isolated by {', '.join(isolating)}"
        """Of a closed group: whose packets it denies at the end."""

    @property
    def is_closed(self) -> bool:
        """Whether what met no rule is denied, if anything can be left that met none."""
        return self.key.closed and not any(step.clause.everything for step in self.rest)

    @property
    def ends_before_rest(self) -> bool:
        """Whether every packet meets a rule before the rest."""
        return bool(self.steps) and self.steps[-1].clause.everything

    def words_about_all(self, step: Step) -> str:
        """Say what stands where every packet fits: who the pods are, or which rule of a tier it is."""
        return self.who if self.key.closed and step in self.rest else rules_words(step.clause.rules.values())


def group_key(pod: PodPolicy, direction: Direction, table: PolicyTable) -> GroupKey | None:
    """Return the group of a pod in a direction; None where nothing is ever denied."""
    policies, tiers = pod.policies(direction), pod.tiers(direction)

    def tier(names: Sequence[Name], *, last: bool) -> _Stated:
        rules = [rule for name in names for rule in table.rules_of(name, direction)]
        return _needed([("accept" if last and rule.action == "Pass" else _DOES[rule.action], rule) for rule in rules], last)

    if policies is not None:
        isolating = {name: table.rules_of(name, direction) for name in policies}
        rest: tuple[StepKey, ...] = (StepKey("accept", clause_key(pod, direction, isolating)),)
    else:
        rest = _steps(tier(tiers.baseline, last=True), pod, direction)
    admin = tier(tiers.admin, last=not rest)
    closed = policies is not None
    if admin and admin[-1][1].is_about_all and not any(does == "pass" for does, _ in admin):
        rest, closed = (), False  # nothing gets there
    return GroupKey(direction, _steps(admin, pod, direction), rest, closed) if admin or rest else None


def _needed(stated: _Stated, last: bool) -> _Stated:
    """Return the rules of a tier that can make a difference; ``last``: behind it everything is let through."""
    end = next((i for i, (_, rule) in enumerate(stated, 1) if rule.is_about_all), len(stated))
    while end and stated[end - 1][0] == ("accept" if last else "pass"):
        end -= 1
    return stated[:end]


def _steps(stated: _Stated, pod: PodPolicy, direction: Direction) -> tuple[StepKey, ...]:
    """Join neighbours that do the same."""
    found = []
    for does, together in groupby(stated, key=lambda one: one[0]):
        rules: dict[Name, list[AllowRule]] = {}
        for _, rule in together:
            rules.setdefault(rule.key.policy, []).append(rule)
        found.append(StepKey(does, clause_key(pod, direction, rules, some=True)))
    return tuple(found)
