"""Every kind as it is meant: full objects, defaults, lists, YAML and JSON."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network

import pytest
from immutables import Map

from clusterstate.objects import (
    ContainerPort,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    IPBlock,
    LabelSelector,
    LoadBalancerIngress,
    Namespace,
    NetworkPolicy,
    Node,
    NodeAddress,
    Pod,
    PolicyPeer,
    PolicyPort,
    PolicyRule,
    Requirement,
    Service,
    ServiceCIDR,
    ServicePort,
)
from clusterstate.parse import Parsed, parse_document, parse_object
from clusterstate.yamltext import load_documents

FULL_SERVICE = """
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: prod
  labels: {app: web}
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: "{...}"
    note: kept
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00::a"]
  ipFamilies: [IPv4, IPv6]
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080, nodePort: 30080}
  - {name: dns, port: 53, protocol: UDP, targetPort: dns-udp, appProtocol: x}
  externalIPs: [198.51.100.1]
  loadBalancerSourceRanges: [203.0.113.0/24]
  externalTrafficPolicy: Local
  internalTrafficPolicy: Local
  trafficDistribution: PreferClose
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  healthCheckNodePort: 32000
  publishNotReadyAddresses: true
  someNewField: {a: [1]}
status:
  loadBalancer:
    ingress:
    - {ip: 192.0.2.1, ipMode: Proxy}
    - {hostname: lb.example.com}
    - {ip: 192.0.2.2}
"""

SERVICE = Service(
    namespace="prod",
    name="web",
    type="LoadBalancer",
    cluster_ips=(ip_address("10.96.0.10"), ip_address("fd00::a")),
    ports=(ServicePort("http", "TCP", 80, 8080, 30080), ServicePort("dns", "UDP", 53, "dns-udp", 0)),
    selector=Map(app="web"),
    external_ips=(ip_address("198.51.100.1"),),
    load_balancer=(LoadBalancerIngress(ip_address("192.0.2.1"), "Proxy"), LoadBalancerIngress(ip_address("192.0.2.2"))),
    source_ranges=(ip_network("203.0.113.0/24"),),
    external_policy="Local",
    internal_policy="Local",
    affinity_seconds=60,
    health_check_node_port=32000,
    publish_not_ready=True,
    ip_families=(4, 6),
    labels=Map(app="web"),
    annotations=Map(note="kept"),
)

FULL_SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x, namespace: prod, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports:
- {name: http, port: 8080}
- {port: 53, protocol: UDP}
- {name: none}
- {name: zero, port: 0}
endpoints:
- addresses: [10.0.0.1, 10.0.0.9]
  nodeName: n1
  zone: z1
  hints: {forZones: [{name: z1}, {name: z2}], forNodes: [{name: n1}]}
  targetRef: {kind: Pod, name: web-0}
- addresses: [10.0.0.2]
  conditions: {ready: false, serving: true, terminating: true}
  targetRef: {kind: Pod, namespace: other, name: web-1}
- addresses: [10.0.0.3]
  conditions: {ready: null, serving: false}
  targetRef: {kind: Node, name: n1}
"""

SLICE = EndpointSlice(
    "prod",
    "web-x",
    "web",
    4,
    endpoints=(
        Endpoint(
            ip_address("10.0.0.1"),
            node="n1",
            zone="z1",
            zone_hints=frozenset({"z1", "z2"}),
            node_hints=frozenset({"n1"}),
            pod="prod/web-0",
        ),
        Endpoint(ip_address("10.0.0.2"), ready=False, serving=True, terminating=True, pod="other/web-1"),
        Endpoint(ip_address("10.0.0.3"), ready=True, serving=False),
    ),
    ports=(EndpointPort("http", "TCP", 8080), EndpointPort("", "UDP", 53)),
    labels=Map({"kubernetes.io/service-name": "web"}),
)

FULL_NODE = """
apiVersion: v1
kind: Node
metadata:
  name: worker-1.example
  labels: {topology.kubernetes.io/zone: z1}
  annotations: {flannel.alpha.coreos.com/public-ip: 192.0.2.7}
  deletionTimestamp: 2026-11-25T10:00:00Z
spec:
  podCIDR: 10.244.1.0/24
  podCIDRs: [10.244.1.0/24, fd00:1::/64]
  taints: [{key: node.kubernetes.io/unreachable, effect: NoExecute}]
status:
  addresses:
  - {type: Hostname, address: worker-1}
  - {type: InternalIP, address: 192.168.0.1}
  - {type: ExternalIP, address: "2001:db8::1"}
"""

