"""Reconciling ipsets over a kernel in memory: what is written, how sets grow, and when they may go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelstate.diff_sets import (
    SMALLEST,
    TEMPORARY,
    AddMembers,
    CreateSet,
    DestroySet,
    MemberChange,
    SwapSets,
    room_for,
    temporary_name,
)
from kernelstate.fake_sets import FakeIpset
from kernelstate.objects.sets import IpSet, SetSpec
from kernelstate.ownership import Ownership
from kernelstate.reconcile_sets import IpsetReconciler

OURS = Ownership(names=frozenset({"KUBE-A", "KUBE-B", "KUBE-GONE"}), prefixes=(TEMPORARY,))
SPEC_A, SPEC_B = SetSpec("KUBE-A", "hash:ip,port"), SetSpec("KUBE-B", "hash:ip", 6)
MEMBERS = frozenset((n, "tcp", 80) for n in range(3))
SETS = {"KUBE-A": IpSet(SPEC_A, MEMBERS), "KUBE-B": IpSet(SPEC_B, frozenset({(1,)}))}


@pytest.fixture
def port():
    return FakeIpset()


def make(port, sets=SETS):
    reconciler = IpsetReconciler(port, OURS)
    reconciler.set_desired(dict(sets))
    assert reconciler.sync().errors == ()
    port.applied.clear()
    return reconciler


def held(port):
    return {name: IpSet(spec, frozenset(members)) for name, (spec, _, members) in port.sets.items()}


def want(reconciler, name, members=None, spec=None):
    """Change one set of the desired state; without members, stop wanting it."""
    spec = spec or reconciler._sets[name].wanted
    reconciler.set_desired({} if members is None else {name: IpSet(spec, frozenset(members))}, [name])


def test_makes_and_fills(port):
    """Sets that are missing are made with their members; then nothing is written or listed."""
    reconciler = make(port)
    assert held(port) == SETS
    listings = port.listings
    assert (reconciler.dirty, reconciler.drifted(), reconciler.sync().changed) == (False, False, 0)
    assert (port.applied, port.listings) == ([], listings)


def test_restart_writes_nothing(port):
    """Whoever starts over finds everything right and writes nothing."""
    make(port)
    make(port)
    assert port.applied == []


def test_a_change_costs_its_own_size(port):
    """One member more and one less are two changes, the new one first, and nothing is listed."""
    reconciler = make(port)
    listings = port.listings
    want(reconciler, "KUBE-A", MEMBERS - {(0, "tcp", 80)} | {(9, "udp", 53)})
    assert reconciler.sync().changed == 2
    assert list(map(str, port.applied)) == ["add 1 members to ipset KUBE-A", "delete 1 members from ipset KUBE-A"]
    assert held(port)["KUBE-A"].members == MEMBERS - {(0, "tcp", 80)} | {(9, "udp", 53)}
    assert port.listings == listings


def test_adjust_costs_its_own_size(port):
    """A change that is told as members gained and lost is written as just those, whichever of them were there already."""
    reconciler = make(port)
    here, gone, new = (0, "tcp", 80), (1, "tcp", 80), (9, "udp", 53)
    reconciler.adjust([MemberChange(SPEC_A, {here, new}, {gone, (7, "tcp", 7)})])
    assert reconciler.dirty
    assert reconciler.sync().changed == 2
    assert held(port)["KUBE-A"].members == MEMBERS - {gone} | {new}
    reconciler.adjust([MemberChange(SPEC_A, {gone}, {new})])
    reconciler.adjust([MemberChange(SPEC_A, {new}, {gone})])
    assert reconciler.sync().changed == 0


def test_adjust_makes_and_ends_sets(port):
    """A set comes with its first member and goes with its last."""
    reconciler = make(port)
    spec = SetSpec("KUBE-NEW", "hash:ip")
    reconciler.adjust([MemberChange(spec, {(1,)}, ()), MemberChange(SPEC_B, (), {(1,)})])
    assert reconciler.sync().changed == 3  # made, filled, destroyed
    assert held(port) == {"KUBE-A": SETS["KUBE-A"], "KUBE-NEW": IpSet(spec, frozenset({(1,)}))}


@given(st.integers(0, 1 << 22))
def test_room(count):
    """Room is a power of two, for at least twice the members, and not more than needed beyond 65,536."""
    room = room_for(SPEC_A, count)
    assert room & (room - 1) == 0
    assert room >= max(SMALLEST, 2 * count)
    assert room == SMALLEST or room < 4 * count


def test_grows_by_swapping(port):
    """A set that gets too small is replaced by a larger one under its name, from one packet to the next."""
    reconciler = make(port)
    many = frozenset((n, "tcp", 80) for n in range(SMALLEST + 1))
    want(reconciler, "KUBE-A", many)
    assert reconciler.sync().ok
    temporary = temporary_name("KUBE-A")
    assert [type(change) for change in port.applied] == [DestroySet, CreateSet, AddMembers, SwapSets, DestroySet]
    assert port.applied[1] == CreateSet(SPEC_A._replace(name=temporary), 4 * SMALLEST)
    assert held(port) == {**SETS, "KUBE-A": IpSet(SPEC_A, many)}
    assert not reconciler.drifted()


def test_half_a_growth_is_done_over(port):
    """Growing that fails half-way leaves the old set in place, and what it left behind is not mixed into the new one."""
    reconciler = make(port)
    many = frozenset((n, "tcp", 80) for n in range(SMALLEST + 1))
    want(reconciler, "KUBE-A", many)
    port.refuse = lambda change: isinstance(change, SwapSets)
    assert reconciler.sync().errors == (f"swap ipsets {temporary_name('KUBE-A')} and KUBE-A: refused by the test",)
    assert held(port)["KUBE-A"] == SETS["KUBE-A"]
    port.sets[temporary_name("KUBE-A")][2].add((1 << 31, "tcp", 80))
    port.refuse = lambda _change: False
    assert reconciler.sync().ok
    assert held(port) == {**SETS, "KUBE-A": IpSet(SPEC_A, many)}


def test_waits_for_rules(port):
    """A set that is not wanted goes when no rule refers to it any more; until then nothing is wrong."""
    reconciler = make(port)
    port.references["KUBE-B"] = 1
    want(reconciler, "KUBE-B")
    report = reconciler.sync()
    assert (report.ok, reconciler.dirty, reconciler.drifted()) == (True, False, False)
    assert "KUBE-B" in port.sets
    port.references["KUBE-B"] = 0
    assert reconciler.drifted()
    assert reconciler.sync().changed == 1
    assert held(port) == {"KUBE-A": SETS["KUBE-A"]}


def test_wanted_again_while_it_waits(port):
    """A set that is wanted again before it could go is used as it is, also after a restart did not look at its members."""
    reconciler = make(port)
    port.references["KUBE-B"] = 1
    want(reconciler, "KUBE-B")
    reconciler.sync()
    reconciler = make(port, {"KUBE-A": SETS["KUBE-A"]})
    want(reconciler, "KUBE-B", {(2,)}, SPEC_B)
    assert reconciler.sync().changed == 2
    assert held(port) == {**SETS, "KUBE-B": IpSet(SPEC_B, frozenset({(2,)}))}


def test_leftovers_go_and_others_stay(port):
    """What an earlier run left is destroyed, half-grown sets as well; sets of others are not touched, not even by cleanup."""
    port.apply(
        [CreateSet(SetSpec(name, "hash:ip"), SMALLEST) for name in ("KUBE-GONE", f"{TEMPORARY}1", "OTHER", "KUBE-SRC-1")]
    )
    reconciler = make(port)
    assert set(port.sets) == {"KUBE-A", "KUBE-B", "OTHER", "KUBE-SRC-1"}
    assert reconciler.cleanup().changed == 2
    assert set(port.sets) == {"OTHER", "KUBE-SRC-1"}
    assert reconciler.sync().ok
    assert {name: held(port)[name] for name in SETS} == SETS


def test_cleanup_tells_what_is_in_use(port):
    """A set that rules still refer to cannot be cleaned up, and is told."""
    reconciler = make(port)
    port.references["KUBE-A"] = 2
    assert reconciler.cleanup().errors == ("destroy ipset KUBE-A: in use by a rule or another set",)


@pytest.mark.parametrize("spec", [SetSpec("KUBE-A", "hash:ip"), SetSpec("KUBE-A", "hash:ip,port", 6)])
def test_other_type_is_made_anew(port, spec):
    """A set of another type or family is destroyed and made anew, unless a rule refers to it: that is told."""
    port.apply([CreateSet(spec, SMALLEST)])
    port.references["KUBE-A"] = 1
    reconciler = IpsetReconciler(port, OURS)
    reconciler.set_desired(SETS)
    assert reconciler.sync().errors == ("destroy ipset KUBE-A: in use by a rule or another set",)
    assert held(port)["KUBE-B"] == SETS["KUBE-B"]
    assert reconciler.dirty
    port.references.clear()
    assert reconciler.sync().ok
    assert held(port) == SETS


def damage_flush(port):
    port.sets["KUBE-A"][2].clear()


def damage_destroy(port):
    del port.sets["KUBE-A"]


def damage_extra(port):
    port.sets["KUBE-A"][2].add((77, "tcp", 1))


def damage_leftover(port):
    port.apply([CreateSet(SetSpec("KUBE-GONE", "hash:ip"), SMALLEST)])


@pytest.mark.parametrize("damage", [damage_flush, damage_destroy, damage_extra, damage_leftover])
def test_damage_is_noticed_and_repaired(port, damage):
    """What changes a set's existence, type or size is noticed from headers; only that set is listed again."""
    reconciler = make(port)
    damage(port)
    listings = port.listings
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert held(port) == SETS
    assert port.listings <= listings + 1
    assert not reconciler.drifted()


