"""The nftables reconciler over a fake kernel: when it looks, when it remembers, and what becomes of what is refused."""

import copy

import nft_tables

from kernelstate.fake_nftables import FakeNftables
from kernelstate.objects.nftables import (
    Chain,
    DropPacket,
    Field,
    Goto,
    InSet,
    NamedSet,
    Refuse,
    Rule,
    TableChange,
    TableKey,
)
from kernelstate.ports import SyncReport
from kernelstate.reconcile_nftables import NftablesReconciler

KEY = TableKey(4, "nodeplane")
IN_SYNC = SyncReport("nftables")
FRONTEND = (nft_tables.SERVICES[4] + 1, "tcp", 81)


def start(port, tables):
    reconciler = NftablesReconciler(port)
    reconciler.set_desired(tables)
    return reconciler


def as_desired(port, table):
    return port.observe(KEY, table) == table


def test_nothing_is_touched_before_anything_is_desired():
    """Before the first desired state there is no look and no write, and nothing is dirty."""
    port = FakeNftables()
    reconciler = NftablesReconciler(port)
    assert not reconciler.dirty
    assert not reconciler.drifted()
    assert reconciler.sync() == IN_SYNC
    assert (port.observations, port.written) == (0, [])


def test_it_looks_once_and_then_remembers():
    """The first sync looks; changes after that are written from memory, also several that came before one sync."""
    port, table = FakeNftables(), nft_tables.table(4)
    reconciler = start(port, {4: table})
    assert reconciler.sync().ok
    table.elements["services"][FRONTEND] = "drop"
    reconciler.set_desired({4: table}, {4: TableChange(elements={"services": frozenset({FRONTEND})})})
    table.elements["cluster-ips"][5,] = None
    table.chains["x"] = Chain((Rule((), (Refuse(),)),))
    reconciler.set_desired({4: table}, {4: TableChange(frozenset({"x"}), elements={"cluster-ips": frozenset({(5,)})})})
    assert reconciler.dirty
    assert reconciler.sync().ok
    assert not reconciler.dirty
    assert port.observations == 2  # one for each family, at the first sync
    assert as_desired(port, table)


def test_a_restart_writes_nothing():
    """A second process finds everything in place, and leaves what it finds."""
    port, table = FakeNftables(), nft_tables.table(4)
    start(port, {4: table}).sync()
    written = list(port.written)
    assert start(port, {4: copy.deepcopy(table)}).sync() == IN_SYNC
    assert port.written == written


def test_a_table_that_is_not_desired_goes():
    """What an earlier process left in a family that is not used, or in both, is deleted; that of others is not."""
    port, table = FakeNftables(), nft_tables.table(4)
    start(port, {4: table, 6: nft_tables.table(6)}).sync()
    port.run("add table ip other")
    reconciler = start(port, {4: table})
    assert reconciler.sync().changed == 1
    assert set(port.tables) == {KEY, TableKey(4, "other")}
    reconciler.set_desired({})
    assert reconciler.sync().changed == 1
    assert set(port.tables) == {TableKey(4, "other")}
    assert reconciler.sync() == IN_SYNC


def test_cleanup_takes_everything_of_ours():
    """Cleanup deletes the tables without knowing what they hold; cleaning up again is success and writes nothing."""
    port = FakeNftables()
    start(port, {4: nft_tables.table(4), 6: nft_tables.table(6)}).sync()
    port.run("add table ip other")
    cleaner = NftablesReconciler(port)
    assert cleaner.cleanup() == SyncReport("nftables", changed=2)
    assert set(port.tables) == {TableKey(4, "other")}
    assert cleaner.cleanup() == IN_SYNC


def test_unknown_news_means_a_look():
    """Where messages were lost every table is observed, and only then."""
    port, table = FakeNftables(), nft_tables.table(4)
    reconciler = start(port, {4: table})
    reconciler.sync()
    looks = port.observations
    port.run("add table ip other\nadd chain ip other nodeplane")
    assert not reconciler.drifted()
    reconciler.sync()
    assert port.observations == looks
    port.miss = True
    assert reconciler.drifted()
    assert reconciler.sync() == IN_SYNC
    assert port.observations == looks + 2


def test_a_failure_is_told_and_tried_again():
    """When no transaction goes through nothing is lost: the error is told, all stays dirty, and the next sync does it."""
    port, table = FakeNftables(), nft_tables.table(4)
    reconciler = start(port, {4: table})
    port.fail_next = 1000
    report = reconciler.sync()
    assert not report.ok
    assert "Resource temporarily unavailable" in report.errors[0]
    assert reconciler.dirty
    port.fail_next = 0
    assert reconciler.sync().ok
    assert not reconciler.dirty
    assert as_desired(port, table)


