"""The tunnel's programs and tables are kept as desired, over programs in memory."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from kernelstate.fake_tunnel import FakeTunnel
from kernelstate.linux import tunnel_maps as codec
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import Place, SourceGuard, TunnelPeer, TunnelState, UdpTunnel, Whose
from kernelstate.reconcile_tunnel import TunnelReconciler
from kernelstate.tunnel_tables import Tables, diff_tables, tables_of


def peer(i: int, address: str = "") -> TunnelPeer:
    return TunnelPeer(Prefix.parse(f"10.244.{i}.0/24"), ip_address(address or f"192.168.1.{i}"))


def udp(*peers: TunnelPeer, port: int = 8285) -> UdpTunnel:
    return UdpTunnel("flannel0", "eth0", port, (ip_address("192.168.1.1"),), peers)


def guard(*peers: TunnelPeer) -> SourceGuard:
    return SourceGuard("eth0", (Prefix.parse("10.244.1.0/24"),), (Prefix.parse("10.244.0.0/16"),), ((8472, 1),), peers)


def wanted(state: TunnelState) -> dict:
    parts = {"udp": state.udp, "guard": state.guard}
    return {kind: tables_of(part) for kind, part in parts.items() if part is not None}


def found(port: FakeTunnel) -> dict:
    return {kind: programs.observed.tables for kind, programs in port.programs.items()}


@pytest.fixture
def port() -> FakeTunnel:
    return FakeTunnel()


@pytest.fixture
def reconciler(port: FakeTunnel) -> TunnelReconciler:
    return TunnelReconciler(port)


def test_nothing_before_desired(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """Before anything is desired nothing is read or written, and nothing is amiss."""
    assert (reconciler.sync().changed, reconciler.dirty, reconciler.drifted()) == (0, False, False)
    assert (port.observed, port.installed) == ([], [])


def test_first_sync_installs(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """The first sync installs both kinds with their tables; the second does nothing."""
    state = TunnelState(udp(peer(2)), guard(peer(2)))
    reconciler.set_desired(state)
    assert reconciler.dirty
    assert reconciler.sync().ok
    assert found(port) == wanted(state)
    assert (reconciler.sync().changed, reconciler.dirty, port.installed) == (0, False, ["udp", "guard"])


def test_peer_changes_are_entries(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """Peers that join, move and leave cost their own entries, and no observation."""
    reconciler.set_desired(TunnelState(udp(peer(2), peer(3))))
    reconciler.sync()
    port.observed.clear()
    state = TunnelState(udp(peer(2, "192.168.1.22"), peer(4)))
    reconciler.set_desired(state)
    assert reconciler.sync().changed == 7
    assert found(port) == wanted(state)
    assert (port.installed, port.observed) == (["udp"], [])
    assert [str(change) for change in port.written] == [
        "write 192.168.1.4",
        "write 192.168.1.22",
        "write 10.244.2.0/24 192.168.1.22",
        "write 10.244.4.0/24 192.168.1.4",
        "forget 10.244.3.0/24 192.168.1.3",
        "forget 192.168.1.2",
        "forget 192.168.1.3",
    ]


def test_restart_touches_nothing(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """A restarted agent finds programs and tables as desired, and writes nothing."""
    state = TunnelState(udp(peer(2)), guard(peer(2)))
    reconciler.set_desired(state)
    reconciler.sync()
    later = FakeTunnel(port.programs)
    again = TunnelReconciler(later)
    again.set_desired(state)
    assert again.sync().changed == 0
    assert (later.installed, later.written, later.observed) == ([], [], ["udp", "guard"])


def test_restart_writes_the_difference(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """Peers that changed while no agent ran are written entry by entry: programs stay."""
    reconciler.set_desired(TunnelState(udp(peer(2), peer(3))))
    reconciler.sync()
    later = FakeTunnel(port.programs)
    again = TunnelReconciler(later)
    state = TunnelState(udp(peer(2), peer(5)))
    again.set_desired(state)
    assert (again.sync().changed, later.installed) == (4, [])
    assert found(later) == wanted(state)


def test_arguments_install(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """Another port sets the programs up anew."""
    reconciler.set_desired(TunnelState(udp(peer(2))))
    reconciler.sync()
    reconciler.set_desired(TunnelState(udp(peer(2), port=9000)))
    assert reconciler.sync().changed == 1
    assert port.installed == ["udp", "udp"]
    assert port.programs["udp"].arguments == udp(port=9000)


def test_undesired_goes(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """What an earlier agent left and is not desired any more is taken off."""
    reconciler.set_desired(TunnelState(udp(peer(2)), guard(peer(2))))
    reconciler.sync()
    again = TunnelReconciler(FakeTunnel(port.programs))
    again.set_desired(TunnelState(None, guard(peer(2))))
    assert again.sync().changed == 1
    assert list(port.programs) == ["guard"]


@pytest.mark.parametrize("deed", ["take_off", "forget_place"])
def test_repairs(port: FakeTunnel, reconciler: TunnelReconciler, deed: str) -> None:
    """Programs taken off and entries deleted by somebody else are noticed and come back."""
    state = TunnelState(udp(peer(2)), guard(peer(2)))
    reconciler.set_desired(state)
    reconciler.sync()
    assert not reconciler.drifted()
    getattr(port, deed)("udp", *([Prefix.parse("10.244.2.0/24")] if deed == "forget_place" else []))
    assert reconciler.drifted()
    assert reconciler.dirty
    assert reconciler.sync().changed == 1
    assert found(port) == wanted(state)
    assert not reconciler.drifted()
    assert port.installed.count("guard") == 1


def test_failure_is_its_own(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """Trouble with one kind is told and stays dirty; the other is brought; both are done when the trouble is over."""
    state = TunnelState(udp(peer(2)), guard(peer(2)))
    port.spoiled.add("udp")
    reconciler.set_desired(state)
    report = reconciler.sync()
    assert (report.changed, report.errors) == (1, ("observe udp: spoiled by the test",))
    assert (reconciler.dirty, reconciler.drifted()) == (True, True)
    port.spoiled.clear()
    assert reconciler.sync().changed == 1
    assert found(port) == wanted(state)


def test_cleanup(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """Cleanup takes everything off, whatever is desired, and says so of what it cannot."""
    reconciler.set_desired(TunnelState(udp(peer(2)), guard(peer(2))))
    reconciler.sync()
    assert reconciler.cleanup().changed == 2
    assert port.programs == {}
    port.spoiled.add("guard")
    assert reconciler.cleanup().errors == ("remove guard: spoiled by the test",)


def test_own_wins() -> None:
    """Of equal prefixes the node's own counts before a peer's, and a peer's before the pod network's."""
    part = guard(peer(1), TunnelPeer(Prefix.parse("10.244.0.0/16"), ip_address("192.168.1.9")))
    whose = {str(prefix): place.whose for prefix, place in tables_of(part).places.items()}
    assert whose == {"10.244.1.0/24": Whose.OWN, "10.244.0.0/16": Whose.PEER}


def test_random_changes_end_equal(port: FakeTunnel, reconciler: TunnelReconciler) -> None:
    """Any order of changes, meddling and failures ends in the desired tables, and never has a place without its node."""
    random_ = random.Random(7)
    for _ in range(300):
        peers = tuple(peer(i, f"192.168.1.{random_.randint(2, 6)}") for i in range(2, 9) if random_.random() < 0.6)
        state = TunnelState(
            udp(*peers) if random_.random() < 0.9 else None,
            guard(*peers) if random_.random() < 0.9 else None,
        )
        port.spoiled = {kind for kind in ("udp", "guard") if random_.random() < 0.1}
        if random_.random() < 0.2:
            port.take_off(random_.choice(("udp", "guard")))
        reconciler.set_desired(state)
        reconciler.sync()
        port.spoiled.clear()
        assert reconciler.sync().ok
        assert found(port) == wanted(state)


def test_maps_read_back() -> None:
    """Tables and settings of both families, packed as the programs have them, read back as they were."""
    v6 = TunnelPeer(Prefix.parse("fd00:244:0:2::/64"), ip_address("fd00:1::2"))
    tables = tables_of(
        SourceGuard("eth0", (Prefix.parse("10.244.1.0/24"),), (Prefix.parse("fd00:244::/48"),), (), (peer(2), v6))
    )
    places = codec.pack_places(tables.places.values())
    assert all((len(key), len(value)) == (20, 20) for key, value in places.items())
    assert codec.read_tables(places, map(codec.pack_address, tables.nodes)) == tables
    links = codec.UdpLinks(codec.Uplink(3, has_frames=True), 5, 7, finishes=False)
    local = (ip_address("192.168.1.1"), ip_address("fd00:1::1"))
    assert codec.read_udp(codec.pack_udp(bytes(8), UdpTunnel("", "", 8285, local, ()), links)) == (3, 5, 8285, local)
    assert codec.read_guard(codec.pack_guard(bytes(8), guard(), links.uplink)) == (3, ((8472, 1),))


def test_strange_entry_is_nobodys() -> None:
    """An entry that none of us wrote is read as a place that differs from every peer's, so it is replaced or goes."""
    key, value = next(
        iter(codec.pack_places([Place(Prefix.parse("10.244.2.0/24"), Whose.PEER, ip_address("192.168.1.2"))]).items())
    )
    strange = codec.read_tables({key: value[:16] + b"\xff\0\0\0"}, [])
    right = tables_of(udp(peer(2)))
    assert [str(change) for change in diff_tables(right, strange)] == ["write 192.168.1.2", "write 10.244.2.0/24 192.168.1.2"]
    assert [str(change) for change in diff_tables(Tables({}, frozenset()), strange)] == ["forget 10.244.2.0/24 network"]
