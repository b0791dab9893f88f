"""ClusterNetworkPolicies as they are written: what each field comes to, and what closes where one cannot stand."""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import Any

import pytest
import yaml

from clusterstate.objects import (
    ClusterNetworkPolicy,
    ClusterPolicyRule,
    IPBlock,
    LabelSelector,
    PolicyPeer,
    PolicyPort,
    Requirement,
)
from clusterstate.parse import Parsed, parse_document, parse_object
from clusterstate.parse_policy import NOBODY

EVERY_POD = PolicyPeer(LabelSelector(), LabelSelector())
TEAM = LabelSelector((Requirement("team", "In", ("a",)),))
WEB = LabelSelector((Requirement("app", "In", ("web",)),))
ALL = {"namespaces": {}}

FULL = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: guard}
spec:
  tier: Baseline
  priority: 1000
  subject: {pods: {namespaceSelector: {matchLabels: {team: a}}, podSelector: {matchLabels: {app: web}}}}
  ingress:
  - name: web
    action: Accept
    from: [{namespaces: {matchLabels: {team: a}}}, {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}]
    protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start: 5000, end: 5010}}}}, {sctp: {}}]
  - {action: Pass, from: [{namespaces: {}}], protocols: [{destinationNamedPort: http}]}
  egress:
  - {action: Deny, to: [{networks: [10.0.0.7/8, "fd00::/8"]}, {namespaces: {}}], protocols: []}
"""


def spec(**more: Any) -> dict[str, Any]:
    return {"tier": "Admin", "priority": 10, "subject": ALL, **more}


def rule(**fields: Any) -> dict[str, Any]:
    return {"action": "Accept", "from": [ALL], **fields}


def out(**fields: Any) -> dict[str, Any]:
    return {"action": "Accept", "to": [ALL], **fields}


def read(stated: Any) -> tuple[ClusterNetworkPolicy, Parsed]:
    """Read a policy both ways, which must come to the same."""
    raw = {"kind": "ClusterNetworkPolicy", "metadata": {"name": "x"}, "spec": stated}
    found = parse_object(raw, "x.yaml")
    assert found == parse_document(json.dumps(raw).encode(), "x.yaml", is_json=True)
    (made,) = found.objects
    assert isinstance(made, ClusterNetworkPolicy)
    return made, found


def errors(stated: Any) -> list[str]:
    return [str(error).removeprefix("x.yaml: ClusterNetworkPolicy x: ") for error in read(stated)[1].errors]


def test_every_field():
    """Each field of the standard channel is read; a network's host bits are masked, a name is for each protocol."""
    parsed = parse_object(yaml.safe_load(FULL), "x.yaml")
    assert parsed.errors == ()
    web = ClusterPolicyRule(
        (PolicyPeer(None, TEAM), PolicyPeer(WEB, LabelSelector())),
        (PolicyPort("TCP", 80), PolicyPort("UDP", 5000, 5010), PolicyPort("SCTP")),
        "Accept",
        "web",
    )
    named = tuple(PolicyPort(protocol, "http") for protocol in ("TCP", "UDP", "SCTP"))
    blocks = [PolicyPeer(ip_block=IPBlock(ip_network(text))) for text in ("10.0.0.0/8", "fd00::/8")]
    everywhere = PolicyPeer(None, LabelSelector())
    assert parsed.objects == (
        ClusterNetworkPolicy(
            "guard",
            "Baseline",
            1000,
            PolicyPeer(WEB, TEAM),
            (web, ClusterPolicyRule((everywhere,), named, "Pass")),
            (ClusterPolicyRule((*blocks, everywhere), (), "Deny"),),
        ),
    )