def test_a_refused_element_stays_alone():
    """One element that the kernel does not take is named and retried; the others, and later changes, go through."""
    bad = "10.96.0.1 . tcp . 81 : goto cluster-ip-2"
    refusing = {bad}
    port, table = FakeNftables(refuse=lambda words: words in refusing), nft_tables.table(4, services=300)
    reconciler = start(port, {4: table})
    report = reconciler.sync()
    assert [line.split(": ")[0] for line in report.errors] == ["write ip nodeplane element services { 10.96.0.1 . tcp . 81 }"]
    without = copy.deepcopy(table)
    del without.elements["services"][FRONTEND]
    assert as_desired(port, without)
    table.elements["cluster-ips"][5,] = without.elements["cluster-ips"][5,] = None
    reconciler.set_desired({4: table}, {4: TableChange(elements={"cluster-ips": frozenset({(5,)})})})
    assert len(reconciler.sync().errors) == 1
    assert as_desired(port, without)
    refusing.clear()
    assert reconciler.sync() == SyncReport("nftables", changed=1)
    assert as_desired(port, table)
    assert not reconciler.dirty


def test_what_leads_to_a_refused_chain_is_there():
    """A chain whose rules are refused exists and is empty, so that what leads to it passes; only it is told."""
    refusing = {"drop"}
    port, table = FakeNftables(refuse=lambda words: words in refusing), nft_tables.table(4)
    table.chains["bad"] = Chain((Rule((), (DropPacket(),)),))
    table.elements["services"][FRONTEND] = Goto("bad")
    reconciler = start(port, {4: table})
    assert [line.split(": ")[0] for line in reconciler.sync().errors] == ["write ip nodeplane chain bad"]
    assert port.tables[KEY].rules["bad"] == []
    assert port.tables[KEY].elements["services"]["10.96.0.1 . tcp . 81"] == "goto bad"
    refusing.clear()
    assert reconciler.sync().ok
    assert as_desired(port, table)


def test_a_chain_that_is_busy_goes_later_and_troubles_nobody():
    """Where the kernel has not let go of a chain yet it is emptied, no error is told, and it is deleted once it can be."""
    port, table = FakeNftables(), nft_tables.table(4)
    table.chains["late"] = Chain((Rule((), (Refuse(),)),))
    reconciler = start(port, {4: table})
    reconciler.sync()
    port.busy = {"late"}
    del table.chains["late"]
    table.elements["cluster-ips"][5,] = None
    change = TableChange(frozenset({"late"}), elements={"cluster-ips": frozenset({(5,)})})
    reconciler.set_desired({4: table}, {4: change})
    assert reconciler.sync().ok
    assert (not reconciler.dirty, reconciler.drifted()) == (True, True)
    assert port.tables[KEY].rules["late"] == []
    assert "0.0.0.5" in port.tables[KEY].elements["cluster-ips"]
    port.busy = set()
    assert reconciler.sync().ok
    assert not reconciler.drifted()
    assert as_desired(port, table)


def test_many_refusals_are_told_in_few_lines():
    """Of a hundred refused elements twenty are named and the rest are a number."""
    port, table = FakeNftables(refuse=lambda words: " : goto cluster-ip-2" in words), nft_tables.table(4, services=100)
    errors = start(port, {4: table}).sync().errors
    assert len(errors) == 21
    assert errors[-1] == "and 80 more refusals of nftables"


def test_no_packet_meets_half_of_a_change():
    """In turn: what is new comes whole before anything leads to it, and what is gone goes when nobody can be on the way to it."""
    port, table = FakeNftables(), nft_tables.table(4)
    table.chains["old"] = Chain((Rule((), (DropPacket(),)),))
    table.sets["old-peers"] = NamedSet("old-peers", (Field("saddr"),))
    table.elements["old-peers"] = {}
    table.elements["services"][FRONTEND] = Goto("old")
    reconciler = NftablesReconciler(port, in_turn=True)
    reconciler.set_desired({4: table})
    assert reconciler.sync().ok
    port.written.clear()

    del table.chains["old"], table.sets["old-peers"], table.elements["old-peers"]
    table.chains["new"] = Chain((Rule((InSet((Field("saddr"),), "new-peers"),), (DropPacket(),)),))
    table.sets["new-peers"] = NamedSet("new-peers", (Field("saddr"),))
    table.elements["new-peers"] = {(1,): None}
    table.elements["services"][FRONTEND] = Goto("new")
    names = ("old", "new"), ("old-peers", "new-peers")
    change = TableChange(*map(frozenset, names), {"services": frozenset({FRONTEND}), "new-peers": frozenset({(1,)})})
    reconciler.set_desired({4: table}, {4: change})
    assert reconciler.sync().ok
    new, leads, settle, gone = port.written
    assert all(word in new for word in ("add set ip nodeplane new-peers", "0.0.0.1", "add rule ip nodeplane new "))
    assert "old" not in new + leads.replace("goto old", "")
    assert "goto new" in leads
    assert settle == "settle"
    assert "delete chain ip nodeplane old" in gone
    assert "delete set ip nodeplane old-peers" in gone
    assert as_desired(port, table)
