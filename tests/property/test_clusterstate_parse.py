"""Parsing never raises, and its quick and its thorough way agree."""

from __future__ import annotations

import copy
import json
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterstate import fields
from clusterstate.parse import TOGETHER, parse_document, parse_object
from clusterstate.print import print_object
from clusterstate.snapshot import Snapshot, edited

SEEDS: list[dict[str, Any]] = [
    {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": "web", "namespace": "prod", "labels": {"a": "b"}, "annotations": {"c": "d"}},
        "spec": {
            "clusterIP": "10.96.0.1",
            "clusterIPs": ["10.96.0.1", "fd00::1"],
            "ipFamilies": ["IPv4", "IPv6"],
            "type": "LoadBalancer",
            "ports": [{"name": "a", "port": 80, "targetPort": "http"}, {"name": "b", "port": 81, "nodePort": 30000}],
            "selector": {"a": "b"},
            "externalIPs": ["198.51.100.1"],
            "loadBalancerSourceRanges": ["10.0.0.0/8"],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}},
            "externalTrafficPolicy": "Local",
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "VIP"}]}},
    },
    {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "a", "port": 80}],
        "endpoints": [
            {
                "addresses": ["10.0.0.1"],
                "conditions": {"ready": True},
                "nodeName": "n1",
                "hints": {"forZones": [{"name": "z"}]},
                "targetRef": {"kind": "Pod", "name": "p"},
            }
        ],
    },
    {
        "kind": "Endpoints",
        "metadata": {"name": "db"},
        "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "notReadyAddresses": [{"ip": "fd00::1"}], "ports": [{"port": 1}]}],
    },
    {
        "kind": "Node",
        "metadata": {"name": "n1"},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"], "taints": [{"key": "k"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    },
    {
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"nodeName": "n1", "containers": [{"command": ["x"], "ports": [{"containerPort": 80, "name": "http"}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]},
    },
    {
        "kind": "NetworkPolicy",
        "metadata": {"name": "np"},
        "spec": {
            "podSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "c", "operator": "In", "values": ["d"]}]},
            "ingress": [
                {
                    "from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
                    "ports": [{"port": 80, "endPort": 90}],
                }
            ],
            "egress": [{"to": [{"namespaceSelector": {}}]}],
        },
    },
    {
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "cnp"},
        "spec": {
            "tier": "Admin",
            "priority": 5,
            "subject": {"namespaces": {"matchLabels": {"a": "b"}}},
            "ingress": [
                {
                    "action": "Deny",
                    "from": [{"pods": {"namespaceSelector": {}, "podSelector": {}}}],
                    "protocols": [{"tcp": {"destinationPort": {"number": 80}}}, {"destinationNamedPort": "http"}],
                }
            ],
            "egress": [
                {
                    "action": "Accept",
                    "to": [{"networks": ["10.0.0.0/8"]}],
                    "protocols": [{"udp": {"destinationPort": {"range": {"start": 1, "end": 9}}}}],
                }
            ],
        },
    },
    {"kind": "ServiceCIDR", "metadata": {"name": "c"}, "spec": {"cidrs": ["10.96.0.0/12"]}},
    {"kind": "List", "items": [{"kind": "Namespace", "metadata": {"name": "a"}}, {"kind": "Deployment"}]},
]

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["", "None", "IPv4", "::1", "10.0.0.1", "0.0.0.0/0", "Local", "\u0000", "Service", "List"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return each (container, key) inside a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10_000), JUNK), min_size=1, max_size=3))
def test_any_junk_in_any_place_is_an_error_or_nothing(seed, changes):
    """With anything at all in any field, parsing yields objects or errors with their source, the same in both ways."""
    raw = copy.deepcopy(seed)
    for number, junk in changes:
        found = places(raw)
        if found:
            container, key = found[number % len(found)]
            container[key] = junk
    slow = parse_object(raw, "x")
    quick = parse_document(json.dumps(raw).encode(), "x", is_json=True)
    assert quick == slow
    assert all(error.source == "x" and error.reason and "\n" not in str(error) for error in slow.errors)
    snapshot = edited(Snapshot(), (), slow.objects)
    assert edited(snapshot, slow.objects, ()) == Snapshot()


USUAL = [{**seed, "metadata": {"name": f"n{i}"}} for i, seed in enumerate(SEEDS[:-1] * TOGETHER)]
UNUSUAL = [
    {"kind": "Deployment"},
    {"kind": "Node", "metadata": 1},
    {"metadata": {"name": "x"}},
    {"kind": "Pod"},
    None,
    SEEDS[-1],
]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3 * TOGETHER), st.dictionaries(st.integers(0, 3 * TOGETHER), st.sampled_from(UNUSUAL), max_size=3))
def test_an_unusual_object_changes_nothing_for_its_neighbours(length, unusual):
    """A list gives the same objects and errors, in the same order, whether its JSON is decoded many at a time or is decoded already."""
    items = [unusual.get(i, USUAL[i % len(USUAL)]) for i in range(length)]
    raw = {"kind": "ServiceList", "items": items}
    slow = parse_object(raw, "x")
    quick = parse_document(json.dumps(raw).encode(), "x", is_json=True)
    assert quick == slow
    assert list(quick.made) == list(slow.made)


@given(
    st.ip_addresses().map(str) | st.sampled_from(["127.0.0.1", "169.254.0.1", "224.0.0.1", "0.0.0.0", "010.0.0.1"]) | st.text()
)
def test_the_quick_look_at_an_address_agrees_with_the_thorough_one(text):
    """An address that is plainly routable IPv4 reads as what the general way makes of it; of all others nothing is said."""
    quick = fields.plain_ipv4(text)
    if quick is not None:
        assert quick == fields.ip("f", text) == ip_address(text)
        assert not any([quick.is_unspecified, quick.is_loopback, quick.is_link_local])
        assert quick not in ip_network("224.0.0.0/24")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.booleans())
def test_any_bytes_are_an_error_or_nothing(data, is_json):
    """No file can stop the program."""
    parsed = parse_document(data, "x", is_json)
    assert all(error.source == "x" for error in parsed.errors)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10_000), JUNK | st.sampled_from(["Exists", "UDP"])), max_size=2)
)
def test_what_is_printed_is_parsed_to_the_same(seed, changes):
    """Whatever parsing makes of an object, printing it and parsing that makes it once more."""
    raw = copy.deepcopy(seed)
    for number, junk in changes:
        found = places(raw)
        if found:
            container, key = found[number % len(found)]
            container[key] = junk
    for ref, made in parse_object(raw, "x").made.items():
        if made and ref.kind != "Endpoints":  # becomes slices, which are no objects of their own
            (one,) = made
            again = parse_document(msgspec.json.encode(print_object(one)), "y", is_json=True)
            # What stands for a policy that cannot be read may have a name that nothing can have.
            assert again.made == {ref: (one,)} or any(error.field == "metadata.name" for error in again.errors)