NODE = Node(
    "worker-1.example",
    addresses=(NodeAddress("InternalIP", ip_address("192.168.0.1")), NodeAddress("ExternalIP", ip_address("2001:db8::1"))),
    pod_cidrs=(ip_network("10.244.1.0/24"), ip_network("fd00:1::/64")),
    labels=Map({"topology.kubernetes.io/zone": "z1"}),
    annotations=Map({"flannel.alpha.coreos.com/public-ip": "192.0.2.7"}),
    taints=("node.kubernetes.io/unreachable",),
    deleting=True,
)

FULL_POD = """
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: prod, labels: {app: web}, deletionTimestamp: "2026-11-25T10:00:00Z"}
spec:
  nodeName: n1
  hostNetwork: true
  initContainers:
  - {name: once, ports: [{containerPort: 1}]}
  - {name: sidecar, restartPolicy: Always, ports: [{containerPort: 9090, name: metrics}]}
  containers:
  - {name: a, command: [sleep], args: ["12:30"], ports: [{containerPort: 8080, name: http}]}
  - {name: b, command: [x], ports: [{containerPort: 53, protocol: UDP, hostPort: 53}]}
status:
  phase: Running
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
  conditions: [{type: Initialized, status: "True"}, {type: Ready, status: "False"}]
"""

POD = Pod(
    "prod",
    "p",
    node="n1",
    ips=(ip_address("10.0.0.1"), ip_address("fd00::1")),
    host_network=True,
    ready=False,
    deleting=True,
    ports=(ContainerPort("http", "TCP", 8080), ContainerPort("", "UDP", 53), ContainerPort("metrics", "TCP", 9090)),
    command=("sleep", "12:30"),
    labels=Map(app="web"),
)

FULL_POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: np, namespace: prod}
spec:
  podSelector:
    matchLabels: {b: "2", a: "1"}
    matchExpressions: [{key: c, operator: NotIn, values: [x, y]}, {key: d, operator: Exists}]
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - namespaceSelector: {}
      podSelector: {matchLabels: {app: client}}
    - ipBlock: {cidr: 10.0.0.7/8, except: [10.1.0.0/16]}
    ports: [{port: 80}, {port: dns, protocol: UDP}, {port: 8000, endPort: 8010}, {}]
  - {}
  egress:
  - {to: null, ports: []}
