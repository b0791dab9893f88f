"""Policies in nftables: what the rendered tables let through is what the oracle does, and every way to them ends in the same."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_worlds import NODE_ADDRESS, NODES, assert_met, clusters, histories

from clusterstate.snapshot import Snapshot
from kernelstate.simulate_nftables import NftablesSimulator
from netpolicy.compile import PolicyCompiler, compile_policies
from netpolicy.render.nftables import NftablesPolicyProgram, render_policies

EXAMPLES = 1000 if os.environ.get("EXPLORE") else 60


@settings(max_examples=EXAMPLES, deadline=None)
@given(clusters(), st.sampled_from(NODES))
def test_tables_meet_the_oracle(cluster, node):
    """Walked through the rendered tables, every connection fares as the oracle says."""
    table = compile_policies(cluster, node)
    assert_met(cluster, table, NftablesSimulator(render_policies(table), [NODE_ADDRESS]))


@settings(max_examples=EXAMPLES, deadline=None)
@given(histories(), st.sampled_from(NODES))
def test_incremental_equals_full(stages, node):
    """Whatever came before, the tables are those of the last cluster alone, and every part that changed was named."""
    compiler, program = PolicyCompiler(node), NftablesPolicyProgram()
    before = Snapshot()
    for stage in stages:
        refs = frozenset(o.ref for o in {*before.objects()} ^ {*stage.objects()})
        held = {
            f: (dict(t.chains), dict(t.sets), {n: dict(e) for n, e in t.elements.items()}) for f, t in program.tables.items()
        }
        changes = program.update(compiler.table, compiler.update(stage, refs))
        assert program.tables == render_policies(compile_policies(stage, node))
        for family, table in program.tables.items():
            chains, sets, elements = held[family]
            change = changes[family]
            assert all(chains.get(n) == table.chains.get(n) for n in {*chains, *table.chains} - change.chains)
            assert all(sets.get(n) == table.sets.get(n) for n in {*sets, *table.sets} - change.sets)
            for name in {*elements, *table.elements} - change.sets:
                old, new = elements[name], table.elements[name]
                named = change.elements.get(name, frozenset())
                assert all(old.get(k, 0) == new.get(k, 0) for k in {*old, *new} - named), name
        before = stage
