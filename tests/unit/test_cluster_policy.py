"""What ClusterNetworkPolicies mean, row by row: policies as people write them, and who gets through; and how long their chains are."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
import yaml
from immutables import Map

from clusterstate.objects import ContainerPort, Namespace, Pod
from clusterstate.parse import parse_object
from clusterstate.snapshot import Snapshot, edited
from kernelstate.objects.nftables import GotoChain
from netpolicy.compile import PolicyChange, PolicyCompiler, compile_policies
from netpolicy.oracle import Flow, Oracle
from netpolicy.render.iptables import IptablesPolicyProgram
from netpolicy.render.nftables import NftablesPolicyProgram, render_policies
from nodeplane.agent import policy_counts
from nodeplane.status import Status, status_lines

ADDRESSES = {"a/web": "10.244.1.1", "a/db": "10.244.1.2", "b/web": "10.244.2.1", "b/job": "10.244.2.2", "world": "192.0.2.7"}
EVERYBODY = "a/web b/web b/job world"
PODS = [
    Pod(
        namespace,
        app,
        "n1",
        (ip_address(ADDRESSES[f"{namespace}/{app}"]),),
        labels=Map(app=app),
        ports=(ContainerPort("pg", "TCP", 5432),) if app == "db" else (),
    )
    for namespace, app in (("a", "web"), ("a", "db"), ("b", "web"), ("b", "job"))
]
SPACES = [Namespace(name, Map({"kubernetes.io/metadata.name": name, "team": name})) for name in "ab"]

B = "{namespaces: {matchLabels: {team: b}}}"
WEB = "{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}"
ALL = "{namespaces: {}}"
DENY_B = f"{{ingress: [{{action: Deny, from: [{B}]}}]}}"
ACCEPT_WEB = f"{{ingress: [{{action: Accept, from: [{WEB}]}}]}}"
PASS_WEB = f"{{ingress: [{{action: Pass, from: [{WEB}]}}]}}"
DENY_ALL = f"{{ingress: [{{action: Deny, from: [{ALL}]}}]}}"
ISOLATE = "ingress: []"
LET_A_IN = "ingress: [{from: [{podSelector: {}}]}]"

INGRESS = {
    # Into a/db on TCP 5432, from whom? Policies of the cluster by tier and name, the NetworkPolicy of namespace a.
    "no rule, nobody is held back": ({"x": "{}"}, None, EVERYBODY),
    "there is no implicit isolation": ({"x": ACCEPT_WEB}, None, EVERYBODY),
    "a rule denies whom it is about": ({"x": DENY_B}, None, "a/web world"),
    "the first rule that fits decides": (
        {"x": f"{{ingress: [{{action: Accept, from: [{WEB}]}}, {{action: Deny, from: [{ALL}]}}]}}"},
        None,
        "a/web b/web world",
    ),
    "and not one behind it": (
        {"x": f"{{ingress: [{{action: Deny, from: [{ALL}]}}, {{action: Accept, from: [{WEB}]}}]}}"},
        None,
        "world",
    ),
    "the lower priority comes first": ({"x": {**yaml.safe_load(DENY_B), "priority": 5}, "y": ACCEPT_WEB}, None, "a/web world"),
    "whatever the names are": ({"y": {**yaml.safe_load(DENY_B), "priority": 5}, "x": ACCEPT_WEB}, None, "a/web world"),
    "of one priority the first by name": ({"x": ACCEPT_WEB, "y": DENY_B}, None, "a/web b/web world"),
    "by name, not as they were made": ({"y": ACCEPT_WEB, "x": DENY_B}, None, "a/web world"),
    "accept opens what a NetworkPolicy closes": ({"x": ACCEPT_WEB}, ISOLATE, "a/web b/web"),
    "deny closes what a NetworkPolicy opens": ({"x": f"{{ingress: [{{action: Deny, from: [{WEB}]}}]}}"}, LET_A_IN, ""),
    "pass leaves it to NetworkPolicies": ({"x": PASS_WEB, "y": DENY_ALL}, LET_A_IN, "a/web"),
    "pass skips the rest of the tier": ({"x": PASS_WEB, "y": DENY_ALL}, None, "a/web b/web world"),
    "what no rule fits is left to NetworkPolicies": ({"x": DENY_B}, LET_A_IN, "a/web"),
    "the baseline holds where nothing else is said": (
        {"x": {**yaml.safe_load(DENY_B), "tier": "Baseline"}},
        None,
        "a/web world",
    ),
    "a NetworkPolicy decides instead of the baseline": (
        {"x": {**yaml.safe_load(DENY_ALL), "tier": "Baseline"}},
        LET_A_IN,
        "a/web",
    ),
    "also where it is for egress alone, and the baseline for ingress": (
        {"x": {**yaml.safe_load(DENY_ALL), "tier": "Baseline"}},
        "policyTypes: [Egress]",
        "world",
    ),
    "the admin tier comes before the baseline, whatever the priorities": (
        {"x": {**yaml.safe_load(DENY_ALL), "tier": "Baseline", "priority": 0}, "y": ACCEPT_WEB},
        None,
        "a/web b/web world",
    ),
    "pass goes on to the baseline": (
        {"x": PASS_WEB, "y": {**yaml.safe_load(DENY_B), "tier": "Baseline"}},
        None,
        "a/web world",
    ),
    "pass in the baseline skips the rest of it": (
        {"x": {**yaml.safe_load(PASS_WEB), "tier": "Baseline"}, "y": {**yaml.safe_load(DENY_ALL), "tier": "Baseline"}},
        None,
        "a/web b/web world",
    ),
    "accept in the baseline opens nothing that a NetworkPolicy closes": (
        {"x": {**yaml.safe_load(ACCEPT_WEB), "tier": "Baseline"}},
        ISOLATE,
        "",
    ),
    "a policy about other pods": ({"x": {**yaml.safe_load(DENY_ALL), "subject": yaml.safe_load(B)}}, None, EVERYBODY),
    "a policy about pods by both selectors": (
        {"x": {**yaml.safe_load(DENY_ALL), "subject": yaml.safe_load(WEB)}},
        None,
        EVERYBODY,
    ),
    "peers are pods, and no strangers": ({"x": DENY_ALL}, None, "world"),
    "another port": (
        {"x": f"{{ingress: [{{action: Deny, from: [{ALL}], protocols: [{{tcp: {{destinationPort: {{number: 80}}}}}}]}}]}}"},
        None,
        EVERYBODY,
    ),
    "the port": (
        {"x": f"{{ingress: [{{action: Deny, from: [{ALL}], protocols: [{{tcp: {{destinationPort: {{number: 5432}}}}}}]}}]}}"},
        None,
        "world",
    ),
    "a range, ends included": (
        {
            "x": f"{{ingress: [{{action: Deny, from: [{ALL}], "
            "protocols: [{tcp: {destinationPort: {range: {start: 5000, end: 5432}}}}]}]}"
        },
        None,
        "world",
    ),
    "another protocol": (
        {"x": f"{{ingress: [{{action: Deny, from: [{ALL}], protocols: [{{udp: {{}}}}]}}]}}"},
        None,
        EVERYBODY,
    ),
    "all of the protocol": (
        {"x": f"{{ingress: [{{action: Deny, from: [{ALL}], protocols: [{{udp: {{}}}}, {{tcp: {{}}}}]}}]}}"},
        None,
        "world",
    ),
    "a name of the pod's": (
        {"x": f"{{ingress: [{{action: Deny, from: [{B}], protocols: [{{destinationNamedPort: pg}}]}}]}}"},
        None,
        "a/web world",
    ),
    "a name that it does not have": (
        {"x": f"{{ingress: [{{action: Deny, from: [{B}], protocols: [{{destinationNamedPort: http}}]}}]}}"},
        None,
        EVERYBODY,
    ),
    "accept with a fault accepts nothing": (
        {"x": f"{{ingress: [{{action: Accept, from: [{{planets: {{}}}}]}}, {{action: Deny, from: [{ALL}]}}]}}"},
        None,
        "world",
    ),
    "pass with a fault denies everything": ({"x": "{ingress: [{action: Pass, from: [{planets: {}}]}]}"}, LET_A_IN, ""),
}

EGRESS = {
    # Out of a/web to TCP 5432, to whom?
    "ingress rules are for ingress": ("{ingress: [{action: Accept, from: [{namespaces: {}}]}]}", "a/db b/web b/job world"),
    "pods": ("{egress: [{action: Deny, to: [{namespaces: {matchLabels: {team: b}}}]}]}", "a/db world"),
    "a network holds pods and strangers alike": ("{egress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]}", ""),
    "one of several networks": ("{egress: [{action: Deny, to: [{networks: [192.0.2.0/24, 10.244.2.1/32]}]}]}", "a/db b/job"),
    "a network of the other family": ("{egress: [{action: Deny, to: [{networks: ['::/0']}]}]}", "a/db b/web b/job world"),
    "an exception is a rule before": (
        "{egress: [{action: Accept, to: [{namespaces: {}}]}, {action: Deny, to: [{networks: [0.0.0.0/0]}]}]}",
        "a/db b/web b/job",
    ),
    "a name is looked up at the destination": (
        "{egress: [{action: Deny, to: [{namespaces: {}}], protocols: [{destinationNamedPort: pg}]}]}",
        "b/web b/job world",
    ),
}


@pytest.mark.parametrize(("stated", "policy", "who"), INGRESS.values(), ids=list(INGRESS))
def test_ingress(stated, policy, who):
    """Exactly these reach the pod."""
    oracle = Oracle(compile_policies(cluster(stated, policy), None))
    sources = [name for name in ADDRESSES if name != "a/db" and oracle.judge(flow(name, "a/db")).ingress != "deny"]
    assert " ".join(sources) == who


@pytest.mark.parametrize(("stated", "whom"), EGRESS.values(), ids=list(EGRESS))
def test_egress(stated, whom):
    """The pod reaches exactly these."""
    oracle = Oracle(compile_policies(cluster({"x": stated}), None))
    destinations = [name for name in ADDRESSES if name != "a/web" and oracle.judge(flow("a/web", name)).egress != "deny"]
    assert " ".join(destinations) == whom


def test_both_ends_are_judged():
    """What the destination accepts the source may still not send."""
    stated = {"x": ACCEPT_WEB, "y": "{egress: [{action: Deny, to: [{namespaces: {matchLabels: {team: a}}}]}]}"}
    judged = Oracle(compile_policies(cluster(stated), None)).judge(flow("b/web", "a/db"))
    assert (judged.egress, judged.ingress, judged.allowed) == ("deny", "allow", False)


def test_the_own_node_comes_in_and_pods_reach_themselves():
    """Even if a rule with a fault denies everything, a pod's own node reaches it, and it reaches itself."""
    oracle = Oracle(compile_policies(cluster({"x": "{ingress: [{action: Deny}], egress: [{action: Deny}]}"}), None))
    assert not oracle.judge(flow("world", "a/db")).allowed
    assert oracle.judge(Flow(ip_address("10.9.0.1"), ip_address(ADDRESSES["a/db"]), "TCP", 5432, from_node=True)).allowed
    assert oracle.judge(flow("a/db", "a/db")).allowed