BAD_RULES = {
    # A rule, and what is said of it.
    "no peers": (rule(**{"from": []}), "from: must hold 1 to 25 peers, holds 0"),
    "peers missing": ({"action": "Accept"}, "from: must hold 1 to 25 peers, holds 0"),
    "too many peers": (rule(**{"from": [ALL] * 26}), "from: must hold 1 to 25 peers, holds 26"),
    "a peer of no kind": (rule(**{"from": [{}]}), "from[0]: must state namespaces or pods"),
    "a peer of a kind to come": (rule(**{"from": [{"galaxies": {}}]}), "from[0].galaxies: is not known here, is {}"),
    "a peer of two kinds": (
        rule(**{"from": [{"namespaces": {}, "pods": {"namespaceSelector": {}, "podSelector": {}}}]}),
        'from[0].pods: must not stand beside namespaces, is {"namespaceSelector": {}, "podSelector": {}}',
    ),
    "pods of which namespaces": (
        rule(**{"from": [{"pods": {"podSelector": {}}}]}),
        "from[0].pods.namespaceSelector: must be given",
    ),
    "which pods": (rule(**{"from": [{"pods": {"namespaceSelector": {}}}]}), "from[0].pods.podSelector: must be given"),
    "a misspelt selector": (
        rule(**{"from": [{"namespaces": {"matchLabel": {"a": "b"}}}]}),
        'from[0].namespaces.matchLabel: is not known here, is {"a": "b"}',
    ),
    "an operator": (
        rule(**{"from": [{"namespaces": {"matchExpressions": [{"key": "a", "operator": "Is"}]}}]}),
        'from[0].namespaces.matchExpressions[0].operator: must be In, NotIn, Exists or DoesNotExist, is "Is"',
    ),
    "a label": (
        rule(**{"from": [{"namespaces": {"matchLabels": {"a": 1}}}]}),
        "from[0].namespaces.matchLabels[a]: must be a string, is 1",
    ),
    "networks are for egress": (
        rule(**{"from": [{"networks": ["10.0.0.0/8"]}]}),
        'from[0].networks: is not known here, is ["10.0.0.0/8"]',
    ),
    "a network": (
        out(to=[{"networks": ["10.0.0.0/8", "10.0.0.0/33"]}]),
        'to[0].networks[1]: must be a CIDR such as 10.0.0.0/8, is "10.0.0.0/33"',
    ),
    "no network": (out(to=[{"networks": []}]), "to[0].networks: must hold 1 to 25, holds 0"),
    "networks and pods": (
        out(to=[{"networks": ["10.0.0.0/8"], "namespaces": {}}]),
        'to[0].networks: must not stand beside namespaces or pods, is ["10.0.0.0/8"]',
    ),
    "nodes": (out(to=[{"nodes": {}}]), "to[0].nodes: is experimental in the API and not enforced here, is {}"),
    "domain names": (
        out(to=[{"domainNames": ["*.example.com"]}]),
        'to[0].domainNames: is experimental in the API and not enforced here, is ["*.example.com"]',
    ),
    "too many protocols": (rule(protocols=[{"tcp": {}}] * 26), "protocols: must hold at most 25, holds 26"),
    "no protocol": (rule(protocols=[{}]), "protocols[0]: must state one of tcp, udp, sctp and destinationNamedPort, is {}"),
    "a protocol to come": (rule(protocols=[{"icmp": {}}]), "protocols[0].icmp: is not known here, is {}"),
    "two protocols": (
        rule(protocols=[{"tcp": {}, "udp": {}}]),
        'protocols[0]: must state one of tcp, udp, sctp and destinationNamedPort, is {"tcp": {}, "udp": {}}',
    ),
    "neither number nor range": (
        rule(protocols=[{"tcp": {"destinationPort": {}}}]),
        "protocols[0].tcp.destinationPort: must state a number or a range, is {}",
    ),
    "a number that is none": (
        rule(protocols=[{"tcp": {"destinationPort": {"number": "80"}}}]),
        'protocols[0].tcp.destinationPort.number: must be a whole number, is "80"',
    ),
    "a number too large": (
        rule(protocols=[{"udp": {"destinationPort": {"number": 65536}}}]),
        "protocols[0].udp.destinationPort.number: must be between 1 and 65535, is 65536",
    ),
    "a range that ends where it starts": (
        rule(protocols=[{"sctp": {"destinationPort": {"range": {"start": 80, "end": 80}}}}]),
        "protocols[0].sctp.destinationPort.range.end: must be between 81 and 65535, is 80",
    ),
    "a name that is none": (
        rule(protocols=[{"destinationNamedPort": "http_1"}]),
        'protocols[0].destinationNamedPort: must be lower case letters, digits and "-", at most 63, is "http_1"',
    ),
    "a name beside networks": (
        out(to=[{"networks": ["10.0.0.0/8"]}], protocols=[{"destinationNamedPort": "http"}]),
        'protocols[0].destinationNamedPort: must not stand beside networks, is "http"',
    ),
    "a field to come": (rule(unless=[ALL]), 'unless: is not known here, is [{"namespaces": {}}]'),
}


@pytest.mark.parametrize("action", ["Accept", "Deny", "Pass"])
@pytest.mark.parametrize(("stated", "message"), BAD_RULES.values(), ids=list(BAD_RULES))
def test_a_bad_rule_closes(stated, message, action):
    """A rule with a fault accepts nothing, or denies everything; the error says which field; the rules beside it stand."""
    way = "egress" if "to" in stated else "ingress"
    good = out(name="good") if way == "egress" else rule(name="good")
    made, parsed = read(spec(**{way: [good, {**stated, "action": action}, good]}))
    first, bad, last = made.egress or made.ingress
    assert first == last == ClusterPolicyRule((PolicyPeer(None, LabelSelector()),), name="good")
    closed = ClusterPolicyRule((NOBODY,)) if action == "Accept" else ClusterPolicyRule(action="Deny")
    assert bad == closed
    (error,) = parsed.errors
    ends = "the rule accepts nothing" if action == "Accept" else "the rule denies everything"
    assert str(error) == f"x.yaml: ClusterNetworkPolicy x: spec.{way}[1].{message}; {ends}"
    assert error.kept


