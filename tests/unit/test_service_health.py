"""Who has a health check port, whom it counts and what it says."""

from http import HTTPStatus
from ipaddress import ip_address

import msgspec
import pytest
from immutables import Map

from clusterstate.objects import Endpoint, EndpointPort, EndpointSlice, Service, ServicePort
from kernelstate.objects.address import Prefix
from nodeplane.http_ports import _stays_open
from proxy.compile import SERVICE_PROXY_NAME
from proxy.health import HealthEndpoint, answer, health_places, service_health
from proxy.settings import NodeFacts, ProxySettings

WEB = Service(
    "shop",
    "web",
    type="LoadBalancer",
    cluster_ips=(ip_address("10.96.0.10"), ip_address("fd00:96::10")),
    ports=(ServicePort("http", "TCP", 80, 8080, 30080),),
    external_policy="Local",
    health_check_node_port=32000,
)


HTTP = (EndpointPort("http", "TCP", 8080),)


def slice_of(*endpoints, family=4, ports=HTTP, name="web-1"):
    return EndpointSlice("shop", name, "web", family, endpoints, ports)


def pod(ip, node="n1", **conditions):
    return Endpoint(ip_address(ip), node=node, **conditions)


def health(slices, service=WEB):
    """Return {family: local ready endpoints}."""
    found = service_health(service, slices, "n1")
    assert {(e.service, e.port) for e in found} <= {(("shop", "web"), 32000)}
    return {e.family: e.local_ready for e in found}


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ([], {4: 0, 6: 0}),
        ([slice_of(pod("10.244.1.2"), pod("10.244.1.3"))], {4: 2, 6: 0}),
        ([slice_of(pod("10.244.1.2"), pod("10.244.2.3", node="n2"), pod("10.244.1.4", node=""))], {4: 1, 6: 0}),
        ([slice_of(pod("10.244.1.2", ready=False))], {4: 0, 6: 0}),
        ([slice_of(pod("10.244.1.2", ready=False, serving=True, terminating=True))], {4: 0, 6: 0}),
        ([slice_of(pod("10.244.1.2")), slice_of(pod("10.244.1.2"), name="web-2")], {4: 1, 6: 0}),
        (
            [
                slice_of(pod("10.244.1.2"), ports=(EndpointPort("http", "TCP", 8080), EndpointPort("tls", "TCP", 8443))),
                slice_of(pod("10.244.1.3"), ports=(EndpointPort("tls", "TCP", 8443),), name="web-2"),
            ],
            {4: 2, 6: 0},
        ),
        ([slice_of(pod("10.244.1.2"), ports=())], {4: 0, 6: 0}),
        ([slice_of(pod("10.244.1.2")), slice_of(pod("fd00::2"), pod("fd00::3"), family=6, name="web-6")], {4: 1, 6: 2}),
    ],
    ids=[
        "no slice",
        "two",
        "elsewhere, or nobody knows where",
        "not ready",
        "terminating",
        "in two slices",
        "of any port",
        "without a port",
        "each family its own",
    ],
)
def test_counts_local_ready_addresses(slices, expected):
    """Ready endpoints on this node count, each address once whatever the port; terminating ones never do."""
    assert health(slices) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"type": "NodePort"},
        {"external_policy": "Cluster"},
        {"health_check_node_port": 0},
        {"cluster_ips": ()},
        {"labels": Map({SERVICE_PROXY_NAME: "other"})},
    ],
    ids=str,
)
def test_who_has_none(change):
    """A Service without load balancer, policy Local, port or address, or of another proxy, has no health check port."""
    assert health([slice_of(pod("10.244.1.2"))], msgspec.structs.replace(WEB, **change)) == {}


def test_a_node_without_name_has_no_endpoint():
    """Endpoints of which no node is known are not local to a node that does not know its own name."""
    found = service_health(WEB, [slice_of(pod("10.244.1.2", node=""))], "")
    assert [e.local_ready for e in found] == [0, 0]


@pytest.mark.parametrize(
    ("ready", "healthy", "status"),
    [(2, True, 200), (0, True, 503), (2, False, 503), (0, False, 503)],
)
def test_answer(ready, healthy, status):
    """The answer is kube-proxy's to the byte: status, headers, and a body indented by tabs without a last newline."""
    said = answer(HealthEndpoint(("shop", "web"), 4, 32000, ready), healthy=healthy)
    assert said.status == HTTPStatus(status)
    assert said.headers == (
        ("Content-Type", "application/json"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Load-Balancing-Endpoint-Weight", str(ready)),
    )
    assert said.body.decode() == (
        '{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
        f'\t"localEndpoints": {ready},\n\t"serviceProxyHealthy": {str(healthy).lower()}\n}}'
    )


@pytest.mark.parametrize(
    ("node_port_addresses", "expected"),
    [
        ((), {4: ("0.0.0.0",), 6: ("::",)}),
        ((Prefix.parse("192.168.0.0/16"),), {4: ("192.168.1.1",), 6: ("::",)}),
        ("primary", {4: ("192.168.1.1",), 6: ()}),
    ],
    ids=["default", "a list", "primary"],
)
def test_places(node_port_addresses, expected):
    """Health check ports are open where NodePorts answer, in each family."""
    node = NodeFacts(
        "n1",
        addresses=(ip_address("192.168.1.1"),),
        local_addresses=(Prefix.parse("192.168.1.1/32"), Prefix.parse("10.0.0.1/32")),
    )
    assert health_places(ProxySettings(node_port_addresses=node_port_addresses), node, (4, 6)) == expected


@pytest.mark.parametrize(
    ("head", "stays"),
    [
        (b"GET / HTTP/1.1\r\nHost: x", True),
        (b"GET / HTTP/1.0", False),
        (b"nonsense", False),
        (b"GET / HTTP/1.1\r\nConnection: Close", False),
        (b"POST / HTTP/1.1\r\nContent-Length: 0", True),
        (b"POST / HTTP/1.1\r\nContent-Length: 5", False),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked", False),
    ],
)
def test_connection_stays_open(head, stays):
    """A connection outlives an HTTP/1.1 request that neither asks to close it nor has a body."""
    assert _stays_open(head) is stays
