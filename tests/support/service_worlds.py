"""Random small clusters for hypothesis: few addresses and ports, so that things meet, repeat and conflict."""

from ipaddress import ip_address, ip_network

import msgspec
from hypothesis import strategies as st
from immutables import Map

from clusterstate.objects import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    Service,
    ServicePort,
)
from clusterstate.snapshot import Snapshot
from kernelstate.objects.address import Prefix
from proxy.oracle import Flow
from proxy.settings import NodeFacts, ProxySettings

SUFFIX = {4: "10.{}.0.{}", 6: "fd00:{}::{}"}
NODE_IPS = {4: ip_address("192.168.1.1"), 6: ip_address("fd00:99::1")}
OTHER_NODE = {4: ip_address("192.168.1.2"), 6: ip_address("fd00:99::2")}
OUTSIDE = {4: ip_address("198.51.100.7"), 6: ip_address("2001:db8::7")}
POD_CIDRS = {4: Prefix.parse("10.244.1.0/24"), 6: Prefix.parse("fd00:244::/64")}
PROTOCOLS = ("TCP", "UDP", "SCTP")


def address(family, group, number):
    """Return an address by group (96 ClusterIPs, 97 external, 98 load balancers, 244 pods)."""
    if group == 244:
        return ip_address(f"10.244.{1 + number % 2}.{number + 2}" if family == 4 else f"fd00:244:0:{number % 2}::{number + 2}")
    return ip_address(SUFFIX[family].format(group, number + 1))


def addresses(family, group, most):
    """Return a strategy of one of ``most`` addresses."""
    return st.integers(0, most - 1).map(lambda n: address(family, group, n))


@st.composite
def services(draw, name, families):
    """Draw a Service of the given families."""
    kind = draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]))
    number = draw(st.integers(0, 5))
    ports = draw(
        st.lists(
            st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from(PROTOCOLS), st.sampled_from([80, 81])),
            min_size=1,
            max_size=2,
            unique_by=(lambda p: (p[0], p[1]), lambda p: (p[1], p[2])),
        )
    )
    node_ports = draw(st.booleans()) and kind != "ClusterIP"
    ranges = [ip_network("198.51.100.0/24"), ip_network("192.168.0.0/16"), ip_network("2001:db8::/32")]
    return Service(
        "ns",
        name,
        type=kind,
        cluster_ips=tuple(address(f, 96, number) for f in families),
        ports=tuple(
            ServicePort(n, proto, port, 8080, 30000 + port + 2 * i if node_ports else 0)
            for i, (n, proto, port) in enumerate(ports)
        ),
        external_ips=tuple(draw(st.lists(st.one_of([addresses(f, 97, 3) for f in families]), max_size=2))),
        load_balancer=tuple(
            LoadBalancerIngress(ip) for ip in draw(st.lists(st.one_of([addresses(f, 98, 2) for f in families]), max_size=2))
        )
        if kind == "LoadBalancer"
        else (),
        source_ranges=tuple(draw(st.lists(st.sampled_from(ranges), max_size=2, unique=True))),
        external_policy=draw(st.sampled_from(["Cluster", "Local"])),
        internal_policy=draw(st.sampled_from(["Cluster", "Cluster", "Local"])),
        affinity_seconds=draw(st.sampled_from([0, 0, 600])),
        health_check_node_port=draw(st.sampled_from([0, 32000])) if kind == "LoadBalancer" else 0,
    )


@st.composite
def endpoints(draw, family):
    """Draw an endpoint in any state, on this node or another, with or without hints."""
    number = draw(st.integers(0, 7))
    ready, serving, terminating = draw(
        st.sampled_from(
            [(True, True, False), (True, True, False), (False, False, False), (False, True, True), (False, False, True)]
        )
    )
    return Endpoint(
        address(family, 244, number),
        ready=ready,
        serving=serving,
        terminating=terminating,
        node="n1" if number % 2 == 0 else "n2",
        zone_hints=draw(st.sampled_from([frozenset(), frozenset(), frozenset({"z1"}), frozenset({"z2"})])),
        node_hints=draw(st.sampled_from([frozenset(), frozenset(), frozenset({"n1"}), frozenset({"n2"})])),
    )


@st.composite
def slices(draw, service, family, name):
    """Draw a slice of a Service with ports that match it, more or less."""
    return EndpointSlice(
        "ns",
        name,
        service.name,
        family,
        tuple(draw(st.lists(endpoints(family), max_size=3))),
        tuple(EndpointPort(p.name, p.protocol, 8080 + i) for i, p in enumerate(service.ports)),
    )


