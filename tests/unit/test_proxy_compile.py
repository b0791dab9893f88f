"""Services and slices become entries; what two Services claim is settled in one way only."""

from ipaddress import ip_address, ip_network

import pytest
from immutables import Map

from clusterstate.objects import Endpoint, EndpointPort, EndpointSlice, LoadBalancerIngress, Service, ServicePort
from clusterstate.snapshot import Snapshot
from proxy.compile import SERVICE_PROXY_NAME, ServiceCompiler, compile_service, compile_table
from proxy.settings import NodeFacts
from proxy.table import Frontend, Kind, OnEmpty

NODE = NodeFacts("n1")


def service(name="web", **fields):
    """Make a ClusterIP Service with one TCP port."""
    defaults = {
        "cluster_ips": (ip_address("10.96.0.10"),),
        "ports": (ServicePort("http", "TCP", 80, 8080),),
    }
    return Service("default", name, **(defaults | fields))


def slice_of(name, *endpoints, port=8080, protocol="TCP", port_name="http", slice_name=None, **fields):
    """Make a slice of a Service."""
    return EndpointSlice(
        "default", slice_name or f"{name}-1", name, 4, tuple(endpoints), (EndpointPort(port_name, protocol, port),), **fields
    )


def endpoint(ip, **fields):
    """Make a ready endpoint on another node."""
    return Endpoint(ip_address(ip), **({"node": "n2"} | fields))


def snapshot(*objects):
    """Put Services and slices together."""
    services, slices = {}, {}
    for one in objects:
        if isinstance(one, Service):
            services[one.namespace, one.name] = one
        else:
            slices.setdefault((one.namespace, one.service), {})[one.ref] = one
    return Snapshot(1, Map(services), Map({k: Map(v) for k, v in slices.items()}))


def names(backends):
    """Return backends' names."""
    return [b.name for b in backends]


def test_endpoints_in_order_of_their_printed_names():
    """Backends are sorted as text, as kube-proxy does it: 10.0.0.10 before 10.0.0.2."""
    (entry,) = compile_service(service(), [slice_of("web", endpoint("10.0.0.2"), endpoint("10.0.0.10"))], NODE)
    assert names(entry.cluster) == ["10.0.0.10:8080", "10.0.0.2:8080"]


def test_port_matches_by_name_and_protocol():
    """A slice's port belongs to the Service port of the same name and protocol."""
    web = service(ports=(ServicePort("dns", "UDP", 53, 53), ServicePort("dns-tcp", "TCP", 53, 53)))
    slices = [slice_of("web", endpoint("10.0.0.1"), port=5353, protocol="UDP", port_name="dns")]
    udp_first = compile_service(web, slices, NODE)
    assert [(e.name.port, names(e.cluster)) for e in udp_first] == [("dns", ["10.0.0.1:5353"]), ("dns-tcp", [])]


def test_living_entry_beats_terminating_one():
    """An endpoint that is in two slices for a moment counts as its living entry says."""
    dying = slice_of("web", endpoint("10.0.0.1", ready=False, terminating=True), slice_name="a")
    living = slice_of("web", endpoint("10.0.0.1"), slice_name="b")
    for slices in ([dying, living], [living, dying]):
        (entry,) = compile_service(service(), slices, NODE)
        assert names(entry.cluster) == ["10.0.0.1:8080"]


@pytest.mark.parametrize(
    "fields",
    [
        {"cluster_ips": (), "headless": True},
        {"type": "ExternalName", "cluster_ips": ()},
        {"labels": Map({SERVICE_PROXY_NAME: "other"})},
    ],
    ids=["headless", "ExternalName", "service-proxy-name"],
)
def test_left_alone(fields):
    """Headless and ExternalName Services, and those of another proxy, have no entry."""
    assert compile_service(service(**fields), [slice_of("web", endpoint("10.0.0.1"))], NODE) == ()


def test_load_balancer_with_ip_mode_proxy_is_ignored():
    """An ingress address that a proxy in front terminates is not captured here (KEP-1860)."""
    ingress = (LoadBalancerIngress(ip_address("1.2.3.4")), LoadBalancerIngress(ip_address("1.2.3.5"), "Proxy"))
    (entry,) = compile_service(service(type="LoadBalancer", load_balancer=ingress), [], NODE)
    assert [f.address for f in entry.frontends if f.kind is Kind.LOAD_BALANCER] == [ip_address("1.2.3.4")]


def test_manual_endpoints_serve_a_service_without_selector():
    """An Endpoints object serves, but only while the Service has no slice of its own."""
    mirrored = slice_of("web", endpoint("192.0.2.1", node=""), mirrored=True, slice_name="web")
    only = compile_table(snapshot(service(), mirrored), NODE)
    both = compile_table(snapshot(service(), mirrored, slice_of("web", endpoint("10.0.0.1"))), NODE)
    assert names(only.entries["default", "web"][0].cluster) == ["192.0.2.1:8080"]
    assert names(both.entries["default", "web"][0].cluster) == ["10.0.0.1:8080"]


def test_on_empty():
    """Nobody anywhere: reject. Somebody elsewhere that the policy forbids: drop."""
    local = service(internal_policy="Local")
    (nobody,) = compile_service(local, [], NODE)
    (elsewhere,) = compile_service(local, [slice_of("web", endpoint("10.0.0.1"))], NODE)
    assert (nobody.on_empty, nobody.pool(Kind.CLUSTER_IP)) == (OnEmpty.REJECT, ())
    assert (elsewhere.on_empty, elsewhere.pool(Kind.CLUSTER_IP)) == (OnEmpty.DROP, ())


def test_dual_stack_is_two_entries():
    """Each family gets an entry with its own addresses, ranges and endpoints."""
    web = service(
        cluster_ips=(ip_address("10.96.0.10"), ip_address("fd00::10")),
        source_ranges=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
    )
    six = EndpointSlice("default", "web-6", "web", 6, (Endpoint(ip_address("fd01::1")),), (EndpointPort("http", "TCP", 8080),))
    entries = compile_service(web, [slice_of("web", endpoint("10.0.0.1")), six], NODE)
    assert [(e.family, names(e.cluster), e.source_ranges) for e in entries] == [
        (4, ["10.0.0.1:8080"], (ip_network("10.0.0.0/8"),)),
        (6, ["[fd01::1]:8080"], (ip_network("fd00::/8"),)),
    ]


def test_same_address_twice():
    """The Service first by name keeps a ClusterIP that two claim; the other is named with field and value."""
    table = compile_table(snapshot(service("b"), service("a")), NODE)
    assert table.entries["default", "a"][0].frontends == (Frontend(Kind.CLUSTER_IP, ip_address("10.96.0.10"), 80),)
    assert table.entries["default", "b"][0].frontends == ()
    assert table.problems == ("Service default/b: spec.clusterIP: 10.96.0.10 port 80/TCP is taken by Service default/a",)


def test_loser_takes_over():
    """When the winner of a conflict goes, the loser gets its frontend back, and both are reported as changed."""
    compiler = ServiceCompiler(NODE)
    compiler.update(snapshot(service("a"), service("b")), None)
    changed = compiler.update(snapshot(service("b")), [("default", "a")])
    assert set(changed) == {("default", "a"), ("default", "b")}
    assert compiler.problems == ()
    assert len(compiler.entries["default", "b"][0].frontends) == 1


def test_unchanged_service_is_not_reported():
    """Compiling the same again changes nothing."""
    compiler = ServiceCompiler(NODE)
    state = snapshot(service(), slice_of("web", endpoint("10.0.0.1")))
    compiler.update(state, None)
    assert compiler.update(state, None) == {}