def test_says_why():
    """The answer names tier, policy, rule and the rule's own name, and what a rule passed on is followed."""
    rules = f"[{{name: tenants, action: Pass, from: [{WEB}]}}, {{action: Deny, from: [{B}]}}]"
    oracle = Oracle(compile_policies(cluster({"fence": f"{{ingress: {rules}}}"}, LET_A_IN), None))
    assert oracle.judge(flow("a/web", "a/db")).because == (
        "ingress: Admin ClusterNetworkPolicy fence: ingress[0] (tenants) passes it on",
        "ingress: NetworkPolicy a/np: ingress[0] lets it through",
    )
    assert oracle.judge(flow("b/job", "a/db")).because == ("ingress: Admin ClusterNetworkPolicy fence: ingress[1] denies it",)


# -- what it becomes -------------------------------------------------------------------------------------------------------

ONE = f"{{action: Deny, from: [{WEB}], protocols: [{{tcp: {{destinationPort: {{number: 1}}}}}}]}}"
OTHER = f"{{action: Accept, from: [{B}]}}"


def chain(stated: dict[str, Any], policy: str | None = None) -> list[str]:
    """Return what each rule of a/db's chain does, and those of the chain that it goes on to."""
    table = render_policies(compile_policies(cluster(stated, policy), None))[4]
    verdict: Any = table.elements["ingress"].get((int(ip_address(ADDRESSES["a/db"])),))
    if verdict is None:
        return []
    names = [verdict.chain, f"{verdict.chain}-rest"]
    done = [rule.statements[0] for name in names if name in table.chains for rule in table.chains[name].rules]
    return ["DropPacket" if one == GotoChain("deny-ingress") else type(one).__name__ for one in done]


