"""Whatever the order of changes, the incremental result is that of rendering the last cluster afresh."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import NODE, snapshots
from service_worlds import settings as proxy_settings

from proxy.compile import ServiceCompiler, compile_table
from proxy.render.iptables_program import IptablesProgram, render_iptables


def differing(before, after):
    """Return the Services that a source would report between two snapshots."""
    keys = set(before.services) | set(after.services) | set(before.slices) | set(after.slices)
    return {k for k in keys if before.services.get(k) != after.services.get(k) or before.slices.get(k) != after.slices.get(k)}


@settings(max_examples=150, deadline=None)
@given(st.lists(snapshots(families=(4, 6)), min_size=1, max_size=4), proxy_settings())
def test_incremental_equals_full(history, config):
    """Entries, problems and chains after a history equal a fresh compile and render; every changed chain is reported."""
    compiler = ServiceCompiler(NODE)
    program = IptablesProgram(config, NODE, (4, 6))
    known = dict(program.chains)
    changed = program.update({}, compiler.update(history[0], None))
    changed |= program.update(compiler.entries, None)
    for before, after in itertools.pairwise(history):
        changed |= program.update(compiler.entries, compiler.update(after, differing(before, after)))
    table = compile_table(history[-1], NODE)
    assert compiler.table == table
    assert program.chains == render_iptables(table, config, NODE).chains
    differ = {k for k in known.keys() | program.chains.keys() if known.get(k) != program.chains.get(k)}
    assert differ <= changed


@settings(max_examples=150, deadline=None)
@given(snapshots(families=(4, 6)), snapshots(families=(4, 6)), proxy_settings())
def test_changed_chains_are_exact(before, after, config):
    """Chains reported as changed are those that differ, and no other."""
    compiler = ServiceCompiler(NODE)
    program = IptablesProgram(config, NODE, (4, 6))
    compiler.update(before, None)
    program.update(compiler.entries, None)
    known = dict(program.chains)
    changed = program.update(compiler.entries, compiler.update(after, differing(before, after)))
    if program.endpoints <= config.large_cluster_endpoints:
        assert changed == {k for k in known.keys() | program.chains.keys() if known.get(k) != program.chains.get(k)}


@settings(max_examples=100, deadline=None)
@given(snapshots(families=(4, 6)), proxy_settings(), st.randoms())
def test_order_of_input_is_irrelevant(snapshot, config, random):
    """The same cluster gives the same rules in the same order, however its objects were taken in."""
    names = list(set(snapshot.services) | set(snapshot.slices))
    random.shuffle(names)
    compiler = ServiceCompiler(NODE)
    program = IptablesProgram(config, NODE, (4, 6))
    for name in names:
        program.update(compiler.entries, compiler.update(snapshot, [name]))
    assert program.chains == render_iptables(compile_table(snapshot, NODE), config, NODE).chains
