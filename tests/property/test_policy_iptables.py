"""Policies in iptables: what chains and sets let through is what the oracle does, and every way to them ends in the same."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_worlds import NODE_ADDRESS, NODES, assert_met, clusters, histories

from clusterstate.snapshot import Snapshot
from kernelstate.objects.netfilter import Jump, Ruleset, SetMatch
from kernelstate.objects.sets import Member
from kernelstate.simulate import Simulator
from netpolicy.compile import PolicyCompiler, compile_policies
from netpolicy.render.iptables import CHAIN_NAMES, DENIALS, IptablesPolicyProgram, render_policies

EXAMPLES = 1000 if os.environ.get("EXPLORE") else 60


@settings(max_examples=EXAMPLES, deadline=None)
@given(clusters(), st.sampled_from(NODES))
def test_chains_meet_the_oracle(cluster, node):
    """Walked through the rendered chains, every connection fares as the oracle says."""
    table = compile_policies(cluster, node)
    program = render_policies(table)
    assert_met(cluster, table, Simulator(Ruleset(program.chains, program.anchors), [NODE_ADDRESS], program.sets))


@settings(max_examples=EXAMPLES, deadline=None)
@given(histories(), st.sampled_from(NODES))
def test_incremental_equals_full(stages, node):
    """Whatever came before, chains and sets are those of the last cluster alone, and every part that changed was named."""
    compiler, program = PolicyCompiler(node), IptablesPolicyProgram()
    before, started = Snapshot(), False
    for stage in stages:
        refs = frozenset(o.ref for o in {*before.objects()} ^ {*stage.objects()})
        chains = dict(program.chains)
        members: dict[str, set[Member]] = {name: set(one.members) for name, one in program.sets.items()}
        specs = {name: one.spec for name, one in program.sets.items()}
        change = program.update(compiler.table, compiler.update(stage, refs))
        full = render_policies(compile_policies(stage, node))
        assert program.chains == full.chains
        assert program.sets == full.sets
        if started:
            assert {k for k in {*chains, *program.chains} if chains.get(k) != program.chains.get(k)} <= change.chains
            remade = {
                n for n in {*specs, *program.sets} if specs.get(n) != (program.sets[n].spec if n in program.sets else None)
            }
            assert remade <= change.sets
            for one in change.members:
                assert one.spec.name not in change.sets
                assert not members[one.spec.name] & set(one.added)
                assert set(one.removed) <= members[one.spec.name]
                members[one.spec.name] = (members[one.spec.name] | set(one.added)) - set(one.removed)
            assert all(members[n] == program.sets[n].members for n in {*members, *program.sets} - change.sets)
        before, started = stage, True


@settings(max_examples=EXAMPLES, deadline=None)
@given(clusters(), st.sampled_from(NODES))
def test_everything_that_is_asked_is_there(cluster, node):
    """Rules lead to chains and ask sets that exist; every chain and every set is used; names are as long as the kernel takes."""
    program = render_policies(compile_policies(cluster, node))
    rules = [(key, rule) for key, held in program.chains.items() for rule in held]
    led = {(key.family, rule.target.chain) for key, rule in rules if isinstance(rule.target, Jump)}
    led |= {(anchor.chain.family, anchor.rule.target.chain) for anchor in program.anchors}
    present = {(key.family, key.name) for key in program.chains}
    assert led <= present
    unled = {
        name for _, name in present - led
    }  # a group's pods may have one family only, and where nobody is isolated nobody is denied
    assert unled <= {name for _, name in led} | set(DENIALS.values())
    asked = {match.name for _, rule in rules for match in rule.matches if isinstance(match, SetMatch)}
    assert asked == set(program.sets)
    assert all(len(key.name) <= 28 for key in program.chains)
    assert all(len(name) <= 31 for name in program.sets)
    assert {key.name for key in program.chains} >= CHAIN_NAMES