@st.composite
def snapshots(draw, families=(4,), least=0):
    """Draw a cluster of up to four Services, of which ``least`` may be asked for to have a slice at the least."""
    names = draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True, min_size=least, max_size=4))
    found, grouped = {}, {}
    for name in names:
        one = draw(services(name, families))
        found["ns", name] = one
        count = draw(st.integers(min(least, 1), 2))
        made = [draw(slices(one, draw(st.sampled_from(families)), f"{name}-{i}")) for i in range(count)]
        if made:
            grouped["ns", name] = Map({s.ref: s for s in made})
    return Snapshot(1, Map(found), Map(grouped))


@st.composite
def settings(draw):
    """Draw settings that decide meaning."""
    mode = draw(st.sampled_from(["ClusterCIDR", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]))
    return ProxySettings(
        masquerade_all=draw(st.sampled_from([False, False, True])),
        localhost_node_ports=draw(st.booleans()),
        detect_local_mode=mode,
        cluster_cidrs=draw(st.sampled_from([(), (Prefix.parse("10.244.0.0/16"), Prefix.parse("fd00:244::/48"))])),
        bridge_interface="cni0",
        interface_name_prefix="veth",
        node_port_addresses=draw(st.sampled_from([(), (), "primary", (Prefix.parse("192.168.0.0/16"),)])),
        large_cluster_endpoints=draw(st.sampled_from([1000, 3])),
        dispatch_above=draw(st.sampled_from([500, 0, 1, 3])),
    )


NODE = NodeFacts(
    "n1",
    zone="z1",
    addresses=tuple(NODE_IPS.values()),
    pod_cidrs=tuple(POD_CIDRS.values()),
    local_addresses=tuple(Prefix.host(a) for a in NODE_IPS.values()),
)
LOCAL_ADDRESSES = frozenset(NODE_IPS.values())


@st.composite
def flows(draw, family=4):
    """Draw a flow whose destination has a fair chance of being a frontend."""
    kind = draw(st.sampled_from(["pod", "remote pod", "node", "external", "vip"]))
    loopback = ip_address("127.0.0.1" if family == 4 else "::1")
    source, interface = {
        "pod": (address(family, 244, draw(st.sampled_from([0, 2, 4]))), draw(st.sampled_from(["cni0", "veth1"]))),
        "remote pod": (address(family, 244, draw(st.sampled_from([1, 3]))), "flannel.1"),
        "node": (NODE_IPS[family], ""),
        "external": (OUTSIDE[family], "eth0"),
        "vip": (address(family, 98, 0), "eth0"),
    }[kind]
    destination = draw(
        st.one_of(
            addresses(family, 96, 6),
            addresses(family, 97, 3),
            addresses(family, 98, 2),
            st.just(NODE_IPS[family]),
            st.just(OTHER_NODE[family]),
        )
    )
    if kind == "node" and draw(st.integers(0, 5)) == 0:
        source = destination = loopback
    port = draw(st.sampled_from([80, 80, 81, 30080, 30081, 30082, 30083, 32000]))
    return Flow(
        source,
        destination,
        draw(st.sampled_from(PROTOCOLS)),
        port,
        from_node=kind == "node",
        interface=interface,
    )


@st.composite
def asked_by_sockets(draw, snapshot, family=4):
    """Draw a flow, mostly aimed at what the cluster has, and where it can be, asked for by a socket of the node or of a pod here."""
    flow = draw(flows(family=family))
    targets = sorted(
        {
            (a, p.protocol, n)
            for s in snapshot.services.values()
            for p in s.ports
            for a, n in _aims(s, p)
            if a.version == family
        },
        key=str,
    )
    if targets and draw(st.integers(0, 5)):
        destination, protocol, port = draw(st.sampled_from(targets))
        if destination.is_loopback:
            flow = msgspec.structs.replace(flow, source=destination, from_node=True, interface="")
        elif flow.source.is_loopback:
            flow = msgspec.structs.replace(flow, source=NODE_IPS[family])
        flow = msgspec.structs.replace(flow, destination=destination, protocol=protocol, port=port)
    here = flow.from_node or flow.interface in {"cni0", "veth1"}
    return msgspec.structs.replace(flow, by_socket=here and draw(st.integers(0, 4)) > 0)


def _aims(service, port):
    own = (*NODE_IPS.values(), ip_address("127.0.0.1"), ip_address("127.1.2.3"), ip_address("::1"))
    addresses = (*service.cluster_ips, *service.external_ips, *(ingress.ip for ingress in service.load_balancer))
    return [*((a, port.port) for a in addresses), *((a, port.node_port) for a in own if port.node_port)]


def mutate(snapshot, revision, found, grouped):
    """Return a snapshot with other Services and slices."""
    return msgspec.structs.replace(snapshot, revision=revision, services=found, slices=grouped)
