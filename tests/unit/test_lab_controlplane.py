"""The lab's control plane: given objects in, complete objects out."""

from __future__ import annotations

import copy
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from clusterstate.objects import ObjectRef
from clusterstate.parse import parse_object
from netnslab.api.remote import with_kubernetes
from netnslab.controlplane import complete, is_own, unplaceable
from netnslab.endpoints import endpoints_for, mirrored_slices
from netnslab.errors import LabInputError
from netnslab.given import reference
from netnslab.memory import Memory, free_cluster_ip, free_node_port, next_pod_ip
from netnslab.topology import Topology, parse_topology


def topology(nodes: int = 3, *, dual: bool = False) -> Topology:
    cluster = {"pod_cidrs": ["10.244.0.0/16"], "service_cidrs": ["10.96.0.0/16"]}
    if dual:
        cluster = {k: [*v, six] for (k, v), six in zip(cluster.items(), ("fd00:10:244::/48", "fd00:10:96::/112"), strict=True)}
    rows = [{"name": f"node-{i + 1}", "zone": f"zone-{i + 1}"} for i in range(nodes)]
    return parse_topology({"cluster": cluster, "nodes": rows}, "test.toml")


def pod(name: str, **fields: Any) -> dict[str, Any]:
    spec = {"containers": [{"ports": fields.pop("ports", [{"name": "web", "containerPort": 8080}])}], **fields.pop("spec", {})}
    metadata = {"name": name, "labels": {"app": "web"}, **fields.pop("metadata", {})}
    return {"kind": "Pod", "metadata": metadata, "spec": spec, **fields}


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    full = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "web"}], **spec}
    return {"kind": "Service", "metadata": {"name": name}, "spec": full}


def given(*objects: dict[str, Any]) -> dict[ObjectRef, dict[str, Any]]:
    return {reference(o): o for o in objects}


def find(objects: dict[ObjectRef, dict[str, Any]], kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
    return objects[ObjectRef(kind, "" if kind in {"Node", "Namespace"} else namespace, name)]


def test_pods_are_spread_and_get_addresses_of_their_nodes() -> None:
    """Pods go round the nodes, each with the next address of its node's podCIDR from .2 upward, running and ready."""
    done = complete(given(*(pod(f"web-{i}") for i in range(6))), topology(), Memory())
    pods = [o for ref, o in done.objects.items() if ref.kind == "Pod"]
    assert [(p["spec"]["nodeName"], p["status"]["podIP"]) for p in pods] == [
        ("node-1", "10.244.1.2"),
        ("node-2", "10.244.2.2"),
        ("node-3", "10.244.3.2"),
        ("node-1", "10.244.1.3"),
        ("node-2", "10.244.2.3"),
        ("node-3", "10.244.3.3"),
    ]
    assert pods[0]["status"]["conditions"] == [{"type": "Ready", "status": "True"}]


def test_what_was_dealt_out_stays() -> None:
    """Completing again with the memory gives the same objects; a pod that goes takes nobody's place and frees its address last."""
    objects = given(*(pod(f"web-{i}") for i in range(4)), service(type="NodePort"))
    first = complete(objects, topology(), Memory())
    assert complete(objects, topology(), first.memory) == first
    fewer = {ref: o for ref, o in objects.items() if ref.name != "web-0"}
    second = complete(fewer, topology(), first.memory)
    assert {ref: second.objects[ref] for ref in fewer if ref.kind == "Pod"} == {
        ref: first.objects[ref] for ref in fewer if ref.kind == "Pod"
    }
    third = complete({**fewer, **given(pod("new"))}, topology(), second.memory)
    ip = find(third.objects, "Pod", "new")["status"]["podIP"]
    assert ip not in {o["status"]["podIP"] for ref, o in first.objects.items() if ref.kind == "Pod"}


def test_nothing_given_is_changed() -> None:
    """Objects and memory that are handed in stay as they are."""
    objects, memory = given(pod("web-1"), service(type="LoadBalancer", externalTrafficPolicy="Local")), Memory()
    before = copy.deepcopy((objects, memory))
    complete(objects, topology(), memory)
    assert (objects, memory) == before


def test_what_objects_state_is_kept() -> None:
    """A stated node, pod address, ClusterIP and NodePort stand, and nobody else gets them."""
    done = complete(
        given(
            pod("pinned", spec={"nodeName": "node-2"}, status={"podIPs": [{"ip": "10.244.2.2"}]}),
            pod("other", spec={"nodeName": "node-2"}),
            service(type="NodePort", clusterIP="10.96.1.1", ports=[{"port": 80, "nodePort": 30086}]),
            service("free", type="NodePort"),
        ),
        topology(),
        Memory(),
    )
    assert find(done.objects, "Pod", "pinned")["status"]["podIP"] == "10.244.2.2"
    assert find(done.objects, "Pod", "other")["status"]["podIP"] == "10.244.2.3"
    spec = find(done.objects, "Service", "web")["spec"]
    assert (spec["clusterIPs"], spec["ports"][0]["nodePort"]) == (["10.96.1.1"], 30086)
    spec = find(done.objects, "Service", "free")["spec"]
    assert (spec["clusterIPs"], spec["ports"][0]["nodePort"]) == (["10.96.1.2"], 30087)


def test_slices_hold_conditions_zones_and_resolved_ports() -> None:
    """A slice has each selected pod with its node, zone and conditions, and the number its named port has in that pod."""
    not_ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]}
    done = complete(
        given(
            pod("a"),
            pod("b", status=not_ready),
            pod("c", metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}),
            pod("d", ports=[{"name": "web", "containerPort": 9090}]),
            pod("e", metadata={"labels": {"app": "else"}}),
            pod("f", status={"phase": "Succeeded"}),
            service(),
        ),
        topology(1),
        Memory(),
    )
    slices = [o for ref, o in done.objects.items() if ref.kind == "EndpointSlice"]
    seen = [
        (e["targetRef"]["name"], s["ports"], tuple(e["conditions"].values()), e["nodeName"], e["zone"])
        for s in slices
        for e in s["endpoints"]
    ]
    web, other = ([{"name": "", "protocol": "TCP", "port": n}] for n in (8080, 9090))
    assert seen == [
        ("a", web, (True, True, False), "node-1", "zone-1"),
        ("b", web, (False, False, False), "node-1", "zone-1"),
        ("c", web, (False, True, True), "node-1", "zone-1"),
        ("d", other, (True, True, False), "node-1", "zone-1"),
    ]