"""

POLICY = NetworkPolicy(
    "prod",
    "np",
    pod_selector=LabelSelector(
        (
            Requirement("a", "In", ("1",)),
            Requirement("b", "In", ("2",)),
            Requirement("c", "NotIn", ("x", "y")),
            Requirement("d", "Exists"),
        )
    ),
    isolates_egress=True,
    ingress=(
        PolicyRule(
            peers=(
                PolicyPeer(LabelSelector((Requirement("app", "In", ("client",)),)), LabelSelector()),
                PolicyPeer(ip_block=IPBlock(ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"),))),
            ),
            ports=(PolicyPort("TCP", 80), PolicyPort("UDP", "dns"), PolicyPort("TCP", 8000, 8010), PolicyPort("TCP")),
        ),
        PolicyRule(),
    ),
    egress=(PolicyRule(),),
)

NAMESPACE = (
    "{apiVersion: v1, kind: Namespace, metadata: {name: prod, labels: {team: a}}}",
    Namespace("prod", Map({"team": "a", "kubernetes.io/metadata.name": "prod"})),
)
CIDRS = (
    "{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: c}, spec: {cidrs: [10.96.0.0/12, 'fd00::/108']}}",
    ServiceCIDR("c", (ip_network("10.96.0.0/12"), ip_network("fd00::/108"))),
)
ALL = [
    (FULL_SERVICE, SERVICE),
    (FULL_SLICE, SLICE),
    (FULL_NODE, NODE),
    (FULL_POD, POD),
    (FULL_POLICY, POLICY),
    NAMESPACE,
    CIDRS,
]


def read(parsed: Parsed) -> tuple:
    return parsed.objects, parsed.errors


def as_json(text: str) -> bytes:
    return json.dumps(next(load_documents(text.encode()))).encode()


@pytest.mark.parametrize(("text", "expected"), ALL, ids=lambda v: type(v).__name__)
def test_every_kind_is_read_whole_from_yaml_and_json(text, expected):
    """Every field that decides where packets go arrives typed, the same from YAML, from JSON, and from a decoded object."""
    assert read(parse_document(text.encode(), "x", is_json=False)) == ((expected,), ())
    assert read(parse_document(as_json(text), "x", is_json=True)) == ((expected,), ())
    assert read(parse_document(as_json(text), "x", is_json=False)) == ((expected,), ())


MINIMAL = [
    (
        {"kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}]}},
        Service("default", "a", ports=(ServicePort("", "TCP", 1, 1),)),
    ),
    (
        {"kind": "Service", "metadata": {"name": "a"}, "spec": {"clusterIP": "None", "selector": {}}},
        Service("default", "a", headless=True),
    ),
    (
        {"kind": "Service", "metadata": {"name": "a"}, "spec": {"clusterIPs": ["None"], "ports": None}},
        Service("default", "a", headless=True),
    ),
    (
        {"kind": "Service", "metadata": {"name": "a"}, "spec": {"type": "ExternalName", "externalName": "b.example"}},
        Service("default", "a", type="ExternalName"),
    ),
    (
        {
            "kind": "Service",
            "metadata": {"name": "a"},
            "spec": {"clusterIP": "fd00::1", "ports": [{"port": 1, "targetPort": 0}]},
        },
        Service("default", "a", cluster_ips=(ip_address("fd00::1"),), ports=(ServicePort("", "TCP", 1, 1),)),
    ),
    (
        {"kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}], "sessionAffinity": "ClientIP"}},
        Service("default", "a", ports=(ServicePort("", "TCP", 1, 1),), affinity_seconds=10800),
    ),
    (
        {
            "kind": "Service",
            "metadata": {"name": "a", "labels": {"service.kubernetes.io/service-proxy-name": "x"}},
            "spec": {"clusterIP": "None"},
        },
        Service("default", "a", headless=True, labels=Map({"service.kubernetes.io/service-proxy-name": "x"})),
    ),
    (
        {"kind": "EndpointSlice", "metadata": {"name": "a"}, "addressType": "IPv6", "endpoints": None, "ports": None},
        EndpointSlice("default", "a", "", 6),
    ),
    ({"kind": "Node", "metadata": {"name": "a"}}, Node("a")),
    (
        {"kind": "Node", "metadata": {"name": "a"}, "spec": {"podCIDR": "10.1.0.7/16"}},
        Node("a", pod_cidrs=(ip_network("10.1.0.0/16"),)),
    ),
    ({"kind": "Pod", "metadata": {"name": "a"}}, Pod("default", "a")),
    (
        {"kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [{"args": ["x"]}]}, "status": {"podIP": "10.0.0.1"}},
        Pod("default", "a", ips=(ip_address("10.0.0.1"),)),
    ),
    (
        {"kind": "Pod", "metadata": {"name": "a"}, "status": {"phase": "Pending"}},
        Pod("default", "a", phase="Pending", ready=False),
    ),
    (
        {
            "kind": "Pod",
            "metadata": {"name": "a"},
            "status": {"phase": "Pending", "conditions": [{"type": "Ready", "status": "True"}]},
        },
        Pod("default", "a", phase="Pending", ready=True),
    ),
    ({"kind": "NetworkPolicy", "metadata": {"name": "a"}}, NetworkPolicy("default", "a")),
    ({"kind": "NetworkPolicy", "metadata": {"name": "a"}, "spec": {"egress": []}}, NetworkPolicy("default", "a")),
    (
        {"kind": "NetworkPolicy", "metadata": {"name": "a"}, "spec": {"egress": [{}]}},
        NetworkPolicy("default", "a", isolates_egress=True, egress=(PolicyRule(),)),
    ),
    (
        {"kind": "NetworkPolicy", "metadata": {"name": "a"}, "spec": {"policyTypes": ["Egress"]}},
        NetworkPolicy("default", "a", isolates_ingress=False, isolates_egress=True),
    ),
    ({"kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1beta1", "metadata": {"name": "a"}}, ServiceCIDR("a")),
]


@pytest.mark.parametrize(("raw", "expected"), MINIMAL)
def test_what_an_object_leaves_out_has_its_default(raw, expected):
    """Absent, null and empty fields mean what the API server would have filled in."""
    assert read(parse_object(raw, "x")) == ((expected,), ())


def test_endpoints_become_one_slice_for_each_family_and_set_of_ports():
    """An Endpoints object is mirrored as Kubernetes does it: grouped by ports and family, not ready where it says so."""
    raw = {
        "kind": "Endpoints",
        "metadata": {"name": "db", "labels": {"a": "b"}},
        "subsets": [
            {
                "addresses": [
                    {"ip": "10.0.0.1", "nodeName": "n1", "targetRef": {"kind": "Pod", "name": "p"}},
                    {"ip": "fd00::1"},
                ],
                "notReadyAddresses": [{"ip": "10.0.0.2"}],
                "ports": [{"name": "b", "port": 2}, {"name": "a", "port": 1}],
            },
            {"addresses": [{"ip": "10.0.0.3"}], "ports": [{"port": 9, "protocol": "UDP"}]},
            {"addresses": [{"ip": "10.0.0.4"}], "ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}]},
            {"addresses": None},
        ],
    }
    two = (EndpointPort("a", "TCP", 1), EndpointPort("b", "TCP", 2))
    labels = Map(a="b")
    first = (
        Endpoint(ip_address("10.0.0.1"), node="n1", pod="default/p"),
        Endpoint(ip_address("10.0.0.2"), ready=False),
        Endpoint(ip_address("10.0.0.4")),
    )
    second = (Endpoint(ip_address("10.0.0.3")),)
    assert read(parse_object(raw, "x")) == (
        (
            EndpointSlice("default", "db/ipv4", "db", 4, first, two, mirrored=True, labels=labels),
            EndpointSlice("default", "db/ipv4-2", "db", 4, second, (EndpointPort("", "UDP", 9),), mirrored=True, labels=labels),
            EndpointSlice("default", "db/ipv6", "db", 6, (Endpoint(ip_address("fd00::1")),), two, mirrored=True, labels=labels),
        ),
        (),
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {"name": "a", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        {"name": "a", "annotations": {"control-plane.alpha.kubernetes.io/leader": "{}"}},
    ],
)
def test_endpoints_that_decline_mirroring_yield_nothing(metadata):
    """Endpoints that are leader locks, or have real slices already, are left alone as Kubernetes' mirroring leaves them."""
    raw = {"kind": "Endpoints", "metadata": metadata, "subsets": [{"addresses": [{"ip": "10.0.0.1"}]}]}
    assert read(parse_object(raw, "x")) == ((), ())


