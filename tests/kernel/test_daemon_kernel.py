"""The daemon as its operator meets it: its servers, its files, its signals."""

from __future__ import annotations

import signal
import socket
import time

import pytest
from daemon_node import NODE, SECONDS, DaemonNode
from fake_api import SERVICES, SLICES
from http_api import Server, kubeconfig
from patience import eventually

from kernelstate.linux import netns as namespaces

pytestmark = pytest.mark.kernel

WEB = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80}]},
}
SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "endpoints": [{"addresses": ["10.244.1.5"], "nodeName": "n1"}],
    "ports": [{"port": 80}],
}


@pytest.fixture
def node(netns, tmp_path):
    """Yield node n1 with a Service; its agent is not started yet."""
    made = DaemonNode(netns, tmp_path)
    made.put("web", WEB)
    made.put("slice", SLICE)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait(10)


def test_servers(node):
    """Health, liveness, mode and metrics are answered where kube-proxy answers them; the Node object decides healthz alone."""
    with namespaces.inside(node.space), socket.create_server(("127.0.0.1", 10249)):
        node.start()
        status = node.synced()
        assert [p for p in status.problems if "10249" in p] == [
            "metricsBindAddress 127.0.0.1:10249: listen on 127.0.0.1: Address already in use"
        ]
        assert node.get(10256, "/healthz")[0] == 200, "a port that metrics cannot have is no failure of Services"
    eventually(lambda: _answers(node), SECONDS)
    assert node.get(10249, "/proxyMode") == (200, "nftables")
    assert node.get(10249, "/healthz") == (200, "ok")
    assert node.get(10249, "/else")[0] == node.get(10256, "/else")[0] == 404
    metrics = node.metrics()
    assert metrics['nodeplane_programmed{what="services"}'] == 1
    assert metrics["nodeplane_synced"] == 1
    assert metrics['kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"}'] >= 1
    assert metrics['kubeproxy_proxy_healthz_total{code="200"}'] == 1
    assert metrics["process_resident_memory_bytes"] > 1e7
    node.put("node", {**NODE, "spec": {**NODE["spec"], "taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}})
    eventually(lambda: node.get(10256, "/healthz")[0] == 503, SECONDS)
    assert '"nodeEligible": false' in node.get(10256, "/healthz")[1]
    assert node.get(10256, "/livez")[0] == 200


def _answers(node):
    try:
        return node.get(10249, "/metrics")[0] == 200
    except ConnectionRefusedError:
        return False


def test_a_port_that_must_be_had(node):
    """With bindAddressHardFail a port that is taken ends the agent, with the field, the address and the reason."""
    node.configure(services={"bindAddressHardFail": True})
    with namespaces.inside(node.space), socket.create_server(("0.0.0.0", 10256)):
        node.start()
        assert node.process.wait(SECONDS) == 1
    node.process = None
    assert "healthzBindAddress 0.0.0.0:10256: listen on 0.0.0.0: Address already in use" in node.log


def test_clients_that_do_not_read(node):
    """Scrapers that take nothing of their answers hold up neither other scrapers nor changes."""
    node.start()
    node.synced()
    with namespaces.inside(node.space):
        idle = [socket.create_connection(("127.0.0.1", 10249), timeout=5) for _ in range(80)]
    try:
        for one in idle[-40:]:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            one.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" * 100)
        started = time.monotonic()
        assert node.metrics()["nodeplane_synced"] == 1
        node.put(
            "web2",
            {**WEB, "metadata": {"name": "web2", "namespace": "shop"}, "spec": {**WEB["spec"], "clusterIP": "10.96.0.11"}},
        )
        eventually(lambda: node.status().services == 2, SECONDS)
        assert time.monotonic() - started < SECONDS / 2
    finally:
        for one in idle:
            one.close()


def test_connection_tracking(node):
    """Stated time-outs are set in the node's namespace, defaults raise what is lower; what is read-only here is a problem if stated."""
    node.configure(services={"conntrack": {"tcpCloseWaitTimeout": "77s", "maxPerCore": 50000, "tcpBeLiberal": True}})
    node.start()
    eventually(lambda: _sysctl(node, "tcp_timeout_close_wait") == "77", SECONDS)
    assert int(_sysctl(node, "tcp_timeout_established")) >= 86400
    assert _sysctl(node, "tcp_be_liberal") == "1"
    node.put(
        "other", {**WEB, "metadata": {"name": "other", "namespace": "shop"}, "spec": {**WEB["spec"], "clusterIP": "10.96.0.12"}}
    )
    found = eventually(lambda: [p for p in node.status().problems if "conntrack.maxPerCore" in p], SECONDS)
    assert "nf_conntrack_max" in found[0]


def _sysctl(node, name):
    return namespaces.run(node.space, ["cat", f"/proc/sys/net/netfilter/nf_conntrack_{name}"]).strip()


def test_json_logs(node):
    """With logging.format json every line is an object with time, level and message."""
    import json  # noqa: PLC0415

    node.configure(services={"logging": {"format": "json"}})
    node.start()
    node.synced()
    assert node.end() == 0
    lines = [json.loads(line) for line in node.log.splitlines()]
    assert {"ts", "level", "logger", "msg"} <= lines[0].keys()
    assert lines[-1]["msg"].startswith("stopped")


def test_a_file_that_changes(node):
    """Settings of rules are in force without a new start, other fields by one in place: same pid, the rules there all the while."""
    node.start()
    before = node.synced()
    assert "masqueradeAll" not in _ruleset(node)
    node.configure(services={"nftables": {"masqueradeAll": True}, "conntrack": {"tcpCloseWaitTimeout": "99s"}})
    eventually(lambda: "masqueradeAll" in _ruleset(node), SECONDS)
    eventually(lambda: _sysctl(node, "tcp_timeout_close_wait") == "99", SECONDS)
    assert node.status().started == before.started
    node.configure(services={"mode": "iptables"})
    after = eventually(lambda: (s := node.status()) and s.mode == "iptables" and s.synced and s, SECONDS)
    assert (after.pid, after.started > before.started) == (before.pid, True)
    assert "starting anew" in node.log


def _ruleset(node):
    return namespaces.run(node.space, ["nft", "-s", "list", "ruleset"])


def test_a_file_that_is_wrong(node):
    """A file that is broken, or gone, changes nothing, and log, status and metrics say so until it is right again."""
    node.start()
    before = node.synced()
    for content, words in (
        (b"kind: [", "not YAML"),
        (b'{"kind": "KubeProxyConfiguration", "mod": "ipvs"}', "mod: unknown field"),
    ):
        node.write(content)
        eventually(lambda words=words: words in node.status().refused, SECONDS)
        assert words in node.log
        assert node.metrics()["nodeplane_config_refused"] == 1
    node.config.unlink()
    eventually(lambda: "No such file" in node.status().refused, SECONDS)
    node.configure()
    eventually(lambda: node.status().refused == "", SECONDS)
    eventually(lambda: node.metrics()["nodeplane_config_refused"] == 0, SECONDS)
    assert node.status().started == before.started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end(node, number):
    """SIGTERM and SIGINT end the agent at once with exit 0, and everything it wrote stays."""
    node.start()
    node.synced()
    rules = _ruleset(node)
    started = time.monotonic()
    assert node.end(number) == 0
    assert time.monotonic() - started < 2
    assert _ruleset(node) == rules


def test_an_api_server_in_place_of_files(node, tmp_path):
    """On an API server the agent programs what that says, and tells flannel's nodes through its Node how it is reached."""
    node.configure(
        overlay={"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw"}, "subnetFile": str(tmp_path / "subnet.env")}
    )
    server = Server(space=node.space)
    try:
        for path, manifest in ((SERVICES, WEB), (SLICES, SLICE), ("/api/v1/nodes", NODE)):
            server.api.put(path, manifest)
        node.start(kubeconfig=kubeconfig(tmp_path, server.url, {}))
        status = node.synced()
        assert (status.services, status.endpoints, status.problems) == (1, 1, ())
        own = server.api.objects["/api/v1/nodes"]
        told = eventually(lambda: own["/n1"]["metadata"].get("annotations"), SECONDS)
        assert told == {
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/backend-type": "host-gw",
            "flannel.alpha.coreos.com/backend-data": "null",
            "flannel.alpha.coreos.com/public-ip": "192.168.1.1",
        }
        assert [one["type"] for one in own["/n1"]["status"]["conditions"]] == ["NetworkUnavailable"]
        server.api.put(SLICES, {**SLICE, "endpoints": []})
        eventually(lambda: node.status().endpoints == 0, SECONDS)
        assert len(server.patches) == 1, "what is said already is not said again"
        server.api.put(SERVICES, {**WEB, "spec": {**WEB["spec"], "clusterIP": "nowhere"}})
        eventually(lambda: len(server.posts) > 1, SECONDS)
        events = [(path, one["regarding"]["name"], one["type"], one["reason"]) for path, one in server.posts]
        place = "/apis/events.k8s.io/v1/namespaces/default/events"
        assert events == [(place, "n1", "Normal", "Starting"), (place, "n1", "Warning", "BadObject")]
        assert "nowhere" in server.posts[1][1]["note"]
        assert node.end() == 0
    finally:
        server.close()
