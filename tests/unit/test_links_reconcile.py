"""The link reconciler over links in memory: what it writes, when it looks, and what becomes of failures."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec
import pytest

from kernelstate.diff_links import LinkChange, diff_links
from kernelstate.fake_links import FakeLinks
from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, FdbEntry, Link, LinkObject, LinkState, Neigh, Route, Vxlan
from kernelstate.ports import Reconciler
from kernelstate.reconcile_links import SHOWN_ERRORS, LinkReconciler

TUNNEL = Link("flannel.1", 1450, "02:00:00:00:00:01", Vxlan(1, ip_address("192.168.1.1"), "eth0"))
OWN = Address("flannel.1", ip_address("10.244.1.0"), 32)


def peer(i: int) -> list[LinkObject]:
    gateway, mac = ip_address(f"10.244.{i}.0"), f"02:00:00:00:00:{i:02x}"
    return [
        Neigh("flannel.1", gateway, mac),
        FdbEntry("flannel.1", mac, ip_address(f"192.168.1.{i}")),
        Route(Prefix.parse(f"{gateway}/24"), gateway, "flannel.1", onlink=True),
    ]


def state(*peers: int) -> LinkState:
    return LinkState.of([TUNNEL, OWN, *(o for i in peers for o in peer(i))])


def synced(kernel: FakeLinks, desired: LinkState) -> LinkReconciler:
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(desired)
    assert reconciler.sync().ok
    kernel.applied.clear()
    return reconciler


def held(kernel: FakeLinks) -> LinkState:
    return kernel.observe(["flannel.1"], [])


def test_nothing_before_desired() -> None:
    """Without a desired state nothing is observed, written or called dirty, whatever of ours the kernel holds."""
    kernel = FakeLinks()
    kernel.put(TUNNEL)
    reconciler: Reconciler = LinkReconciler(kernel)
    assert (reconciler.sync().changed, reconciler.dirty, reconciler.drifted(), kernel.observations) == (0, False, False, 0)


def test_makes_what_is_desired_in_order() -> None:
    """The link comes first, a peer's route after its neighbour and forwarding entry; a second sync does nothing."""
    kernel = FakeLinks()
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(state(2))
    assert reconciler.dirty
    assert reconciler.sync().changed == 5
    assert [type(c.obj) for c in kernel.applied] == [Link, Address, Neigh, FdbEntry, Route]
    assert held(kernel) == state(2)
    looked = kernel.observations
    assert (reconciler.drifted(), reconciler.dirty, reconciler.sync().changed) == (False, False, 0)
    assert kernel.observations == looked


def test_small_change_without_looking() -> None:
    """A peer that comes and one that goes are written without observing, and nothing else is."""
    kernel = FakeLinks()
    reconciler = synced(kernel, state(2, 3))
    looked = kernel.observations
    reconciler.set_desired(state(3, 4))
    assert reconciler.sync().changed == 6
    assert {c.obj for c in kernel.applied} == {*peer(2), *peer(4)}
    assert (held(kernel), kernel.observations) == (state(3, 4), looked + 1)


@pytest.mark.parametrize("victim", range(5))
def test_deleted_object_comes_back(victim: int) -> None:
    """Whatever is deleted is noticed and comes back, with the link everything on it, under the same MAC."""
    kernel = FakeLinks()
    reconciler = synced(kernel, state(2))
    kernel.take(state(2).objects()[victim])
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert held(kernel) == state(2)
    assert not (victim and any(isinstance(c.obj, Link) for c in kernel.applied))


@pytest.mark.parametrize(
    "wrong",
    [
        msgspec.structs.replace(TUNNEL, up=False),
        msgspec.structs.replace(TUNNEL, mac="02:00:00:00:00:99"),
        Neigh("flannel.1", ip_address("10.244.2.0"), "02:00:00:00:00:99"),
        Neigh("flannel.1", ip_address("10.244.2.0"), ""),
        FdbEntry("flannel.1", "02:00:00:00:00:02", ip_address("192.168.1.99")),
        Address("flannel.1", ip_address("10.244.9.1"), 24),
        Route(Prefix.parse("10.244.2.0/24"), ip_address("192.168.1.254"), "eth0", protocol=4),
        Route(Prefix.parse("10.244.77.0/24"), ip_address("192.168.1.254"), "eth0"),
    ],
)
def test_changed_object_is_set_right(wrong: LinkObject) -> None:
    """What is changed, taken over, or added under our marks is noticed and set right."""
    kernel = FakeLinks()
    reconciler = synced(kernel, state(2))
    kernel.put(wrong)
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert held(kernel) == state(2)


def test_others_are_left_alone() -> None:
    """Routes of another protocol and links without our mark are neither drift nor touched."""
    kernel = FakeLinks()
    reconciler = synced(kernel, state(2))
    foreign = Route(Prefix.parse("172.16.0.0/16"), ip_address("192.168.1.254"), "eth0", protocol=3)
    kernel.put(foreign)
    kernel.put(Link("veth7", 1500, "", None, alias=""))
    kernel.put(Neigh("flannel.1", ip_address("224.0.0.22"), ""))
    assert not reconciler.drifted()
    reconciler.cleanup()
    assert foreign in kernel.objects.values()
    assert {o.name for o in kernel.objects.values() if isinstance(o, Link)} == {"eth0", "veth7"}


