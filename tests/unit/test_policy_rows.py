"""What NetworkPolicies mean, row by row: a policy as people write it, and who gets through."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
import yaml
from immutables import Map

from clusterstate.objects import ContainerPort, Namespace, Pod
from clusterstate.parse import parse_object
from clusterstate.snapshot import Snapshot, edited
from netpolicy.compile import PolicyCompiler, compile_policies
from netpolicy.oracle import Flow, Oracle

ADDRESSES = {
    "a/web": "10.244.1.1",
    "a/db": "10.244.1.2",
    "b/web": "10.244.2.1",
    "b/job": "10.244.2.2",
    "world": "192.0.2.7",
}


def pod(name: str, **labels: str) -> Pod:
    namespace, _, short = name.partition("/")
    ports = (ContainerPort("pg", "TCP", 5432), ContainerPort("pg", "UDP", 5433)) if short == "db" else ()
    return Pod(namespace, short, "n1", (ip_address(ADDRESSES[name]),), labels=Map({"app": short, **labels}), ports=ports)


PODS = [pod("a/web"), pod("a/db", tier="back"), pod("b/web"), pod("b/job", tier="back")]
SPACES = [Namespace(name, Map({"kubernetes.io/metadata.name": name, "team": name})) for name in "ab"]
EVERYBODY = "a/web b/web b/job world"

INGRESS = {
    # Into a/db on TCP 5432, from whom?
    "no policy": ("", EVERYBODY),
    "a policy for other pods": ("podSelector: {matchLabels: {app: web}}", EVERYBODY),
    "selects everybody, allows nothing": ("podSelector: {}", ""),
    "podSelector missing selects everybody as well": ("ingress: []", ""),
    "of type Egress alone it leaves ingress as it is": ("policyTypes: [Egress]", EVERYBODY),
    "one empty rule allows all": ("ingress: [{}]", EVERYBODY),
    "an empty from is all": ("ingress: [{from: []}]", EVERYBODY),
    "pods of its own namespace": ("ingress: [{from: [{podSelector: {}}]}]", "a/web"),
    "pods of all namespaces, and no stranger": ("ingress: [{from: [{namespaceSelector: {}}]}]", "a/web b/web b/job"),
    "both selectors in one peer": (
        "ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchLabels: {app: web}}}]}]",
        "b/web",
    ),
    "both selectors in two peers": (
        "ingress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}, {podSelector: {matchLabels: {app: web}}}]}]",
        "a/web b/web b/job",
    ),
    "NotIn holds where the key is absent": (
        "ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [x]}]}}]}]",
        "a/web b/web b/job",
    ),
    "In does not": (
        "ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: tier, operator: In, values: [back]}]}}]}]",
        "b/job",
    ),
    "a block holds pods and strangers alike": ("ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0}}]}]", EVERYBODY),
    "an exception is taken from its block": (
        "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.244.2.0/24]}}]}]",
        "a/web world",
    ),
    "and from no other": (
        "ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.244.2.0/24]}}, {ipBlock: {cidr: 10.244.2.1/32}}]}]",
        "a/web b/web world",
    ),
    "a block of the other family holds nobody": ("ingress: [{from: [{ipBlock: {cidr: '::/0'}}]}]", ""),
    "the port fits": ("ingress: [{ports: [{port: 5432}]}]", EVERYBODY),
    "another port": ("ingress: [{ports: [{port: 5431}]}]", ""),
    "a port without protocol is TCP": ("ingress: [{ports: [{protocol: UDP, port: 5432}]}]", ""),
    "an empty port is all of TCP": ("ingress: [{ports: [{}]}]", EVERYBODY),
    "a range, ends included": ("ingress: [{ports: [{port: 5000, endPort: 5432}]}]", EVERYBODY),
    "a range that ends before": ("ingress: [{ports: [{port: 5000, endPort: 5431}]}]", ""),
    "a name of the pod itself": ("ingress: [{ports: [{port: pg}]}]", EVERYBODY),
    "a name with another protocol": ("ingress: [{ports: [{protocol: UDP, port: pg}]}]", ""),
    "a name that the pod does not have": ("ingress: [{ports: [{port: http}]}]", ""),
    "peers and ports of one rule must both fit": (
        "ingress: [{from: [{podSelector: {}}], ports: [{port: 1}]}, {from: [{ipBlock: {cidr: 192.0.2.0/24}}]}]",
        "world",
    ),
    "SCTP isolates and opens no TCP port": ("ingress: [{ports: [{protocol: SCTP, port: 5432}]}]", ""),
}

EGRESS = {
    # Out of a/web to TCP 5432, to whom?
    "ingress rules alone leave egress as it is": ("ingress: []", "a/db b/web b/job world"),
    "of type Egress without rules it lets nothing out": ("policyTypes: [Egress]", ""),
    "egress: [] does not make it a policy for egress": ("egress: []", "a/db b/web b/job world"),
    "rules make it one": ("egress: [{to: [{podSelector: {}}]}]", "a/db"),
    "a name is looked up at the destination": ("egress: [{ports: [{port: pg}]}]", "a/db"),
    "and only at peers": ("egress: [{to: [{namespaceSelector: {matchLabels: {team: b}}}], ports: [{port: pg}]}]", ""),
    "also at peers that a block holds": ("egress: [{to: [{ipBlock: {cidr: 10.244.1.0/24}}], ports: [{port: pg}]}]", "a/db"),
}


@pytest.mark.parametrize(("spec", "who"), INGRESS.values(), ids=list(INGRESS))
def test_ingress(spec, who):
    """Exactly these reach the pod."""
    oracle = judge(spec)
    sources = [name for name in ADDRESSES if name != "a/db" and oracle.judge(flow(name, "a/db")).ingress != "deny"]
    assert " ".join(sources) == who


@pytest.mark.parametrize(("spec", "whom"), EGRESS.values(), ids=list(EGRESS))
def test_egress(spec, whom):
    """The pod reaches exactly these."""
    oracle = judge(spec)
    destinations = [name for name in ADDRESSES if name != "a/web" and oracle.judge(flow("a/web", name)).egress != "deny"]
    assert " ".join(destinations) == whom


def test_policies_add_up():
    """What one policy lets through no other can take away."""
    oracle = judge("ingress: []", "ingress: [{from: [{podSelector: {}}]}]")
    assert [name for name in ADDRESSES if oracle.judge(flow(name, "a/db")).ingress == "allow"] == ["a/web", "a/db"]


def test_says_why():
    """The answer names the policies that isolate, and how near each rule came."""
    oracle = judge("ingress: [{from: [{podSelector: {}}], ports: [{port: 80}]}, {from: [{ipBlock: {cidr: 192.0.2.0/24}}]}]")
    assert oracle.judge(flow("a/web", "a/db")).because == (
        "ingress: Pod a/db is isolated by NetworkPolicy a/p0, and no rule fits",
        "ingress: a/p0: ingress[0]: fits 10.244.1.1, but not TCP 5432: it lets through TCP 80",
        "ingress: a/p0: ingress[1]: fits TCP 5432, but not 10.244.1.1",
    )
    assert oracle.judge(flow("world", "a/db")).because == ("ingress: NetworkPolicy a/p0: ingress[1] lets it through",)


def test_says_why_of_a_port_with_a_name():
    """A port that is stated by name fits where the pod has it."""
    oracle = judge("ingress: [{from: [{ipBlock: {cidr: 192.0.2.0/24}}], ports: [{port: pg}]}]")
    assert oracle.judge(flow("a/web", "a/db")).because[1] == "ingress: a/p0: ingress[0]: fits TCP 5432, but not 10.244.1.1"


def test_the_own_node_comes_in_and_pods_reach_themselves():
    """Whatever isolates a pod, its own node reaches it, and it reaches itself."""
    oracle = judge("policyTypes: [Ingress, Egress]")
    assert oracle.judge(Flow(ip_address("10.9.0.1"), ip_address(ADDRESSES["a/db"]), "TCP", 5432, from_node=True)).allowed
    assert oracle.judge(flow("a/db", "a/db")).allowed


def test_who_is_no_pod():
    """A pod that has ended, is on the node's network or has no address is neither isolated nor anybody's peer."""
    ended = Pod("a", "old", "n1", (ip_address(ADDRESSES["b/web"]),), phase="Succeeded", labels=Map({"app": "db"}))
    on_node = Pod("a", "net", "n1", (ip_address("10.9.0.1"),), host_network=True, labels=Map({"app": "db"}))
    table = compile_policies(cluster("ingress: [{from: [{podSelector: {}}]}]", more=[ended, on_node]), None)
    assert {name for _, name in table.pods} == {"web", "db"}
    assert {str(ip) for ip in table.rules["a", "p0"][0].pods} == {ADDRESSES["a/web"], ADDRESSES["a/db"]}


def judge(*specs: str) -> Oracle:
    return Oracle(compile_policies(cluster(*specs), None))


def cluster(*specs: str, more=()) -> Snapshot:
    policies = []
    for number, spec in enumerate(filter(None, specs)):
        raw = {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"namespace": "a", "name": f"p{number}"},
            "spec": yaml.safe_load(spec),
        }
        parsed = parse_object(raw, "row")
        assert not parsed.errors
        policies += parsed.objects
    return edited(Snapshot(), (), [*PODS, *SPACES, *policies, *more])


def flow(source: str, destination: str) -> Flow:
    return Flow(ip_address(ADDRESSES[source]), ip_address(ADDRESSES[destination]), "TCP", 5432)


def test_a_named_port_goes_with_its_pod():
    """Where a port's name led at a pod that is gone it leads no more, while other pods stay selected: the address may be another's."""
    before = cluster("ingress: [{ports: [{port: pg}]}]")
    compiler = PolicyCompiler("n1")
    compiler.update(before, None)
    ended = next(one for one in PODS if one.name == "db")
    after = edited(before, [ended], [])
    compiler.update(after, frozenset({ended.ref}))
    assert compiler.table == compile_policies(after, "n1")
    assert [rule.doors for rule in compiler.table.rules["a", "p0"]] == [frozenset()]