SILENT = [
    {"kind": "Deployment", "apiVersion": "apps/v1", "metadata": 5},
    {"kind": "ConfigMap", "data": {"a": 1}},
    {"kind": "Service", "apiVersion": "serving.knative.dev/v1", "metadata": {"name": "x"}, "spec": {"ports": 5}},
    {"kind": "NetworkPolicy", "apiVersion": "crd.projectcalico.org/v1", "metadata": {"name": "x"}, "spec": {"ingress": 5}},
    {"kind": "Node", "apiVersion": "management.cattle.io/v3", "metadata": {"name": "x"}},
    {"kind": "EndpointSlice", "metadata": {"name": "a"}, "addressType": "FQDN", "endpoints": [{"addresses": ["a.example"]}]},
    {"kind": "List", "items": None},
]


@pytest.mark.parametrize("raw", SILENT)
def test_what_is_not_ours_is_passed_over_in_silence(raw):
    """Kinds nobody here needs, namesakes from other API groups and slices of host names are no errors."""
    assert read(parse_object(raw, "x")) == ((), ())
    assert read(parse_document(json.dumps(raw).encode(), "x", is_json=True)) == ((), ())


def test_lists_may_be_nested_and_say_the_kind_of_their_items():
    """List, ServiceList and lists in lists are read in order; items of a typed list need no kind of their own."""
    item = {"metadata": {"name": "a"}, "spec": {"clusterIP": "None"}}
    raw = {
        "kind": "List",
        "items": [
            {"kind": "ServiceList", "items": [item, {**item, "metadata": {"name": "b"}}]},
            {"kind": "List", "items": [{"kind": "NamespaceList", "items": [{"metadata": {"name": "c"}}]}]},
            {"kind": "DeploymentList", "items": [{"metadata": {}}]},
            {"kind": "EndpointsList", "items": []},
        ],
    }
    for parsed in (parse_object(raw, "x"), parse_document(json.dumps(raw).encode(), "x", is_json=True)):
        assert [str(o.ref) for o in parsed.objects] == ["Service default/a", "Service default/b", "Namespace c"]
        assert parsed.errors == ()
    top = {"kind": "PodList", "apiVersion": "v1", "items": [{"metadata": {"name": "p"}}]}
    assert read(parse_document(json.dumps(top).encode(), "x", is_json=True)) == ((Pod("default", "p"),), ())


def test_yaml_holds_many_documents():
    """Documents between dashes are read one by one; empty ones are nothing."""
    text = b"---\n# a comment\n---\nkind: Namespace\nmetadata: {name: a}\n---\nkind: Namespace\nmetadata: {name: b}\n...\n"
    assert [o.name for o in parse_document(text, "x", is_json=False).objects] == ["a", "b"]