@pytest.mark.parametrize("action", [None, "", "Allow", 5])
def test_an_action_that_is_not_known_denies(action):
    """Whatever was meant, a rule whose action is not known denies everything."""
    made, parsed = read(spec(ingress=[rule(action=action)]))
    assert made.ingress == (ClusterPolicyRule(action="Deny"),)
    assert parsed.errors[0].field == "spec.ingress[0].action"


def test_what_is_no_rule_denies():
    """A list of rules that is none denies everything in its direction; so does a rule that is no object."""
    made, parsed = read(spec(ingress="all", egress=[5]))
    assert made.ingress == made.egress == (ClusterPolicyRule(action="Deny"),)
    assert [error.field for error in parsed.errors] == ["spec.ingress", "spec.egress[0]"]


BAD_POLICIES = {
    "tier": ({"tier": "admin"}, 'spec.tier: must be Admin or Baseline, is "admin"; it is taken for Admin, and'),
    "no tier": ({"tier": None}, 'spec.tier: must be Admin or Baseline, is ""; it is taken for Admin, and'),
    "priority": ({"priority": 1001}, "spec.priority: must be between 0 and 1000, is 1001; it comes first, and"),
    "priority below": ({"priority": -1}, "spec.priority: must be between 0 and 1000, is -1; it comes first, and"),
    "priority in words": ({"priority": "high"}, 'spec.priority: must be a whole number, is "high"; it comes first, and'),
    "no priority": ({"priority": None}, "spec.priority: must be given; it comes first, and"),
    "no subject": ({"subject": None}, "spec.subject: must state namespaces or pods; it is about every pod, and"),
    "subject": ({"subject": {"nodes": {}}}, "spec.subject.nodes: is not known here, is {}; it is about every pod, and"),
    "a field to come": ({"dryRun": True}, "spec.dryRun: is not known here, is true;"),
}


@pytest.mark.parametrize(("stated", "message"), BAD_POLICIES.values(), ids=list(BAD_POLICIES))
def test_a_bad_policy_closes(stated, message):
    """Of a policy that does not say when or for whom it is meant nothing is accepted, and what it would pass is denied."""
    rules = [rule(), rule(action="Deny", name="d"), rule(action="Pass", name="p")]
    made, parsed = read({**spec(ingress=rules), **stated})
    (error,) = parsed.errors
    assert str(error).removeprefix("x.yaml: ClusterNetworkPolicy x: ").startswith(message)
    assert str(error).endswith("the policy accepts nothing, and denies what it would pass")
    assert [(one.action, one.peers == (NOBODY,)) for one in made.ingress] == [
        ("Accept", True),
        ("Deny", False),
        ("Deny", False),
    ]
    assert (made.tier, made.subject) == ("Admin", EVERY_POD if "subject" in stated else PolicyPeer(None, LabelSelector()))
    assert made.priority == (0 if "priority" in stated else 10)


def test_more_rules_than_there_may_be():
    """With more rules than the API takes, that direction is closed and the other stands."""
    made, parsed = read(spec(ingress=[rule()] * 25, egress=[out(action="Pass")] * 26))
    assert all(one.peers != (NOBODY,) for one in made.ingress)
    assert {one.action for one in made.egress} == {"Deny"}
    assert "spec.egress: must hold at most 25 rules, holds 26" in str(parsed.errors[0])


def test_no_spec():
    """A policy without a spec has no rules, and an error says so."""
    made, _ = read(None)
    assert made.ingress == made.egress == ()
    assert errors(None)[0] == "spec: must be an object, is null; it has no rules"


def test_a_long_name_is_cut():
    """A rule's name is for people: one that is too long is cut, and the rule stands."""
    made, parsed = read(spec(ingress=[rule(name="n" * 101)]))
    assert made.ingress[0].name == "n" * 100
    assert made.ingress[0].peers == (PolicyPeer(None, LabelSelector()),)
    assert parsed.errors[0].field == "spec.ingress[0].name"


def test_bad_metadata_leaves_the_rules():
    """A label that is none is named, and the rules stand: they have nothing to do with it."""
    raw = {"kind": "ClusterNetworkPolicy", "metadata": {"name": "x", "labels": {"a": 1}}, "spec": spec(ingress=[rule()])}
    parsed = parse_object(raw, "x.yaml")
    assert [one.ingress for one in parsed.objects] == [(ClusterPolicyRule((PolicyPeer(None, LabelSelector()),)),)]
    assert (
        str(parsed.errors[-1]) == "x.yaml: ClusterNetworkPolicy x: metadata.labels[a]: must be a string, is 1; its rules stand"
    )


def test_other_versions():
    """Another version of the group is an error; another group's kind of that name is nobody's business."""
    raw = {"kind": "ClusterNetworkPolicy", "metadata": {"name": "x"}, "spec": spec()}
    old = parse_object({**raw, "apiVersion": "policy.networking.k8s.io/v1alpha1"}, "x.yaml")
    assert old.objects == ()
    assert "apiVersion: must be policy.networking.k8s.io/v1alpha2" in str(old.errors[0])
    other = parse_object({**raw, "apiVersion": "crd.antrea.io/v1beta1"}, "x.yaml")
    assert (other.objects, other.errors) == ((), ())
