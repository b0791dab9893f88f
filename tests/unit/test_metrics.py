"""What is counted, and how it is printed for Prometheus."""

from __future__ import annotations

import re
from ipaddress import ip_address

import pytest
from immutables import Map

from clusterstate.objects import Endpoint, EndpointPort, EndpointSlice, Node, NodeAddress, ObjectRef, Service, ServicePort
from clusterstate.snapshot import Snapshot, Update
from kernelstate.ports import SyncReport
from nodeplane.attendant import Round
from nodeplane.config import parse_config
from nodeplane.exposition import Registry
from nodeplane.metrics import NodeMetrics
from nodeplane.node_servers import BEFORE, Health, print_health
from nodeplane.pipeline import HostFacts, Pipeline
from nodeplane.status import Status

LINE = re.compile(
    r"# (HELP|TYPE) [a-z_]+ .*|"
    r'[a-z_]+(\{[a-z_]+="([^"\\\n]|\\["\\n])*"(,[a-z_]+="([^"\\\n]|\\["\\n])*")*\})? -?(\d+(\.\d+)?(e[-+]?\d+)?|\+Inf)'
)
NOW = 1_800_000_000.0


def samples(text: bytes) -> dict[str, float]:
    """Return each sample by name and labels, after a look at every line's form."""
    lines = text.decode().splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: float(value) for name, _, value in pairs}


def test_text_format():
    """Numbers, labels with every odd character, and histograms with all that is at most each bound, as Prometheus reads them."""
    registry = Registry()
    registry.counter("a_total", "counts\nlines \\ all", ["x", "y"]).add('q"uote', "back\\slash\nline", by=2)
    registry.gauge("b", "is").set(0.25)
    found = registry.histogram("c_seconds", "takes", (0.1, 1.0), ["f"])
    for value in (0.1, 0.5, 7.0):
        found.observe(value, "IPv4")
    assert registry.print().decode() == (
        "# HELP a_total counts\\nlines \\\\ all\n# TYPE a_total counter\n"
        'a_total{x="q\\"uote",y="back\\\\slash\\nline"} 2\n'
        "# HELP b is\n# TYPE b gauge\nb 0.25\n"
        "# HELP c_seconds takes\n# TYPE c_seconds histogram\n"
        'c_seconds_bucket{f="IPv4",le="0.1"} 1\nc_seconds_bucket{f="IPv4",le="1"} 2\nc_seconds_bucket{f="IPv4",le="+Inf"} 3\n'
        'c_seconds_sum{f="IPv4"} 7.6\nc_seconds_count{f="IPv4"} 3\n'
    )
    samples(registry.print())


class Clock:
    """A clock that stands still."""

    now = NOW

    def __call__(self):
        return self.now


def cluster(*pods, changed_at="", **service):
    """Return a snapshot of one Service."""
    web = Service(
        "shop", "web", cluster_ips=(ip_address("10.96.0.10"),), ports=(ServicePort("p", "TCP", 80, 80, 30080),), **service
    )
    endpoints = tuple(Endpoint(ip_address(p), node="n2") for p in pods)
    one = EndpointSlice("shop", "web-1", "web", 4, endpoints, (EndpointPort("p", "TCP", 80),), changed_at=changed_at)
    node = Node("n1", (NodeAddress("InternalIP", ip_address("192.168.1.1")),))
    return Snapshot(1, Map({("shop", "web"): web}), Map({("shop", "web"): Map({one.ref: one})}), Map({"n1": node}))


class Watched:
    """A pipeline whose updates and rounds are counted."""

    def __init__(self):
        self.clock = Clock()
        self.pipeline = Pipeline(parse_config({"kind": "KubeProxyConfiguration", "hostnameOverride": "n1"}))
        self.metrics = NodeMetrics(self.clock)
        self.metrics.pipeline = self.pipeline

    def take(self, snapshot, *refs):
        everything = frozenset(refs) if refs else None
        update = Update(snapshot, everything, (), frozenset({("shop", "web")}) if refs else None)
        self.metrics.taken(update, self.pipeline.update(update, HostFacts()))

    def sync(self, *errors, full=False, seconds=0.01, **status):
        report = SyncReport("netfilter", 0 if errors else 3, errors, seconds)
        said = Status(1, "n1", "iptables", families=(4, 6), synced=not errors, **status)
        self.metrics.synced(Round(seconds, (report,), errors, full, said))

    def samples(self):
        return samples(self.metrics.print())


@pytest.fixture
def watched():
    return Watched()


