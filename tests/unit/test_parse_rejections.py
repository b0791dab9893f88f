"""What is not accepted, and the words it is refused with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clusterstate.objects import LabelSelector, ObjectRef, PolicyRule
from clusterstate.parse import parse_document, parse_object
from clusterstate.parse_policy import NOBODY


def service(**spec: Any) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}], **spec}}


def slice_(**fields: Any) -> dict[str, Any]:
    return {"kind": "EndpointSlice", "metadata": {"name": "web-1"}, "addressType": "IPv4", **fields}


def endpoints(*subsets: Any) -> dict[str, Any]:
    return {"kind": "Endpoints", "metadata": {"name": "web"}, "subsets": list(subsets)}


def node(status: Any = None, **spec: Any) -> dict[str, Any]:
    return {"kind": "Node", "metadata": {"name": "n1"}, "spec": spec, "status": status}


def pod(status: Any = None, **spec: Any) -> dict[str, Any]:
    return {"kind": "Pod", "metadata": {"name": "p"}, "spec": spec, "status": status}


def policy(**spec: Any) -> dict[str, Any]:
    return {"kind": "NetworkPolicy", "metadata": {"name": "np"}, "spec": {"podSelector": {}, **spec}}


def ingress(peer: Any = None, port: Any = None) -> dict[str, Any]:
    return policy(ingress=[{"from": [peer] if peer is not None else [], "ports": [port] if port is not None else []}])


def two_ports(**second: Any) -> dict[str, Any]:
    return service(ports=[{"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 81, **second}])


PORT = "must be between 1 and 65535, is"
IP = "must be an IP address, is"
CIDR = "must be a CIDR such as 10.0.0.0/8, is"
SPECIAL = "must not be an unspecified, loopback or link-local address, is"
LABEL = 'must be lower case letters, digits and "-", at most 63, is'
RANGES = "spec.loadBalancerSourceRanges"
BLOCK = "spec.ingress[0].from[0].ipBlock"
CLOSED = "it is the only one of IPv4, and without it all would be let in"

SERVICES = [
    (service(ports=[{"port": 70000}]), f"spec.ports[0].port: {PORT} 70000"),
    (service(ports=[{"port": 0}]), f"spec.ports[0].port: {PORT} 0"),
    (service(ports=[{"port": 80}, {"port": -1}]), f"spec.ports[1].port: {PORT} -1"),
    (service(ports=[{}]), "spec.ports[0].port: must be given"),
    (service(ports=[{"port": "80"}]), 'spec.ports[0].port: must be a whole number, is "80"'),
    (service(ports=[{"port": 80.5}]), "spec.ports[0].port: must be a whole number, is 80.5"),
    (service(ports=[{"port": True}]), "spec.ports[0].port: must be a whole number, is true"),
    (service(ports=[{"port": 10**30}]), f"spec.ports[0].port: {PORT} {10**30}"),
    (service(ports={"port": 80}), 'spec.ports: must be a list, is {"port": 80}'),
    (service(ports=[]), "spec.ports: must state at least one port"),
    (service(ports=[{"port": 80, "nodePort": 70000}]), "spec.ports[0].nodePort: must be between 0 and 65535, is 70000"),
    (service(ports=[{"port": 80, "targetPort": 65536}]), f"spec.ports[0].targetPort: {PORT} 65536"),
    (service(ports=[{"port": 80, "targetPort": []}]), "spec.ports[0].targetPort: must be a whole number or a string, is []"),
    (service(ports=[{"port": 80, "targetPort": "a b"}]), f'spec.ports[0].targetPort: {LABEL} "a b"'),
    (service(ports=[{"port": 80, "name": 'x"; drop'}]), f'spec.ports[0].name: {LABEL} "x\\"; drop"'),
    (service(ports=[{"port": 80, "protocol": "ICMP"}]), 'spec.ports[0].protocol: must be TCP, UDP or SCTP, is "ICMP"'),
    (service(ports=[{"port": 80, "protocol": "tcp"}]), 'spec.ports[0].protocol: must be TCP, UDP or SCTP, is "tcp"'),
    (two_ports(name="a"), 'spec.ports[1].name: must not be used twice, is "a"'),
    (two_ports(name=None), "spec.ports[1].name: must be given where there are several ports"),
    (two_ports(port=80), "spec.ports[1].port: must not be used twice with TCP, is 80"),
    (two_ports(nodePort=30080), "spec.ports[1].nodePort: must not be used twice with TCP, is 30080"),
    (service(clusterIP="10.96.0.300"), f'spec.clusterIP: {IP} "10.96.0.300"'),
    (service(clusterIP="10.96.0"), f'spec.clusterIP: {IP} "10.96.0"'),
    (service(clusterIP="10.96.0.1\0"), f'spec.clusterIP: {IP} "10.96.0.1\\u0000"'),
    (service(clusterIP="fd00::1%eth0"), f'spec.clusterIP: {IP} "fd00::1%eth0"'),
    (service(clusterIP=7), "spec.clusterIP: must be a string, is 7"),
    (service(clusterIP="127.0.0.1"), f'spec.clusterIP: {SPECIAL} "127.0.0.1"'),
    (service(clusterIPs=["10.96.0.1", "x"]), f'spec.clusterIPs[1]: {IP} "x"'),
    (service(clusterIPs=["10.96.0.1", "10.96.0.2"]), 'spec.clusterIPs[1]: must be the only one of IPv4, is "10.96.0.2"'),
    (service(clusterIPs=["10.96.0.9"]), 'spec.clusterIPs[0]: must be spec.clusterIP "10.96.0.1", is "10.96.0.9"'),
    (service(ipFamilies=["IPv6"]), 'spec.clusterIP: must be of IPv6 as spec.ipFamilies says, is "10.96.0.1"'),
    (service(ipFamilies=["IPv4", "IP"]), 'spec.ipFamilies[1]: must be IPv4 or IPv6, is "IP"'),
    (service(ipFamilies=["IPv4", "IPv4"]), 'spec.ipFamilies: must state a family once, is ["IPv4", "IPv4"]'),
    (service(type="Cluster"), 'spec.type: must be ClusterIP, NodePort, LoadBalancer or ExternalName, is "Cluster"'),
    (service(externalTrafficPolicy="Node"), 'spec.externalTrafficPolicy: must be Cluster or Local, is "Node"'),
    (service(internalTrafficPolicy="local"), 'spec.internalTrafficPolicy: must be Cluster or Local, is "local"'),
    (service(sessionAffinity="Cookie"), 'spec.sessionAffinity: must be None or ClientIP, is "Cookie"'),
    (
        service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 86401}}),
        "spec.sessionAffinityConfig.clientIP.timeoutSeconds: must be between 1 and 86400, is 86401",
    ),
    (service(healthCheckNodePort=65536), "spec.healthCheckNodePort: must be between 0 and 65535, is 65536"),
    (service(selector={"app": 1}), "spec.selector[app]: must be a string, is 1"),
    (service(publishNotReadyAddresses="yes"), 'spec.publishNotReadyAddresses: must be true or false, is "yes"'),
    (service(externalIPs="10.0.0.1"), 'spec.externalIPs: must be a list, is "10.0.0.1"'),
]

ENDPOINTS = [
    (slice_(addressType=None), 'addressType: must be IPv4, IPv6 or FQDN, is ""'),
    (slice_(addressType="ipv4"), 'addressType: must be IPv4, IPv6 or FQDN, is "ipv4"'),
    (slice_(endpoints=[{"addresses": ["10.0.0.256"]}]), f'endpoints[0].addresses[0]: {IP} "10.0.0.256"'),
    (slice_(endpoints=[{"addresses": ["10.0.0.1\0"]}]), f'endpoints[0].addresses[0]: {IP} "10.0.0.1\\u0000"'),
    (slice_(endpoints=[{"addresses": ["127.0.0.1"]}]), f'endpoints[0].addresses[0]: {SPECIAL} "127.0.0.1"'),
    (slice_(endpoints=[{"addresses": ["0.0.0.0"]}]), f'endpoints[0].addresses[0]: {SPECIAL} "0.0.0.0"'),
    (slice_(endpoints=[{"addresses": ["169.254.1.1"]}]), f'endpoints[0].addresses[0]: {SPECIAL} "169.254.1.1"'),
    (
        slice_(endpoints=[{"addresses": ["fd00::1"]}]),
        'endpoints[0].addresses[0]: must be of IPv4 as addressType says, is "fd00::1"',
    ),
    (
        slice_(addressType="IPv6", endpoints=[{"addresses": ["fd00::1"]}, {"addresses": ["fe80::1"]}]),
        f'endpoints[1].addresses[0]: {SPECIAL} "fe80::1"',
    ),
    (slice_(endpoints=[{"addresses": "10.0.0.1"}]), 'endpoints[0].addresses: must be a list, is "10.0.0.1"'),
    (
        slice_(endpoints=[{"addresses": ["10.0.0.1"], "conditions": {"ready": "true"}}]),
        'endpoints[0].conditions.ready: must be true or false, is "true"',
    ),
    (
        slice_(endpoints=[{"addresses": ["10.0.0.1"], "nodeName": "Node 1"}]),
        'endpoints[0].nodeName: must be lower case letters, digits, "-" and ".", at most 253, is "Node 1"',
    ),
    (slice_(ports=[{"port": 65536}]), f"ports[0].port: {PORT} 65536"),
    (slice_(ports=[{"port": 1, "protocol": "X"}]), 'ports[0].protocol: must be TCP, UDP or SCTP, is "X"'),
    (
        slice_(ports=[{"name": "a", "port": 1}, {"name": "a", "port": 2}]),
        'ports[1].name: must not be used twice with TCP, is "a"',
    ),
    (endpoints({"addresses": [{"ip": "x"}]}), f'subsets[0].addresses[0].ip: {IP} "x"'),
    (endpoints({}, {"notReadyAddresses": [{}]}), f"subsets[1].notReadyAddresses[0].ip: {IP} null"),
    (endpoints({"ports": [{"port": 0}, {"port": 99999}]}), f"subsets[0].ports[1].port: {PORT} 99999"),
]

OTHERS = [
    (node(podCIDR="10.244.0.0"), f'spec.podCIDR: {CIDR} "10.244.0.0"'),
    (node(podCIDR="10.244.0.0/33"), f'spec.podCIDR: {CIDR} "10.244.0.0/33"'),
    (node(podCIDRs=["10.244.0.0/24", "fd00::/129"]), f'spec.podCIDRs[1]: {CIDR} "fd00::/129"'),
    (
        node(podCIDRs=["10.244.0.0/24", "10.245.0.0/24"]),
        'spec.podCIDRs[1]: must be the only one of IPv4, is "10.245.0.0/24"',
    ),
    (
        node(podCIDR="10.1.0.0/24", podCIDRs=["10.2.0.0/24"]),
        'spec.podCIDRs[0]: must be spec.podCIDR "10.1.0.0/24", is "10.2.0.0/24"',
    ),
    (node({"addresses": [{"type": "InternalIP", "address": "host"}]}), f'status.addresses[0].address: {IP} "host"'),
    (pod({"podIP": "10.0.0"}), f'status.podIP: {IP} "10.0.0"'),
    (pod({"podIPs": [{"ip": "10.0.0.1"}, {}]}), f"status.podIPs[1].ip: {IP} null"),
    (pod(containers=[{"ports": [{"containerPort": 0}]}]), f"spec.containers[0].ports[0].containerPort: {PORT} 0"),
    (pod(containers=[{}, {"ports": [{}]}]), "spec.containers[1].ports[0].containerPort: must be given"),
    (pod(containers=[{"command": "sleep"}]), 'spec.containers[0].command: must be a list, is "sleep"'),
    (
        {"kind": "ServiceCIDR", "metadata": {"name": "c"}, "spec": {"cidrs": ["10.96.0.0"]}},
        f'spec.cidrs[0]: {CIDR} "10.96.0.0"',
    ),
]

POLICIES = [
    (policy(policyTypes=["ingress"]), 'spec.policyTypes[0]: must be Ingress or Egress, is "ingress"'),
    (ingress({}), "spec.ingress[0].from[0]: must state a podSelector, a namespaceSelector or an ipBlock"),
    (ingress({"ipBlock": {"cidr": "10.0.0.1"}}), f'{BLOCK}.cidr: {CIDR} "10.0.0.1"'),
    (ingress({"ipBlock": {}}), f"{BLOCK}.cidr: {CIDR} null"),
    (
        ingress({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}}),
        f'{BLOCK}.except[0]: must be a part of 10.0.0.0/8 and smaller, is "11.0.0.0/9"',
    ),
    (
        ingress({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.0.0.0/8"]}}),
        f'{BLOCK}.except[1]: must be a part of 10.0.0.0/8 and smaller, is "10.0.0.0/8"',
    ),
    (
        ingress({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["fd00::/64"]}}),
        f'{BLOCK}.except[0]: must be a part of 10.0.0.0/8 and smaller, is "fd00::/64"',
    ),
    (
        ingress({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}),
        f"{BLOCK}: must not stand beside a podSelector or namespaceSelector",
    ),
    (ingress(port={"port": 0}), f"spec.ingress[0].ports[0].port: {PORT} 0"),
    (ingress(port={"port": "http_1"}), f'spec.ingress[0].ports[0].port: {LABEL} "http_1"'),
    (ingress(port={"port": 80, "endPort": 79}), "spec.ingress[0].ports[0].endPort: must be between 80 and 65535, is 79"),
    (ingress(port={"endPort": 79}), "spec.ingress[0].ports[0].endPort: must stand beside a port that is a number, is 79"),
    (
        ingress(port={"port": "http", "endPort": 79}),
        "spec.ingress[0].ports[0].endPort: must stand beside a port that is a number, is 79",
    ),
    (
        policy(podSelector={"matchExpressions": [{"key": "a", "operator": "Equals"}]}),
        'spec.podSelector.matchExpressions[0].operator: must be In, NotIn, Exists or DoesNotExist, is "Equals"',
    ),
    (
        policy(podSelector={"matchExpressions": [{"key": "a", "operator": "In", "values": []}]}),
        "spec.podSelector.matchExpressions[0].values: must hold a value for In",
    ),
    (
        policy(podSelector={"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}),
        'spec.podSelector.matchExpressions[0].values: must be empty for Exists, is ["b"]',
    ),
    (
        policy(podSelector={"matchExpressions": [{"operator": "Exists"}]}),
        "spec.podSelector.matchExpressions[0].key: must be given",
    ),
    (
        policy(egress=[{"to": [{"namespaceSelector": {"matchLabels": {"a": None}}}]}]),
        "spec.egress[0].to[0].namespaceSelector.matchLabels[a]: must be a string, is null",
    ),
]


@pytest.mark.parametrize(("raw", "message"), [*SERVICES, *ENDPOINTS, *OTHERS])
def test_a_bad_field_is_refused_by_name_and_value(raw, message):
    """An object with a field that cannot stand is left out; the error says which field, and what it holds."""
    kind, name = raw["kind"], raw["metadata"]["name"]
    where = f"{kind} {name}" if kind in ("Node", "ServiceCIDR") else f"{kind} default/{name}"
    for parsed in (parse_object(raw, "x.yaml"), parse_document(json.dumps(raw).encode(), "x.yaml", is_json=True)):
        assert parsed.objects == ()
        assert [str(error) for error in parsed.errors] == [f"x.yaml: {where}: {message}"]
        assert not parsed.errors[0].kept


@pytest.mark.parametrize(("raw", "message"), POLICIES)
def test_a_policy_with_a_bad_field_is_closed(raw, message):
    """A NetworkPolicy with a field that cannot stand isolates its pods and lets nothing through there; the error says so."""
    for parsed in (parse_object(raw, "x.yaml"), parse_document(json.dumps(raw).encode(), "x.yaml", is_json=True)):
        (made,) = parsed.objects
        assert all(rule == PolicyRule((NOBODY,)) for rule in (*made.ingress, *made.egress))
        assert made.isolates_ingress
        (error,) = parsed.errors
        assert str(error).startswith(f"x.yaml: NetworkPolicy default/np: {message}; ")
        assert error.kept


def test_a_bad_rule_leaves_the_others():
    """Beside a rule with a fault the others stand, each in its place; a podSelector with one selects every pod."""
    good = {"from": [{"podSelector": {}}]}
    (made,) = parse_object(policy(ingress=[good, {"from": [{}]}, good]), "x.yaml").objects
    assert [rule.peers == (NOBODY,) for rule in made.ingress] == [False, True, False]
    bad = {"matchExpressions": [{"key": "a", "operator": "Is"}]}
    (made,) = parse_object(policy(podSelector=bad), "x.yaml").objects
    assert made.pod_selector == LabelSelector()


def test_too_many_rules_let_nothing_through():
    """A policy with more rules than anybody can mean is closed, and the error says how many there are."""
    parsed = parse_object(policy(ingress=[{}] * 10_000), "x.yaml")
    assert parsed.objects[0].ingress == ()
    assert "spec.ingress: must hold at most 5000 rules, holds 10000" in str(parsed.errors[0])


METADATA = [
    ({"name": "web", "labels": {"a/b": 1}}, "metadata.labels[a/b]: must be a string, is 1"),
    ({"name": "web", "labels": ["a"]}, 'metadata.labels: must be an object, is ["a"]'),
    ({"name": "web", "namespace": 1}, "metadata.namespace: must be a string, is 1"),
    ({"name": "web", "namespace": "a b"}, f'metadata.namespace: {LABEL} "a b"'),
    ({"name": "Web"}, f'metadata.name: {LABEL} "Web"'),
    (
        {"name": "web", "annotations": {"a": "x" * 5_000_000}},
        "metadata.annotations: must be at most 262144 bytes together, are 5000001 bytes",
    ),
    (
        {"name": "web", "annotations": {"a": ["x" * 500]}},
        f'metadata.annotations[a]: must be a string, is ["{"x" * 78}... (504 characters)',
    ),
]


@pytest.mark.parametrize(("metadata", "message"), METADATA)
def test_metadata_is_checked_and_long_values_are_cut(metadata, message):
    """Names, labels and annotations are checked like the rest, and an error never repeats megabytes."""
    parsed = parse_object({**service(), "metadata": metadata}, "x.yaml")
    assert parsed.objects == ()
    assert [f"{error.field}: {error.reason}" for error in parsed.errors] == [message]


@pytest.mark.parametrize(
    ("ranges", "path", "value", "left_out"),
    [
        (["x"], f"{RANGES}[0]", '"x"', []),
        (["fd00::/8", "10.0.0.0/33"], f"{RANGES}[1]", '"10.0.0.0/33"', []),
        ([""], f"{RANGES}[0]", '""', []),
    ],
)
def test_a_service_never_opens_because_its_ranges_cannot_be_read(ranges, path, value, left_out):
    """Where a family's source ranges are all unreadable the Service is refused, not let in for everybody."""
    parsed = parse_object(service(type="LoadBalancer", loadBalancerSourceRanges=ranges), "x.yaml")
    assert list(parsed.objects) == left_out
    assert [(e.field, e.reason) for e in parsed.errors] == [(path, f"{CIDR} {value}; {CLOSED}")]