def test_stale_objects_go_at_start() -> None:
    """What an earlier run left under our marks goes with the first sync, other tunnels included."""
    kernel = FakeLinks()
    other = Link("flannel.9", 1450, "02:00:00:00:00:01", Vxlan(9, None, ""))
    for obj in (*state(2, 7).objects(), other, Neigh("flannel.9", ip_address("10.9.0.0"), "02:00:00:00:00:05")):
        kernel.put(obj)
    reconciler = synced(kernel, state(2))
    assert held(kernel) == state(2)
    assert reconciler.sync().changed == 0


def test_adopts_an_identical_link() -> None:
    """A link that flanneld left is marked as ours in place: it is never deleted, so packets go on."""
    kernel = FakeLinks()
    for obj in (msgspec.structs.replace(TUNNEL, alias=""), OWN, *peer(2)):
        kernel.put(obj)
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(state(2))
    assert reconciler.sync().changed == 1
    assert kernel.applied == [LinkChange("set", TUNNEL, msgspec.structs.replace(TUNNEL, alias=""))]


def test_recreates_a_link_of_other_kind() -> None:
    """A link of our name with another VNI is replaced, and everything on it is made anew."""
    kernel = FakeLinks()
    for obj in (msgspec.structs.replace(TUNNEL, kind=Vxlan(2, None, "eth0"), alias=""), OWN, *peer(2)):
        kernel.put(obj)
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(state(2))
    assert reconciler.sync().changed == 6
    assert [c.verb for c in kernel.applied[:2]] == ["delete", "create"]
    assert held(kernel) == state(2)


def test_one_failing_peer_stops_nobody() -> None:
    """A refused route leaves its peer dirty, told with operation, object and words, and all others in place."""
    bad = peer(3)[2]
    kernel = FakeLinks(refuse=lambda change: change.obj == bad)
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(state(2, 3, 4))
    report = reconciler.sync()
    assert report.errors == ("replace route 10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink proto 157: refused by the test",)
    assert (report.changed, reconciler.dirty) == (10, True)
    assert set(state(2, 4).routes) <= set(held(kernel).routes)
    kernel.refuse = lambda _change: False
    assert reconciler.sync().changed == 1
    assert (held(kernel), reconciler.dirty) == (state(2, 3, 4), False)


def test_missing_underlay_is_one_error() -> None:
    """A link that cannot be made is told once, not once for each object on it; it is made when its underlay is there."""
    kernel = FakeLinks(underlays=())
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(state(*range(2, 9)))
    (error,) = reconciler.sync().errors
    assert error.endswith("nolearning: no link eth0 to carry it")
    kernel.put(Link("eth0", 1500, "", None, alias=""))
    assert reconciler.sync().ok
    assert held(kernel) == state(*range(2, 9))


def test_many_errors_are_counted() -> None:
    """Of many refusals some are told and the others counted."""
    kernel = FakeLinks(refuse=lambda change: isinstance(change.obj, Neigh))
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(state(*range(2, 2 + SHOWN_ERRORS + 5)))
    errors = reconciler.sync().errors
    assert (len(errors), errors[-1]) == (SHOWN_ERRORS + 1, "and 5 more links, routes or neighbours")


def test_overflow_is_drift() -> None:
    """Lost events mean looking again, and nothing is written if nothing changed."""
    kernel = FakeLinks()
    reconciler = synced(kernel, state(2))
    kernel.overflow()
    assert (reconciler.drifted(), reconciler.sync().changed, reconciler.dirty) == (True, 0, False)


def test_uplink_going_down_is_drift() -> None:
    """A link that ours rely on going down means looking again: its routes vanish without a word."""
    kernel = FakeLinks()
    reconciler = synced(kernel, LinkState.of([Route(Prefix.parse("10.244.2.0/24"), ip_address("192.168.1.2"), "eth0")]))
    kernel.put(Link("eth0", 1500, "", None, alias=""))
    assert not reconciler.drifted()
    kernel.put(Link("eth0", 1500, "", None, alias="", up=False))
    assert reconciler.drifted()


def test_kernel_that_does_not_answer() -> None:
    """If observing fails it is told, and everything stays dirty until it works."""
    kernel = FakeLinks()
    kernel.broken = True
    reconciler = LinkReconciler(kernel)
    reconciler.set_desired(state(2))
    assert reconciler.sync().errors == ("dump links: broken",)
    assert reconciler.dirty
    kernel.broken = False
    assert reconciler.sync().ok


def test_cleanup() -> None:
    """Cleanup removes all of ours, and what is desired comes back with the next sync."""
    kernel = FakeLinks()
    reconciler = synced(kernel, state(2))
    assert reconciler.cleanup().ok
    assert held(kernel) == LinkState()
    assert reconciler.sync().ok
    assert held(kernel) == state(2)


def test_diff_is_empty_for_equal_states() -> None:
    """Nothing is to be done where nothing differs."""
    assert diff_links(state(2, 3), state(3, 2)) == ()
