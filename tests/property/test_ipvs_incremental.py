"""Whatever the order of changes, the incremental IPVS program is that of rendering the last cluster afresh."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import NODE, snapshots
from service_worlds import settings as proxy_settings

from proxy.compile import ServiceCompiler, compile_table
from proxy.render.ipvs import EntryWriter, IpvsContext, render_entry
from proxy.render.ipvs_program import IpvsProgram, render_ipvs


def held(program):
    """Return everything a program says should exist, as values that later updates do not touch."""
    members = {name: one.members for name, one in program.sets.items()}
    return dict(program.chains), dict(program.servers), members, program.addresses


def differing(before, after):
    """Return the Services that a source would report between two snapshots."""
    keys = set(before.services) | set(after.services) | set(before.slices) | set(after.slices)
    return {k for k in keys if before.services.get(k) != after.services.get(k) or before.slices.get(k) != after.slices.get(k)}


def keys_that_differ(before, after):
    """Return the keys of two mappings whose values are not the same in both."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


@settings(max_examples=150, deadline=None)
@given(st.lists(snapshots(families=(4, 6)), min_size=2, max_size=4), proxy_settings())
def test_incremental_is_full_and_changes_are_exact(history, config):
    """After each step everything equals a fresh render, and the change names what differs from before, and no more."""
    compiler = ServiceCompiler(NODE)
    program = IpvsProgram(config, NODE, (4, 6))
    compiler.update(history[0], None)
    program.update(compiler.entries, None)
    for before, after in itertools.pairwise(history):
        was = held(program)
        change = program.update(compiler.entries, compiler.update(after, differing(before, after)))
        now = held(program)
        fresh = render_ipvs(compile_table(after, NODE), config, NODE)
        assert (*now, program.sets, program.endpoints) == (*held(fresh), fresh.sets, fresh.endpoints)
        assert change.chains == keys_that_differ(was[0], now[0])
        assert change.servers == keys_that_differ(was[1], now[1])
        assert change.sets.keys() == keys_that_differ(was[2], now[2])
        for name, (added, removed) in change.sets.items():
            old, new = was[2].get(name, frozenset()), now[2].get(name, frozenset())
            assert (added, removed) == (new - old, old - new)
        assert (change.added_addresses, change.removed_addresses) == (now[3] - was[3], was[3] - now[3])


@settings(max_examples=100, deadline=None)
@given(snapshots(families=(4, 6)), proxy_settings(), st.randoms())
def test_order_of_input_is_irrelevant(snapshot, config, random):
    """The same cluster gives the same state, however its objects were taken in."""
    names = list(set(snapshot.services) | set(snapshot.slices))
    random.shuffle(names)
    compiler = ServiceCompiler(NODE)
    program = IpvsProgram(config, NODE, (4, 6))
    for name in names:
        program.update(compiler.entries, compiler.update(snapshot, [name]))
    assert held(program) == held(render_ipvs(compile_table(snapshot, NODE), config, NODE))


@settings(max_examples=100, deadline=None)
@given(snapshots(families=(4, 6)), proxy_settings())
def test_plain_entries_are_written_as_others(snapshot, config):
    """What the short way writes for a plain ClusterIP is what the long way writes."""
    contexts = {family: IpvsContext.of(config, NODE, family) for family in (4, 6)}
    for entry in compile_table(snapshot, NODE):
        context = contexts[entry.family]
        assert render_entry(entry, context) == EntryWriter(entry, context).write()