def test_given_slices_and_endpoints_are_the_only_ones() -> None:
    """A Service whose slices or Endpoints were given gets none from its selector."""
    stated = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "mine", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [],
        "ports": [],
    }
    endpoints = {"kind": "Endpoints", "metadata": {"name": "api"}, "subsets": []}
    done = complete(given(pod("a"), service(), stated, service("api"), endpoints), topology(), Memory())
    assert [ref.name for ref in done.objects if ref.kind == "EndpointSlice"] == ["mine"]


def test_dual_stack() -> None:
    """A dual-stack Service has an address and a slice of each family; a single-stack one those of the cluster's first."""
    done = complete(
        given(pod("a"), service(ipFamilyPolicy="PreferDualStack"), service("one"), service("six", ipFamilies=["IPv6"])),
        topology(dual=True),
        Memory(),
    )
    spec = find(done.objects, "Service", "web")["spec"]
    assert [ip_address(ip).version for ip in spec["clusterIPs"]] == [4, 6]
    assert [ip_address(e["ip"]).version for e in find(done.objects, "Pod", "a")["status"]["podIPs"]] == [4, 6]
    names = sorted(ref.name for ref in done.objects if ref.kind == "EndpointSlice")
    assert names == ["one-ipv4", "six-ipv6", "web-ipv4", "web-ipv6"]


def test_headless_and_external_name() -> None:
    """A headless Service has slices and no address; an ExternalName neither."""
    out = {"kind": "Service", "metadata": {"name": "out"}, "spec": {"type": "ExternalName", "externalName": "example.org"}}
    done = complete(given(pod("a"), service(clusterIP="None"), out), topology(), Memory())
    assert find(done.objects, "Service", "web")["spec"]["clusterIPs"] == ["None"]
    assert "clusterIPs" not in find(done.objects, "Service", "out")["spec"]
    assert [ref.name for ref in done.objects if ref.kind == "EndpointSlice"] == ["web-ipv4"]