def test_neighbours_that_do_the_same_cost_as_one():
    """A tier costs as often as it changes its mind, not as it has rules or policies."""
    many = {f"p{i:02}": f"{{ingress: [{ONE}, {ONE}]}}" for i in range(20)}
    assert chain(many) == ["DropPacket"]
    assert chain({"x": f"{{ingress: [{ONE}, {OTHER}, {ONE}, {ONE}]}}"}) == ["DropPacket", "ReturnToCaller", "DropPacket"]


NEEDLESS = {
    "passing with nothing behind": ({"x": PASS_WEB}, None, []),
    "accepting with nothing behind": ({"x": ACCEPT_WEB}, None, []),
    "passing at the end": ({"x": DENY_B, "y": PASS_WEB}, ISOLATE, ["DropPacket", "DropPacket"]),
    "accepting at the end of the baseline": (
        {"x": f"{{tier: Baseline, ingress: [{ONE}, {OTHER}]}}"},
        None,
        ["DropPacket"],
    ),
    "what stands behind a rule about everything": (
        {"x": f"{{ingress: [{OTHER}, {{action: Deny}}, {ONE}]}}"},
        ISOLATE,
        ["ReturnToCaller", "DropPacket"],
    ),
    "passing, which needs a chain": (
        {"x": PASS_WEB, "y": DENY_B},
        ISOLATE,
        ["GotoChain", "DropPacket", "GotoChain", "DropPacket"],
    ),
    "passing before a rule about everything": (
        {"x": f"{{ingress: [{{action: Pass, from: [{WEB}]}}, {{action: Deny}}]}}"},
        ISOLATE,
        ["GotoChain", "DropPacket", "DropPacket"],
    ),
}