WHOLE = [
    ({"kind": "Service"}, "metadata.name: must be given for a Service"),
    ({"kind": "Service", "metadata": {"name": ""}}, "metadata.name: must be given for a Service"),
    ({"kind": "Service", "metadata": {"name": 5}}, "metadata.name: must be a string, is 5"),
    ({"kind": "Service", "metadata": []}, "metadata: must be an object, is []"),
    ({"metadata": {"name": "web"}}, 'kind: must be the kind of an object, is ""'),
    ({"kind": 3}, "kind: must be the kind of an object, is 3"),
    ({"kind": "List", "items": {}}, "items: must be a list, at most 16 inside one another, is {}"),
    ({"kind": "List", "items": [7]}, "items[0]: must be an object, is 7"),
    ({"kind": "List", "items": [{"kind": "Pod"}]}, "items[0].metadata.name: must be given for a Pod"),
    (
        {"kind": "List", "items": [{"kind": "List", "items": [{}]}]},
        'items[0].items[0].kind: must be the kind of an object, is ""',
    ),
]


@pytest.mark.parametrize(("raw", "message"), WHOLE)
def test_what_cannot_be_named_is_refused_by_its_place(raw, message):
    """An object without a readable name is refused by where it stands in the document."""
    for parsed in (parse_object(raw, "x"), parse_document(json.dumps(raw).encode(), "x", is_json=True)):
        assert parsed.objects == ()
        assert [f"{e.field}: {e.reason}" for e in parsed.errors] == [message]
        assert parsed.errors[0].ref is None


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [
        ("EndpointSlice", "discovery.k8s.io/v1beta1", 'must be discovery.k8s.io/v1, is "discovery.k8s.io/v1beta1"'),
        (
            "ServiceCIDR",
            "networking.k8s.io/v2",
            'must be networking.k8s.io/v1 or networking.k8s.io/v1beta1, is "networking.k8s.io/v2"',
        ),
        ("Service", 1, "must be a string, is 1"),
    ],
)
def test_a_version_we_do_not_know_is_an_error(kind, version, message):
    """A known kind in an unknown version of its own API group is refused, rather than read wrongly."""
    parsed = parse_object({"kind": kind, "apiVersion": version, "metadata": {"name": "x"}}, "f")
    namespace = "" if kind == "ServiceCIDR" else "default"
    assert [(e.ref, e.field, e.reason) for e in parsed.errors] == [(ObjectRef(kind, namespace, "x"), "apiVersion", message)]