def test_forget_sees_exchanged_members(port):
    """A member exchanged for another is found once memory is not trusted."""
    reconciler = make(port)
    port.sets["KUBE-A"][2].discard((0, "tcp", 80))
    port.sets["KUBE-A"][2].add((77, "tcp", 1))
    assert not reconciler.drifted()
    reconciler.forget()
    assert reconciler.sync().changed == 2
    assert held(port) == SETS


def test_vanished_set_is_made_in_the_same_sync(port):
    """A set that went unnoticed is looked up when writing to it fails, and made anew at once."""
    reconciler = make(port)
    del port.sets["KUBE-A"]
    want(reconciler, "KUBE-A", MEMBERS | {(5, "tcp", 80)})
    assert reconciler.sync().ok
    assert held(port)["KUBE-A"].members == MEMBERS | {(5, "tcp", 80)}


def test_refused_set_stands_alone(port):
    """What the kernel refuses of one set is told, stays dirty and stops no other."""
    port.refuse = lambda change: isinstance(change, AddMembers) and change.spec.name == "KUBE-A"
    reconciler = IpsetReconciler(port, OURS)
    reconciler.set_desired(SETS)
    assert reconciler.sync().errors == ("add 3 members to ipset KUBE-A: refused by the test",)
    assert held(port)["KUBE-B"] == SETS["KUBE-B"]
    assert reconciler.dirty
    port.refuse = lambda _change: False
    assert reconciler.sync().ok
    assert held(port) == SETS
    assert not reconciler.dirty


def test_silence_of_the_kernel_is_survived(port):
    """When the kernel does not answer, that is told, everything stays dirty, and later all is looked at again."""
    reconciler = make(port)
    port.broken = True
    assert reconciler.drifted()
    assert reconciler.sync().errors == ("list ipsets: broken",)
    assert reconciler.dirty
    port.broken = False
    del port.sets["KUBE-A"]
    assert reconciler.sync().ok
    assert held(port) == SETS
