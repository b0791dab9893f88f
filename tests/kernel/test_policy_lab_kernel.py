"""Policies of both kinds across three nodes: for each policy that people write, every pair of nine pods on every port, by real connections."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
import yaml
from lab_source import up_options
from policy_worlds import allowed

from clusterstate.sources.files import load_objects
from netnslab import state as states
from netpolicy.oracle import Flow

pytestmark = pytest.mark.kernel

PORTS = (80, 81)
WORLD = "\n---\n".join(
    [
        *(f"{{apiVersion: v1, kind: Namespace, metadata: {{name: {ns}, labels: {{ns: {ns}}}}}}}" for ns in "xyz"),
        *(
            f"{{apiVersion: v1, kind: Pod, metadata: {{namespace: {ns}, name: {pod}, labels: {{pod: {pod}}}}}, "
            f"spec: {{nodeName: node-{1 + number % 3}, containers: [{{name: c, ports: ["
            f"{{name: web, containerPort: 80}}, {{containerPort: 81}}]}}]}}}}"
            for number, (ns, pod) in enumerate((ns, pod) for ns in "xyz" for pod in "abc")
        ),
    ]
)

POLICIES = {
    "default deny of ingress": {"podSelector": {}},
    "default deny of egress": {"podSelector": {}, "policyTypes": ["Egress"]},
    "allow all": {"podSelector": {}, "ingress": [{}]},
    "only from pods of its namespace": {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]},
    "only from a namespace and a pod": {
        "podSelector": {"matchLabels": {"pod": "a"}},
        "ingress": [
            {"from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}}, "podSelector": {"matchLabels": {"pod": "b"}}}]}
        ],
    },
    "one port by name, another from one namespace": {
        "podSelector": {},
        "ingress": [
            {"ports": [{"port": "web"}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}], "ports": [{"port": 81}]},
        ],
    },
    "out to one namespace, in from all but a block": {
        "podSelector": {"matchExpressions": [{"key": "pod", "operator": "NotIn", "values": ["c"]}]},
        "policyTypes": ["Ingress", "Egress"],
        "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"ns": "x"}}}], "ports": [{"port": 80, "endPort": 81}]}],
        "ingress": [{"from": [{"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.2.0/24"]}}]}],
    },
}


def nodeplane(*args: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nodeplane", "lab", *args], capture_output=True, text=True, timeout=90, check=False, input=stdin
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["nftables ebpf api", "iptables iptables files"])
def cluster(request, tmp_path_factory) -> Iterator[str]:
    """Bring up three nodes with the nine pods, policies enforced through the one or the other.

    With and without a short lane for open connections, and said by a server or by files.
    """
    mode, services, source = request.param.split()
    name = f"t{os.getpid()}-{secrets.token_hex(2)}"
    objects = tmp_path_factory.mktemp("policies") / "world.yaml"
    objects.write_text(WORLD)
    try:
        nodeplane(
            "up", "--name", name, "--services", services, "--policy", mode, "--objects", str(objects), *up_options(source)
        )
        yield name
    finally:
        nodeplane("down", "--name", name)


@pytest.mark.parametrize("spec", POLICIES.values(), ids=list(POLICIES))
def test_truth_table(cluster, tmp_path, spec):
    """Exactly the connections come about that the policy lets through, from every pod to every pod on both ports."""
    metadata = {"name": "policy", "namespace": "x"}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}
    assert True in truth(cluster, tmp_path, [policy]).values()


def test_a_pod_that_is_applied_starts(cluster):
    """A pod that comes to a running lab starts where policies are enforced: its node's agent hears of it first."""
    metadata = "metadata: {namespace: x, name: late, labels: {pod: late}}"
    manifest = f"{{apiVersion: v1, kind: Pod, {metadata}, spec: {{nodeName: node-2, containers: [{{name: c, image: x}}]}}}}"
    nodeplane("apply", "--name", cluster, "-f", "-", stdin=manifest)
    try:
        assert states.load(cluster).pod("x/late") is not None
    finally:
        nodeplane("delete", "--name", cluster, "-f", "-", stdin=manifest)


def test_tiers(cluster, tmp_path):
    """So do those that the tiers let through, around a NetworkPolicy: accepted and denied before it, passed on to it, or left to the end."""
    of_cluster = {"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy"}
    manifests = [{**of_cluster, "metadata": {"name": name}, "spec": spec} for name, spec in yaml.safe_load(TIERS).items()]
    deny = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "deny", "namespace": "x"}}
    got = truth(cluster, tmp_path, [*manifests, {**deny, "spec": {"podSelector": {}}}])
    into = {
        to: "".join(sorted({one[0] for (one, other, port), open_ in got.items() if other == to and port == 80 and open_}))
        for to in WATCHED
    }
    assert into == {"x/a": "xy", "y/b": "yz", "z/c": "xyz"}
    assert not any(open_ for (one, other, port), open_ in got.items() if port == 81 and other[0] == "z" and one != other)


WATCHED = ("x/a", "y/b", "z/c")
TIERS = """
first:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  ingress:
  - {action: Accept, from: [{namespaces: {matchLabels: {ns: y}}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}
  egress:
  - {action: Deny, to: [{namespaces: {matchLabels: {ns: z}}}], protocols: [{tcp: {destinationPort: {range: {start: 81, end: 90}}}}]}
second:
  tier: Admin
  priority: 2
  subject: {namespaces: {matchExpressions: [{key: ns, operator: In, values: [x, y]}]}}
  ingress:
  - {action: Pass, from: [{pods: {namespaceSelector: {matchLabels: {ns: z}}, podSelector: {}}}]}
  - {action: Deny, from: [{pods: {namespaceSelector: {matchLabels: {ns: x}}, podSelector: {}}}]}
last:
  tier: Baseline
  priority: 0
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}}
  ingress:
  - {action: Deny, from: [{namespaces: {}}]}
"""


def truth(cluster: str, tmp_path: Path, manifests: list[dict[str, object]]) -> dict[tuple[str, str, int], bool]:
    """Apply policies, connect every pod to every pod on both ports, see that all is as the objects say, and delete them."""
    policies = tmp_path / "policies.yaml"
    policies.write_text(yaml.safe_dump_all(manifests))
    nodeplane("apply", "--name", cluster, "-f", str(policies))
    nodeplane("wait", "--name", cluster)
    pods = [f"{ns}/{pod}" for ns in "xyz" for pod in "abc"]
    asked = [(one, other, port) for one in pods for other in pods for port in PORTS]
    got = probe(cluster, tmp_path, asked)
    assert got == {question: expected(cluster, *question) for question in asked}
    nodeplane("delete", "--name", cluster, "-f", str(policies))
    return got


def probe(name: str, tmp_path: Path, asked: list[tuple[str, str, int]]) -> dict[tuple[str, str, int], bool]:
    file = tmp_path / "probes.json"
    file.write_text(json.dumps([{"from": a, "to": b, "port": port, "protocol": "TCP"} for a, b, port in asked]))
    answers = json.loads(nodeplane("probe", "--name", name, "--probes", str(file), "-o", "json"))
    return {question: answer["connected"] for question, answer in zip(asked, answers, strict=True)}


def expected(name: str, source: str, destination: str, port: int) -> bool:
    """Judge a connection straight from the objects that the agents have."""
    snapshot, errors = load_objects([states.LABS / name / "objects"])
    assert errors == ()
    ends = [snapshot.pods[tuple(end.split("/"))].ips[0] for end in (source, destination)]
    return "deny" not in allowed(snapshot, Flow(ip_address(ends[0]), ip_address(ends[1]), "TCP", port))