@pytest.mark.parametrize(
    ("data", "is_json", "reason"),
    [
        (b"", False, "is empty: perhaps not yet written"),
        (b" \n", True, "is empty: perhaps not yet written"),
        (b'{"kind": "Service", "meta', True, "is not JSON: Input data was truncated"),
        (b'{"kind": "List", "items": [{"kind": "Ser', True, "is not JSON: Input data was truncated"),
        (
            b'{"kind": "Node", "metadata": {"name": "\xff"}}',
            True,
            "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (b'{"kind": "\xff"}', True, "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"kind: [Service\n", False, "is not YAML: line 2: did not find expected ',' or ']'"),
        (b"kind: Service\n  x: 1\n", False, "is not YAML: line 2: mapping values are not allowed in this context"),
        (b"kind: \x00", False, "is not YAML: unacceptable character #x0000: control characters are not allowed"),
        (b"[" * 100_000, True, "is not JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_document_that_cannot_be_read_is_one_error(data, is_json, reason):
    """Broken or half-written text is an error of the file as a whole."""
    parsed = parse_document(data, "x", is_json)
    assert parsed.objects == ()
    assert [(e.source, e.ref, e.field) for e in parsed.errors] == [("x", None, "")]
    assert parsed.errors[0].reason.startswith(reason)


YAML_TRAPS = [
    ("metadata: {name: a, labels: {x: on}}", "metadata.labels[x]: must be a string, is true"),
    ("metadata: {name: a, labels: {x: 1.0}}", "metadata.labels[x]: must be a string, is 1.0"),
    ("metadata: {name: a, labels: {1: x}}", "metadata.labels: must have strings as keys, has 1"),
    ("metadata: {name: a, labels: {x: ~}}", "metadata.labels[x]: must be a string, is null"),
]


@pytest.mark.parametrize(("text", "message"), YAML_TRAPS)
def test_yaml_that_means_something_else_is_refused(text, message):
    """A plain word that YAML reads as a boolean or a number is no label value, and the error shows what it was read as."""
    parsed = parse_document(f"kind: Namespace\n{text}\n".encode(), "x", is_json=False)
    assert [f"{e.field}: {e.reason}" for e in parsed.errors] == [message]


def test_one_bad_object_leaves_the_others():
    """Bad objects of a list, and documents before a broken one, do not take the good ones with them."""
    good, bad = service(), {**service(ports=[{"port": 0}]), "metadata": {"name": "bad"}}
    data = json.dumps({"kind": "List", "items": [bad, good, 7]}).encode()
    for parsed in (parse_document(data, "x", is_json=True), parse_object(json.loads(data), "x")):
        assert [o.name for o in parsed.objects] == ["web"]
        assert [e.field for e in parsed.errors] == ["spec.ports[0].port", "items[2]"]
    parsed = parse_document(b"kind: Namespace\nmetadata: {name: a}\n---\nkind: [\n", "x", is_json=False)
    assert [o.name for o in parsed.objects] == ["a"]
    assert len(parsed.errors) == 1
