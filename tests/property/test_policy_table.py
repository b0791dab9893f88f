"""The policy table says of every connection what the objects say, and does so whichever way it was arrived at."""

from __future__ import annotations

import os

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from immutables import Map
from policy_worlds import NODES, allowed, clusters, flows, histories

from clusterstate.objects import ClusterPolicyRule, IPAddress
from clusterstate.snapshot import Snapshot
from netpolicy.compile import PolicyChange, PolicyCompiler, compile_policies
from netpolicy.oracle import Oracle
from netpolicy.selections import PeerChange
from netpolicy.table import NO_ADDRESSES, AllowRule

EXAMPLES = 2000 if os.environ.get("EXPLORE") else 60


@settings(max_examples=EXAMPLES, deadline=None)
@given(clusters())
def test_table_says_what_the_objects_say(cluster):
    """Judged by the table, every connection between pods and strangers is decided as the objects decide it."""
    oracle = Oracle(compile_policies(cluster, None))
    for flow in flows(cluster):
        judgement = oracle.judge(flow)
        assert (judgement.egress, judgement.ingress) == allowed(cluster, flow), (flow, judgement.because)


@settings(max_examples=EXAMPLES, deadline=None)
@given(histories(), st.sampled_from((None, *NODES)))
def test_incremental_equals_full(stages, node):
    """Moved from cluster to cluster, with what changed named or not, a table is that of the last cluster alone; changes are told."""
    compiler = PolicyCompiler(node)
    before = Snapshot()
    for number, stage in enumerate(stages):
        refs = {o.ref for o in {*before.objects()} ^ {*stage.objects()}}
        pods, rules = dict(compiler.pods), dict(compiler.rules)
        change = compiler.update(stage, frozenset(refs) if number % 2 else None)
        full = compile_policies(stage, node)
        assert compiler.table == full
        assert change.pods == {n: pods.get(n) for n in {*pods, *full.pods} if pods.get(n) != full.pods.get(n)}
        assert change.rules == {name: rules.get(name) for name in change.rules}
        for name in {*rules, *full.rules} - set(change.rules):
            assert [moved(rule, change) for rule in rules[name]] == [
                (msgspec.structs.replace(rule, pods=NO_ADDRESSES), set(rule.pods)) for rule in full.rules[name]
            ]
        before = stage


def moved(rule: AllowRule, change: PolicyChange) -> tuple[AllowRule, set[IPAddress]]:
    """Return a rule without its pods, and these as they are by what was told of the change."""
    one = change.peers.get(rule.key, PeerChange(frozenset(), frozenset()))
    assert not one.come & set(rule.pods)
    assert one.gone <= set(rule.pods)
    return msgspec.structs.replace(rule, pods=NO_ADDRESSES), (set(rule.pods) | one.come) - one.gone


@settings(max_examples=EXAMPLES, deadline=None)
@given(clusters())
def test_a_node_knows_its_own_pods(cluster):
    """A node's table is the cluster's, without the pods of other nodes and the policies of theirs."""
    whole = compile_policies(cluster, None)
    for node in NODES:
        part = compile_policies(cluster, node)
        own = {name: pod for name, pod in whole.pods.items() if cluster.pods[name].node == node}
        assert part.pods == own
        for name, held in part.rules.items():
            # Doors of ingress rules are those of the selected pods here.
            assert [msgspec.structs.replace(r, doors=frozenset()) for r in held] == [
                msgspec.structs.replace(r, doors=frozenset()) for r in whole.rules[name]
            ]
        assert set(part.rules) == {policy for policy in whole.rules if _targets(cluster, policy, node)}


def _targets(cluster, policy, node) -> bool:
    if policy[0]:
        only = msgspec.structs.replace(cluster, policies=Map({policy: cluster.policies[policy]}), cluster_policies=Map())
    else:
        one = cluster.cluster_policies[policy[1]]
        # With a rule both ways it has a say about every pod that it selects.
        rules = (ClusterPolicyRule(action="Deny"),)
        both = msgspec.structs.replace(one, ingress=rules, egress=rules)
        only = msgspec.structs.replace(cluster, policies=Map(), cluster_policies=Map({policy[1]: both}))
    return any(cluster.pods[name].node == node for name in compile_policies(only, None).pods)