def test_host_network_pods_have_their_nodes_address() -> None:
    """A pod in the host's network has the node's address and takes none of the podCIDR."""
    done = complete(
        given(pod("h", spec={"hostNetwork": True, "nodeName": "node-1"}), pod("p", spec={"nodeName": "node-1"})),
        topology(),
        Memory(),
    )
    assert find(done.objects, "Pod", "h")["status"]["podIP"] == "192.168.50.11"
    assert find(done.objects, "Pod", "p")["status"]["podIP"] == "10.244.1.2"


def test_more_than_a_hundred_endpoints_are_several_slices() -> None:
    """A slice holds at most 100 endpoints."""
    done = complete(given(*(pod(f"p-{i}") for i in range(150)), service()), topology(), Memory())
    sizes = {ref.name: len(o["endpoints"]) for ref, o in done.objects.items() if ref.kind == "EndpointSlice"}
    assert sizes == {"web-ipv4": 100, "web-ipv4-2": 50}


def test_everything_made_can_be_parsed() -> None:
    """What comes out is what clusterstate reads without an error, in every kind."""
    done = complete(
        given(pod("a"), service(type="LoadBalancer", externalTrafficPolicy="Local", trafficDistribution="PreferSameNode")),
        topology(dual=True),
        Memory(),
    )
    for ref, raw in done.objects.items():
        parsed = parse_object(raw, "lab")
        assert (str(ref), [str(e) for e in parsed.errors], len(parsed.objects)) == (str(ref), [], 1)


@pytest.mark.parametrize(
    ("objects", "error"),
    [
        ([pod("a", spec={"nodeName": "nope"})], "Pod default/a: spec.nodeName: must be a node of the lab"),
        ([pod("a", spec={"nodeSelector": {"disk": "ssd"}})], "Pod default/a: spec.nodeSelector: no node has these labels"),
        (
            [pod(n, status={"podIP": "10.244.1.9"}) for n in "ab"],
            "Pod default/b: status.podIPs: 10.244.1.9 is that of Pod default/a",
        ),
        ([service(n, clusterIP="10.96.0.9") for n in "ab"], "Service default/b: spec.clusterIPs: 10.96.0.9 is that of"),
        (
            [service(n, type="NodePort", ports=[{"port": 1, "nodePort": 30000}]) for n in "ab"],
            "nodePort: 30000/TCP is that of Service default/a already",
        ),
        ([service(ipFamilies=["IPv6"])], "Service default/web: spec.ipFamilies: the lab has no IPv6 Service CIDR"),
        ([service(ipFamilyPolicy="RequireDualStack")], "Service default/web: spec.ipFamilyPolicy: the lab has only IPv4"),
        ([{"kind": "Node", "metadata": {"name": "n9"}}], "Node n9: metadata.name: the lab's nodes are node-1, node-2, node-3"),
        (
            [{"kind": "Node", "metadata": {"name": "node-1"}, "spec": {"podCIDR": "10.9.0.0/24"}}],
            "Node node-1: spec.podCIDRs: the node has 10.244.1.0/24",
        ),
    ],
)
def test_refused(objects: list[dict[str, Any]], error: str) -> None:
    """What no control plane would admit is refused, naming object, field and value."""
    with pytest.raises(LabInputError) as raised:
        complete(given(*objects), topology(), Memory())
    assert error in str(raised.value)


def test_a_removed_node_has_no_object_and_no_pods() -> None:
    """A node whose object was deleted is not scheduled to, and stating it is refused."""
    memory = Memory(removed_nodes=["node-1"])
    done = complete(given(pod("a")), topology(2), memory)
    assert find(done.objects, "Pod", "a")["spec"]["nodeName"] == "node-2"
    assert [ref.name for ref in done.objects if ref.kind == "Node"] == ["node-2"]


def test_ranges_run_out_with_a_clear_word() -> None:
    """Addresses are dealt out to the last, then an error names the range; the static band comes last."""
    memory, taken = Memory(), set[str]()
    for _ in range(5):
        taken.add(next_pod_ip(memory, "10.0.0.0/29", taken))
    assert taken == {f"10.0.0.{i}" for i in range(2, 7)}
    with pytest.raises(LabInputError, match=r"podCIDR 10.0.0.0/29: has no free address"):
        next_pod_ip(memory, "10.0.0.0/29", taken)
    taken = set()
    for _ in range(30):
        taken.add(free_cluster_ip("10.0.0.0/27", taken))
    assert taken == {str(h) for h in ip_network("10.0.0.0/27").hosts()}
    with pytest.raises(LabInputError, match="service CIDR"):
        free_cluster_ip("10.0.0.0/27", taken)
    assert free_node_port(set()) == 30086
    assert free_node_port(set(range(30086, 32768))) == 30000