@pytest.mark.parametrize(("stated", "policy", "does"), NEEDLESS.values(), ids=list(NEEDLESS))
def test_what_changes_nothing_is_not_written(stated, policy, does):
    """Rules that make no difference are not in the chain; the others are, in order."""
    assert chain(stated, policy) == does


def test_groups_share_clauses():
    """Pods of whom their NetworkPolicies say different things ask the same sets for the tier that is around them."""
    table = render_policies(compile_policies(cluster({"x": DENY_B}, ISOLATE), None))[4]
    assert len({verdict.chain for verdict in table.elements["ingress"].values()}) == 2
    assert len([name for name in table.sets if name.endswith("-peers")]) == 1


STAGES = [
    ({"x": PASS_WEB}, ISOLATE),
    ({"x": DENY_ALL}, ISOLATE),
    ({"x": f"{{ingress: [{OTHER}, {ONE}, {OTHER}]}}"}, ISOLATE),
    ({"x": f"{{ingress: [{OTHER}, {ONE}]}}"}, ISOLATE),
    ({"x": f"{{priority: 20, ingress: [{OTHER}, {ONE}]}}", "y": DENY_ALL}, ISOLATE),
    ({"x": f"{{priority: 5, ingress: [{OTHER}, {ONE}]}}", "y": DENY_ALL}, None),
    ({"x": f"{{tier: Baseline, ingress: [{OTHER}, {ONE}]}}"}, None),
    ({}, None),
]


@pytest.mark.parametrize("program", [NftablesPolicyProgram, IptablesPolicyProgram])
def test_stage_by_stage(program):
    """A rule that made no difference does when it changes; what is asked twice goes when nobody asks it; order and tier may change."""
    compiler, moved, before = PolicyCompiler("n1"), program(), Snapshot()
    for stated, policy in [*STAGES, *reversed(STAGES)]:
        after = cluster(stated, policy)
        refs = frozenset(one.ref for one in {*before.objects()} ^ {*after.objects()})
        change = compiler.update(after, refs)
        moved.update(compiler.table, change)
        full, table = program(), compile_policies(after, "n1")
        full.update(table, PolicyChange(dict.fromkeys(table.pods), dict.fromkeys(table.rules), {}))
        for part in {"tables", "chains", "sets"} & vars(full).keys():
            assert getattr(moved, part) == getattr(full, part)
        before = after


def test_status_counts_both_kinds():
    """The status says how many policies of each kind are about pods here, and how many pods."""
    counts = policy_counts(compile_policies(cluster({"x": DENY_B, "none": "{}"}, ISOLATE), None))
    assert counts == {"policies": 1, "isolated": 2, "cluster_policies": 1, "governed": 4}
    lines = status_lines(Status(1, "n1", "iptables", **counts), running=True)
    at = lines.index("policy    1 NetworkPolicies isolate 2 pods here")
    assert lines[at + 1] == "          1 ClusterNetworkPolicies have rules for 4 pods here"


def cluster(stated: dict[str, Any], policy: str | None = None) -> Snapshot:
    raws = [
        {"kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": of_cluster(spec)} for name, spec in stated.items()
    ]
    if policy is not None:
        raws.append({"kind": "NetworkPolicy", "metadata": {"name": "np", "namespace": "a"}, "spec": yaml.safe_load(policy)})
    made = [one for raw in raws for one in parse_object(raw, "row").objects]
    assert len(made) == len(raws)
    return edited(Snapshot(), (), [*PODS, *SPACES, *made])


def of_cluster(spec: Any) -> dict[str, Any]:
    stated = yaml.safe_load(spec) if isinstance(spec, str) else spec
    return {"tier": "Admin", "priority": 10, "subject": {"namespaces": {}}, **stated}


def flow(source: str, destination: str) -> Flow:
    return Flow(ip_address(ADDRESSES[source]), ip_address(ADDRESSES[destination]), "TCP", 5432)
