"""Pods are found by a label that a selector requires: all that it selects, none of another namespace, whatever became of them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from immutables import Map

from clusterstate.objects import LabelSelector, NetworkPolicy, Pod, Requirement
from clusterstate.snapshot import Snapshot, edited
from netpolicy.compile import PolicyCompiler, compile_policies
from netpolicy.selections import Selection, Selections


def pod(namespace: str, number: int, **labels: str) -> Pod:
    return Pod(namespace, f"p{number}", "n1", (ip_address(f"10.244.1.{number}"),), labels=Map(labels))


PODS = [
    pod("a", 1, app="web"),
    pod("a", 2, app="db"),
    pod("a", 3, tier="back"),
    pod("a", 4),
    pod("b", 5, app="web"),
    pod("b", 6, app="db", tier="back"),
]


def needs(*requirements: tuple[str, ...]) -> LabelSelector:
    return LabelSelector(tuple(Requirement(key, operator, tuple(values)) for key, operator, *values in requirements))


ROWS = {
    "one value": ("a", needs(("app", "In", "web")), {1}),
    "one of two values": ("a", needs(("app", "In", "web", "db")), {1, 2}),
    "of any namespace": ("", needs(("app", "In", "web")), {1, 5}),
    "two labels": ("", needs(("app", "In", "web", "db"), ("tier", "In", "back")), {6}),
    "no value": ("a", needs(("app", "In")), set()),
    "a value that nobody has": ("a", needs(("app", "In", "cache")), set()),
    "a namespace that nobody is in": ("c", needs(("app", "In", "web")), set()),
    "a label that is not there": ("a", needs(("app", "DoesNotExist")), {3, 4}),
    "a value that is not there": ("a", needs(("app", "NotIn", "web")), {2, 3, 4}),
    "nothing required": ("b", LabelSelector(), {5, 6}),
}


@pytest.mark.parametrize("row", ROWS)
def test_addresses(row):
    """A selection holds the pods it selects, whether they or it came first."""
    namespace, selector, numbers = ROWS[row]
    selection = Selection(namespace, None, selector)
    earlier, later = Selections(), Selections()
    later.use(("a", "policy"), {selection})
    for one in PODS:
        earlier.move((one.namespace, one.name), one, {})
        later.move((one.namespace, one.name), one, {})
    earlier.use(("a", "policy"), {selection})
    wanted = {ip_address(f"10.244.1.{number}") for number in numbers}
    assert set(earlier.addresses([selection])) == set(later.addresses([selection])) == wanted
    found = set(earlier.candidates(namespace, selector))
    assert found >= {(one.namespace, one.name) for one in PODS if one.ips[0] in wanted}
    assert {name[0] for name in found} <= ({namespace} if namespace else {"a", "b"})


def test_a_pod_that_loses_its_label_is_no_longer_held():
    """A label that changes, and a pod that goes, are taken out of selections and indices alike."""
    selection = Selection("a", None, needs(("app", "In", "web")))
    selections = Selections()
    selections.move(("a", "p1"), PODS[0], {})
    selections.use(("a", "policy"), {selection})
    selections.move(("a", "p1"), pod("a", 1, app="db"), {})
    assert not selections.addresses([selection])
    selections.move(("a", "p1"), PODS[0], {})
    assert set(selections.addresses([selection])) == {ip_address("10.244.1.1")}
    selections.move(("a", "p1"), None, {})
    assert not selections.addresses([selection])
    assert not selections.candidates("a", None)
    assert not selections.candidates("", selection.pods)


def test_a_policy_leaves_pods_of_other_namespaces_alone():
    """A pod with the very label that a policy of another namespace selects is none of its pods, at first or later."""
    policy = NetworkPolicy("a", "cache", needs(("app", "In", "cache")))
    stated = [*PODS, pod("b", 7, app="cache")]
    whole = compile_policies(edited(Snapshot(), [], [policy, *stated]), "n1")
    assert (whole.pods, whole.rules) == ({}, {})
    compiler = PolicyCompiler("n1")
    before = edited(Snapshot(), [], stated)
    compiler.update(before, None)
    compiler.update(edited(before, [], [policy]), frozenset({policy.ref}))
    assert (compiler.table.pods, compiler.table.rules) == ({}, {})
