"""What one pod's coming, going or label changes in the rules and sets of others: nothing, apart from itself among their peers."""

from __future__ import annotations

import re
from ipaddress import ip_address

import pytest
from immutables import Map

from clusterstate.objects import (
    KubernetesObject,
    LabelSelector,
    NetworkPolicy,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Requirement,
)
from clusterstate.snapshot import Snapshot, edited
from kernelstate.objects.address import Prefix
from kernelstate.objects.netfilter import Jump
from kernelstate.objects.nftables import TableChange
from netpolicy.compile import PolicyCompiler
from netpolicy.render.iptables import IptablesPolicyProgram
from netpolicy.render.nftables import NftablesPolicyProgram

TEAMS = ("red", "green", "blue")
DISPATCH = {"ingress", "egress", "isolated", "self", "denied-egress", "denied-ingress"}
"""Maps and sets of nftables that lead from an address to what is written for its pod."""


def team(name: str) -> LabelSelector:
    return LabelSelector((Requirement("team", "In", (name,)),))


def pod(number: int, name: str) -> Pod:
    ips = (ip_address(f"10.244.1.{number}"), ip_address(f"fd00::{number:x}"))
    return Pod("shop", f"pod-{number}", "n1", ips, labels=Map({"team": name}))


def policies(selected: str) -> list[NetworkPolicy]:
    """Return a team's policies: who may come in from one team on one port, who may leave to another on every port."""
    one, other = (TEAMS[(TEAMS.index(selected) + step) % 3] for step in (1, 2))
    comes_in = PolicyRule((PolicyPeer(team(one)),), (PolicyPort("TCP", 80),))
    leaves = PolicyRule((PolicyPeer(team(other)),))
    return [
        NetworkPolicy("shop", f"{selected}-in", team(selected), ingress=(comes_in,)),
        NetworkPolicy("shop", f"{selected}-out", team(selected), False, True, egress=(leaves,)),
    ]


CLUSTER = [pod(number, TEAMS[number % 3]) for number in range(2, 50)]
NEW = pod(200, "red")
MOVED = pod(3, "blue")
EVENTS = {
    "a pod comes": (NEW, [], [NEW]),
    "a pod goes": (NEW, [NEW], []),
    "a pod's label changes": (MOVED, [], [MOVED]),
}
"""The pod in question, with what before besides the cluster, and as what after; no version after: it is deleted."""


class Watched:
    """A cluster that has been rendered in both ways, and is about to change."""

    def __init__(self, besides: list[Pod]) -> None:
        stated = [*CLUSTER, *besides, *(policy for name in TEAMS for policy in policies(name))]
        self.snapshot = edited(Snapshot(), [], stated)
        self.compiler = PolicyCompiler("n1")
        self.nftables, self.iptables = NftablesPolicyProgram(), IptablesPolicyProgram()
        change = self.compiler.update(self.snapshot, None)
        self.nftables.update(self.compiler.table, change)
        self.iptables.update(self.compiler.table, change)

    def turn(self, one: KubernetesObject, after: list[KubernetesObject]):
        """Let an object come or change, or go if there is none after; return what each way says may differ."""
        self.snapshot = edited(self.snapshot, [] if after else [one], after)
        change = self.compiler.update(self.snapshot, frozenset({one.ref}))
        return self.nftables.update(self.compiler.table, change), self.iptables.update(self.compiler.table, change)


@pytest.mark.parametrize("event", EVENTS)
def test_nftables_writes_elements_of_that_pod_alone(event):
    """No chain and no set is written, and every element that may differ has an address of the pod that changed."""
    one, besides, after = EVENTS[event]
    watched = Watched(besides)
    changes, _ = watched.turn(one, after)
    for family, address in zip((4, 6), map(int, one.ips), strict=True):
        change = changes[family]
        assert (change.chains, change.sets) == (frozenset(), frozenset())
        assert change.elements
        assert {name for name in change.elements if name not in DISPATCH}, "its peers know nothing of it"
        assert [key for keys in change.elements.values() for key in keys if address not in key] == []


@pytest.mark.parametrize("event", EVENTS)
def test_iptables_writes_members_of_that_pod_alone(event):
    """No set is written, and every member that comes or goes has an address of the pod that changed."""
    one, besides, after = EVENTS[event]
    watched = Watched(besides)
    _, change = watched.turn(one, after)
    assert change.sets == frozenset()
    assert change.members
    for family, address in zip((4, 6), map(int, one.ips), strict=True):
        members = {m for moved in change.members if moved.spec.family == family for m in {*moved.added, *moved.removed}}
        assert members
        assert {member for member in members if address not in member} == set()


@pytest.mark.parametrize("event", EVENTS)
def test_iptables_leaves_the_rules_of_others(event):
    """The chains of groups stay as they are; in the tree the lines of other pods do, word for word."""
    one, besides, after = EVENTS[event]
    watched = Watched(besides)
    groups_before, lines_before = groups(watched.iptables), lines(watched.iptables)
    _, change = watched.turn(one, after)
    assert not change.chains & groups_before.keys()
    assert groups(watched.iptables) == groups_before
    different = lines(watched.iptables) ^ lines_before
    assert different
    assert {rule.destination for rule in different} == set(map(Prefix.host, one.ips))


def test_first_pod_of_its_kind():
    """What is written for a pod that no other is like has names of its own: nothing that was there is written."""
    watched = Watched([])
    stranger = NetworkPolicy("shop", "grey-in", team("grey"), ingress=(PolicyRule((PolicyPeer(team("red")),)),))
    changes, change = watched.turn(stranger, [stranger])
    assert changes == dict.fromkeys((4, 6), TableChange(frozenset(), frozenset(), {}))  # nobody here is selected yet
    assert change == (frozenset(), frozenset(), ())
    held = {family: {*table.chains, *table.sets} for family, table in watched.nftables.tables.items()}
    groups_before, sets_before = groups(watched.iptables), set(watched.iptables.sets)
    changes, change = watched.turn(pod(201, "grey"), [pod(201, "grey")])
    for family, made in changes.items():
        assert made.chains
        assert made.sets
        assert not {*made.chains, *made.sets} & held[family]
        assert {name for name in made.elements if name not in made.sets} == DISPATCH - {"egress", "denied-egress"}
    assert groups(watched.iptables).items() > groups_before.items()
    assert not change.chains & groups_before.keys()
    assert change.sets
    assert not change.sets & sets_before


def lines(program: IptablesPolicyProgram):
    """Return the rules that lead from one address to what is written for it, wherever in the tree they stand."""
    ends = {key.name for key in groups(program)}
    return {
        rule
        for rules in program.chains.values()
        for rule in rules
        if isinstance(rule.target, Jump) and rule.target.chain in ends
    }


def groups(program: IptablesPolicyProgram):
    """Return the chains that judge, with their rules: those of groups."""
    return {
        key: rules for key, rules in program.chains.items() if re.fullmatch("NETPOL-(IN|EG)-[0-9A-F]{12}(-REST)?", key.name)
    }
