"""Whatever the order of changes, nftables tables equal those of the last cluster rendered afresh, and changes are exact."""

import copy
import itertools

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from service_worlds import NODE, snapshots
from service_worlds import settings as proxy_settings

from proxy.compile import ServiceCompiler, compile_table
from proxy.render.nftables_program import NftablesProgram, render_nftables

FAMILIES = (4, 6)


def differing(before, after):
    """Return the Services that a source would report between two snapshots."""
    keys = set(before.services) | set(after.services) | set(before.slices) | set(after.slices)
    return {k for k in keys if before.services.get(k) != after.services.get(k) or before.slices.get(k) != after.slices.get(k)}


@st.composite
def histories(draw):
    """Draw clusters that follow each other, and settings with every option that changes the table."""
    config = msgspec.structs.replace(draw(proxy_settings()), guard_node_ports=draw(st.booleans()))
    return draw(st.lists(snapshots(families=FAMILIES), min_size=2, max_size=4)), config


def parts(table):
    """Return every single thing of a table by its name: what a change can speak of."""
    return (
        {("chain", name): chain for name, chain in table.chains.items()}
        | {("set", name): named for name, named in table.sets.items()}
        | {("element", name, key): data for name, held in table.elements.items() for key, data in held.items()}
    )


def told(change):
    """Return the same of a change."""
    return (
        {("chain", name) for name in change.chains}
        | {("set", name) for name in change.sets}
        | {("element", name, key) for name, keys in change.elements.items() for key in keys}
    )


@settings(max_examples=150, deadline=None)
@given(histories())
def test_incremental_equals_full_and_changes_are_exact(drawn):
    """After a history tables equal fresh ones; each change named what differed, element by element, and nothing else."""
    history, config = drawn
    compiler = ServiceCompiler(NODE)
    program = NftablesProgram(config, NODE, FAMILIES)
    compiler.update(history[0], None)
    program.update(compiler.entries, None)
    for before, after in itertools.pairwise(history):
        known = {family: copy.copy(parts(table)) for family, table in program.tables.items()}
        changes = program.update(compiler.entries, compiler.update(after, differing(before, after)))
        for family, table in program.tables.items():
            now, was = parts(table), known[family]
            absent = object()
            differ = {k for k in now.keys() | was.keys() if now.get(k, absent) != was.get(k, absent)}
            assert told(changes[family]) == differ
    assert program.tables == render_nftables(compile_table(history[-1], NODE), config, NODE)


@settings(max_examples=100, deadline=None)
@given(snapshots(families=FAMILIES), proxy_settings(), st.randoms())
def test_order_of_input_is_irrelevant(snapshot, config, random):
    """The same cluster gives the same tables, however its objects were taken in."""
    names = list(set(snapshot.services) | set(snapshot.slices))
    random.shuffle(names)
    compiler = ServiceCompiler(NODE)
    program = NftablesProgram(config, NODE, FAMILIES)
    for name in names:
        program.update(compiler.entries, compiler.update(snapshot, [name]))
    assert program.tables == render_nftables(compile_table(snapshot, NODE), config, NODE)
