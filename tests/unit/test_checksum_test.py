"""The background test of checksums: whom it asks, what follows from a verdict, and that a link set by others stays so."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from queue import SimpleQueue

import pytest
from overlay_worlds import DIRECT, DUAL, FAR, HOST_GW, N1, N2, UPLINK, VXLAN, compile_nodes, snapshot

from kernelstate.diff_links import diff_links
from kernelstate.fake_links import FakeLinks
from kernelstate.linux.offload_probe import End, Verdict
from kernelstate.objects.links import LinkState
from kernelstate.reconcile_links import LinkReconciler
from nodeplane import checksum_test
from nodeplane.checksum_test import ChecksumTest, Task, tasks_of
from overlay.lease import derived_mac
from overlay.render.checksums import set_checksums
from overlay.render.hostgw import render_hostgw
from overlay.render.vxlan import render_vxlan

OWN = End("02:00:00:00:00:01", ip_address("10.244.1.0"))
A, B = (End(f"02:00:00:00:00:0{i}", ip_address(f"10.244.{i}.0")) for i in (2, 3))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum_test, "FIRST", 0.001)


@contextmanager
def asking(verdicts: dict[End, list[Verdict]], *, left: bool = True) -> Iterator[tuple[ChecksumTest, SimpleQueue]]:
    """Run a test whose peers answer from lists, the last answer again and again; the queue tells who was asked."""
    asked: SimpleQueue = SimpleQueue()

    def ask(_link: str, _own: End, peer: End) -> Verdict:
        asked.put(peer)
        answers = verdicts[peer]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    test = ChecksumTest(["flannel.1"], ask, lambda _link: left)
    try:
        yield test, asked
    finally:
        test.stop()


def test_bad_is_told_once() -> None:
    """One bad verdict makes the link unfit, wakes the agent, and ends the asking."""
    with asking({A: ["bad"]}) as (test, asked):
        test.take({"flannel.1": Task(OWN, (A,))})
        assert select.select([test], [], [], 5)[0]
        assert (test.drain(), test.drain(), test.unfit) == (True, False, {"flannel.1"})
        assert (asked.get(timeout=5), asked.empty()) == (A, True)


def test_silence_is_asked_again_elsewhere() -> None:
    """A peer that does not answer proves nothing: the next is asked, and all of them later again."""
    with asking({A: ["unknown"], B: ["unknown", "unknown", "bad"]}) as (test, asked):
        test.take({"flannel.1": Task(OWN, (A, B))})
        assert select.select([test], [], [], 5)[0]
        assert [asked.get(timeout=5) for _ in range(6)] == [A, B, A, B, A, B]
        assert test.unfit == {"flannel.1"}


def test_good_ends_it() -> None:
    """After a good verdict nobody is asked, not even when other peers come."""
    with asking({A: ["good"], B: ["bad"]}) as (test, asked):
        test.take({"flannel.1": Task(OWN, (A,))})
        assert asked.get(timeout=5) == A
        test.take({"flannel.1": Task(OWN, (B,))})
        assert not select.select([test], [], [], 0.05)[0]
        assert (asked.empty(), test.unfit) == (True, frozenset())


def test_what_somebody_turned_off_stays_off() -> None:
    """A link whose checksums are finished already, by an earlier agent or by hand, is left so, and nobody is asked."""
    with asking({A: ["good"]}, left=False) as (test, asked):
        test.take({"flannel.1": Task(OWN, (A,))})
        assert (test.unfit, asked.empty()) == ({"flannel.1"}, True)


def test_who_can_be_asked() -> None:
    """Peers behind the tunnel are asked at their ends' addresses, family by family; direct routes have no tunnel to test."""
    nodes = snapshot(N1, N2, FAR)
    own, near, far = (End(derived_mac(f"n{i}", 1, 4), ip_address(f"10.244.{i}.0")) for i in (1, 2, 3))
    assert tasks_of(compile_nodes(nodes, "n1", VXLAN, UPLINK)) == {"flannel.1": Task(own, (near, far))}
    assert tasks_of(compile_nodes(nodes, "n1", DIRECT, UPLINK)) == {"flannel.1": Task(own, (far,))}
    assert tasks_of(compile_nodes(nodes, "n1", HOST_GW, UPLINK)) == {}
    assert set(tasks_of(compile_nodes(nodes, "n1", DUAL, UPLINK))) == {"flannel.1", "flannel-v6.1"}


def test_option() -> None:
    """On and off are for every tunnel; auto says nothing but of links that are unfit; what is no tunnel is left alone."""
    state = render_vxlan(compile_nodes(snapshot(N1, N2), "n1", DUAL, UPLINK))
    seen = {
        (stated, unfit): [link.tx_checksum for link in set_checksums(state, stated, [unfit]).links]  # type: ignore[arg-type]
        for stated in ("on", "off", "auto")
        for unfit in ("", "flannel.1")
    }
    assert [link.name for link in state.links] == ["flannel-v6.1", "flannel.1"]
    assert seen == {
        ("on", ""): [True, True],
        ("on", "flannel.1"): [True, True],
        ("off", ""): [False, False],
        ("off", "flannel.1"): [False, False],
        ("auto", ""): [None, None],
        ("auto", "flannel.1"): [None, False],
    }
    direct = render_hostgw(compile_nodes(snapshot(N1, N2), "n1", HOST_GW, UPLINK))
    assert set_checksums(direct, "off", []) == direct


def test_reconciled_like_everything_else() -> None:
    """Turned off in place, again when somebody turns it on or deletes the link, and not looked at where nothing is said."""
    as_it_is = render_vxlan(compile_nodes(snapshot(N1, N2), "n1", VXLAN, UPLINK))
    off = set_checksums(as_it_is, "off", [])
    kernel = FakeLinks()
    reconciler = LinkReconciler(kernel)

    def synced(state: LinkState) -> bool | None:
        reconciler.set_desired(state)
        reconciler.drifted()
        assert reconciler.sync().ok
        assert not reconciler.dirty
        return kernel.tx_checksum("flannel.1")

    assert synced(as_it_is) is True
    kernel.applied.clear()
    assert synced(off) is False
    assert [change.verb for change in kernel.applied] == ["set"]
    (link,) = off.links
    kernel.checksums["flannel.1"] = True
    kernel.put(as_it_is.links[0])
    assert reconciler.drifted()
    assert synced(off) is False
    kernel.take(as_it_is.links[0])
    assert synced(off) is False
    kernel.checksums["flannel.1"] = True
    kernel.put(as_it_is.links[0])
    assert synced(as_it_is) is True
    assert diff_links(off, off) == ()
    assert link.tx_checksum is False