# -- for an API server -------------------------------------------------------------------------------------------------


def test_a_cordoned_node_takes_no_new_pods_and_keeps_those_it_has() -> None:
    """A node that is unschedulable gets no new pod; one that it has stays with it."""
    first = complete(given(pod("a"), pod("b")), topology(2), Memory())
    closed = {"kind": "Node", "metadata": {"name": "node-1"}, "spec": {"unschedulable": True}}
    done = complete(given(closed, pod("a"), pod("b"), pod("c"), pod("d")), topology(2), first.memory)
    nodes = {name: find(done.objects, "Pod", name)["spec"]["nodeName"] for name in "abcd"}
    assert nodes == {"a": "node-1", "b": "node-2", "c": "node-2", "d": "node-2"}


def test_pods_that_fit_nowhere_are_named() -> None:
    """Each pod without a node is told with its reason, and only those."""
    asked = given(pod("a"), pod("b", spec={"nodeSelector": {"disk": "ssd"}}), pod("c", spec={"nodeName": "node-9"}))
    found = unplaceable(asked, topology(2), Memory())
    assert [ref.name for ref in found] == ["b", "c"]
    assert "no node has these labels: {'disk': 'ssd'}" in found[ObjectRef("Pod", "default", "b")]
    assert "must be a node of the lab (node-1, node-2), is 'node-9'" in found[ObjectRef("Pod", "default", "c")]


def test_endpoints_are_the_older_form_of_slices() -> None:
    """A Service's Endpoints object holds the addresses of its slices, ready and not, by their own pods; it counts as made."""
    unready = {"conditions": [{"type": "Ready", "status": "False"}]}
    done = complete(given(service(), pod("a"), pod("b", status=unready)), topology(), Memory())
    slices = [raw for ref, raw in done.objects.items() if ref.kind == "EndpointSlice"]
    found = endpoints_for(find(done.objects, "Service", "web"), slices)
    (subset,) = found["subsets"]
    assert [e["ip"] for e in subset["addresses"]] == ["10.244.1.2"]
    assert [e["ip"] for e in subset["notReadyAddresses"]] == ["10.244.2.2"]
    assert subset["ports"] == [{"name": "", "protocol": "TCP", "port": 8080}]
    assert all(map(is_own, [found, *slices]))
    assert parse_object(found, "").errors == ()


def test_endpoints_that_are_given_are_mirrored() -> None:
    """Slices made of a given Endpoints object mean what the object itself means to an agent that reads files."""
    ports = [{"name": "http", "port": 80}]
    subsets = [
        {"addresses": [{"ip": "10.0.0.1"}], "notReadyAddresses": [{"ip": "10.0.0.2"}], "ports": ports},
        {"addresses": [{"ip": "fd00::1"}], "ports": ports},
    ]
    raw = {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "ext", "namespace": "default"}, "subsets": subsets}
    direct = parse_object(raw, "").objects
    through = [one for made in mirrored_slices(raw) for one in parse_object(made, "").objects]
    assert [(s.service, s.family, s.endpoints, s.ports) for s in through] == [
        (s.service, s.family, s.endpoints, s.ports) for s in direct
    ]
    assert (
        mirrored_slices({**raw, "metadata": {**raw["metadata"], "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}}})
        == []
    )


def test_the_service_of_the_api_server() -> None:
    """default/kubernetes has the first ClusterIP and the router behind it, unless somebody has its name or its address."""
    found = with_kubernetes({}, topology())
    done = complete(found, topology(), Memory()).objects
    assert find(done, "Service", "kubernetes")["spec"]["clusterIP"] == "10.96.0.1"
    assert find(done, "EndpointSlice", "kubernetes")["endpoints"][0]["addresses"] == ["192.168.50.1"]
    for other in (service("kubernetes"), service("mine", clusterIP="10.96.0.1")):
        assert with_kubernetes(given(other), topology()) == given(other)