def test_a_change_from_the_slice_to_the_kernel(watched):
    """A changed slice counts as pending until it is written, its age is measured then, and not before it is."""
    watched.take(cluster("10.1.0.1", changed_at="2027-01-15T07:59:50Z"))
    watched.sync(full=True)
    first = watched.samples()
    assert first["kubeproxy_sync_proxy_rules_endpoint_changes_total"] == 1
    assert first["kubeproxy_sync_proxy_rules_endpoint_changes_pending"] == 0
    assert first['kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv4"}'] == 1
    assert not any("network_programming" in name for name in first), "what was before the agent is not its delay"
    changed_at = "2027-01-15T08:00:05.250000123Z"  # 5.25 s after the start
    watched.clock.now = NOW + 6
    watched.take(cluster("10.1.0.2", changed_at=changed_at), ObjectRef("EndpointSlice", "shop", "web-1"))
    watched.clock.now = NOW + 7
    watched.sync("write IPv6 nat chain X: refused")
    refused = watched.samples()
    assert refused["kubeproxy_sync_proxy_rules_endpoint_changes_pending"] == 1
    assert refused["nodeplane_lag_seconds"] == 1
    assert refused['kubeproxy_sync_proxy_rules_iptables_restore_failures_total{ip_family="IPv6"}'] == 1
    assert refused['kubeproxy_sync_proxy_rules_iptables_restore_failures_total{ip_family="IPv4"}'] == 0
    assert refused['nodeplane_part_failures_total{part="netfilter"}'] == 1
    assert refused["nodeplane_synced"] == 0
    watched.clock.now = NOW + 8
    watched.sync()
    after = watched.samples()
    assert after["kubeproxy_sync_proxy_rules_endpoint_changes_pending"] == 0
    assert after["nodeplane_lag_seconds"] == 0
    assert after['kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv4"}'] == pytest.approx(2.75, abs=0.001)
    assert after['kubeproxy_network_programming_duration_seconds_bucket{ip_family="IPv4",le="2"}'] == 0
    assert after['kubeproxy_network_programming_duration_seconds_bucket{ip_family="IPv4",le="3"}'] == 1
    assert after['kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}'] == NOW + 8
    assert after['kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"}'] == NOW + 6


@pytest.mark.parametrize("stated", ["", "yesterday", "9999999-01-01T00:00:00Z", "2027-01-15T08:00:00"])
def test_a_time_that_is_none(watched, stated):
    """Whatever a slice says of its time, nothing breaks and nothing is made up."""
    watched.take(cluster("10.1.0.1"))
    watched.take(cluster("10.1.0.2", changed_at=stated), ObjectRef("EndpointSlice", "shop", "web-1"))
    watched.clock.now = NOW - 86400 * 2
    watched.sync()
    assert watched.samples().get('kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv4"}', 0) == 0


def test_services_without_local_endpoints(watched):
    """Ports with policy Local and endpoints elsewhere alone are counted by policy; rules are counted by table."""
    watched.take(cluster("10.1.0.1", type="NodePort", external_policy="Local"))
    found = watched.samples()
    name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    assert found[f'{name}{{traffic_policy="external",ip_family="IPv4"}}'] == 1
    assert found[f'{name}{{traffic_policy="internal",ip_family="IPv4"}}'] == 0
    assert found['kubeproxy_sync_proxy_rules_iptables_total{table="nat",ip_family="IPv4"}'] > 5
    assert found['nodeplane_objects{kind="Service"}'] == 1


def test_status_becomes_metrics(watched):
    """What people read in the status machines read as numbers; what is gone from it is gone from them."""
    watched.take(cluster("10.1.0.1"))
    watched.sync(errors=("x", "y"), pending=("links",), kept="as of", overlay="vxlan")
    found = watched.samples()
    assert (found['nodeplane_complaints{kind="errors"}'], found["nodeplane_objects_kept"]) == (2, 1)
    assert found['nodeplane_part_dirty{part="links"}'] == 1
    assert found['nodeplane_info{node="n1",mode="iptables",iptables="",overlay="vxlan",engine=""}'] == 1
    watched.sync()
    assert 'nodeplane_part_dirty{part="links"}' not in watched.samples()


@pytest.mark.parametrize(
    ("health", "eligible", "code"),
    [
        (Health(healthy=True, eligible=True, updated=1.0, families=(4,)), True, 200),
        (Health(healthy=False, eligible=True, updated=1.0, families=(4,)), True, 503),
        (Health(healthy=True, eligible=False, updated=1.0, families=(4,)), False, 503),
        (Health(healthy=True, eligible=False, updated=1.0, families=(4,)), None, 200),
        (BEFORE, None, 200),
        (BEFORE, False, 503),
    ],
)
def test_health_in_kube_proxys_words(health, eligible, code):
    """Who is asked with the Node in mind says so; who is alive only, not. A sick proxy says when it was well."""
    said = print_health(health, NOW, eligible=eligible)
    import json  # noqa: PLC0415

    body = json.loads(said.body)
    assert said.status.value == code
    assert body["currentTime"] == "2027-01-15T08:00:00Z"
    assert body["lastUpdated"] == (body["currentTime"] if health.healthy else "1970-01-01T00:00:01Z")
    assert ("nodeEligible" in body) == (eligible is not None)
    assert body["healthy"] == health.healthy
    assert body["status"] == {
        f"IPv{f}": {"lastUpdated": body["lastUpdated"], "healthy": health.healthy} for f in health.families
    }
