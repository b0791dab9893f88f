"""The forwarder's reconciler: one process, its table as desired, and no more said to it than necessary."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kernelstate.fake_forwarder import FakeForwarder
from kernelstate.objects.address import Prefix
from kernelstate.objects.tunnel import TunnelPeer, UdpTunnel
from kernelstate.reconcile_forwarder import ForwarderReconciler, PeerChange, diff_peers


def peer(i: int, host: int = 0) -> TunnelPeer:
    return TunnelPeer(Prefix.parse(f"10.244.{i}.0/24"), ip_address(f"192.168.1.{host or i}"))


def tunnel(*peers: TunnelPeer, port: int = 8285) -> UdpTunnel:
    return UdpTunnel("flannel0", "eth0", port, (ip_address("192.168.1.1"),), tuple(sorted(peers)))


def running(*peers: TunnelPeer) -> tuple[FakeForwarder, ForwarderReconciler]:
    port = FakeForwarder()
    reconciler = ForwarderReconciler(port)
    reconciler.set_desired(tunnel(*peers))
    assert reconciler.dirty
    assert reconciler.sync().ok
    return port, reconciler


def test_a_new_process_gets_the_whole_table_at_once() -> None:
    """A process that just started has no peers for no moment longer than it takes to exchange its table."""
    port, reconciler = running(peer(2), peer(3))
    assert (port.starts, port.whole_tables, port.peers()) == (1, 1, (peer(2), peer(3)))
    assert not reconciler.dirty
    assert reconciler.sync().changed == 0


def test_a_change_is_as_small_as_it_is() -> None:
    """One peer that comes, moves or goes is one line to the process, and the process stays."""
    port, reconciler = running(peer(2), peer(3))
    for wanted in (tunnel(peer(2), peer(3), peer(4)), tunnel(peer(2), peer(3, 33), peer(4)), tunnel(peer(3, 33), peer(4))):
        before = port.written
        reconciler.set_desired(wanted)
        assert reconciler.sync().changed == 1
        assert (port.written, port.peers()) == (before + 1, wanted.peers)
    assert (port.starts, port.replaced, port.whole_tables) == (1, 0, 1)


def test_a_restarted_agent_keeps_the_process() -> None:
    """An agent that starts anew finds the process and its table, and writes only what changed meanwhile."""
    port, _ = running(peer(2), peer(3))
    written = port.written
    again = ForwarderReconciler(port)
    again.set_desired(tunnel(peer(2), peer(4)))
    assert again.sync().ok
    assert (port.starts, port.replaced, port.written) == (1, 0, written + 2)
    assert port.peers() == (peer(2), peer(4))


def test_killed_is_noticed_and_repaired() -> None:
    """A process that ended is drift; the next one gets the whole table."""
    port, reconciler = running(peer(2))
    assert not reconciler.drifted()
    port.kill()
    assert reconciler.drifted()
    assert reconciler.sync().ok
    assert (port.starts, port.whole_tables, port.peers()) == (2, 2, (peer(2),))


def test_another_program_takes_over_with_the_table() -> None:
    """A new program replaces the process when it is next looked at; its table goes along, and nothing is written."""
    port, reconciler = running(peer(2), peer(3))
    written = port.written
    port.program = "2"
    assert reconciler.sync().changed == 0
    reconciler.forget()
    assert reconciler.sync().changed == 1
    assert (port.starts, port.replaced, port.written) == (1, 1, written)


def test_another_port_is_another_process() -> None:
    """What listens on another port or address is started anew, with the whole table."""
    port, reconciler = running(peer(2), peer(3))
    reconciler.set_desired(tunnel(peer(2), peer(4), port=9000))
    assert reconciler.sync().ok
    assert (port.starts, port.replaced, port.whole_tables, port.peers()) == (2, 0, 2, (peer(2), peer(4)))


def test_one_refused_peer_stops_no_other() -> None:
    """A peer that is refused is told and tried again; the others are written."""
    port, reconciler = running(peer(2))
    port.refuse = lambda change: change.peer == peer(3)
    reconciler.set_desired(tunnel(peer(2), peer(3), peer(4)))
    report = reconciler.sync()
    assert report.errors == ("peer 10.244.3.0/24 192.168.1.3: refused by the test",)
    assert (report.changed, reconciler.dirty, port.peers()) == (1, True, (peer(2), peer(4)))
    port.refuse = lambda _change: False
    assert reconciler.sync().ok
    assert (reconciler.dirty, port.peers()) == (False, (peer(2), peer(3), peer(4)))


def test_what_cannot_start_is_told() -> None:
    """A process that does not start is an error of the sync, and stays due."""
    port = FakeForwarder()
    port.spoiled = True
    reconciler = ForwarderReconciler(port)
    reconciler.set_desired(tunnel(peer(2)))
    assert reconciler.sync().errors == ("start forwarder: spoiled by the test",)
    assert reconciler.dirty


def test_unmanaged_and_cleanup() -> None:
    """Without a tunnel to keep nothing is started or stopped; cleanup ends the process whatever is desired."""
    port = FakeForwarder()
    reconciler = ForwarderReconciler(port)
    assert (reconciler.drifted(), reconciler.dirty, reconciler.sync().changed, port.starts) == (False, False, 0, 0)
    port, reconciler = running(peer(2))
    assert (reconciler.cleanup().changed, port.process) == (1, None)
    assert reconciler.cleanup().changed == 0


def test_diff_of_tables() -> None:
    """What is new or elsewhere comes before what goes."""
    assert diff_peers([peer(2), peer(3, 9), peer(5)], [peer(2), peer(3), peer(4)]) == [
        PeerChange(gone=False, peer=peer(3, 9)),
        PeerChange(gone=False, peer=peer(5)),
        PeerChange(gone=True, peer=peer(4)),
    ]


TABLES = st.dictionaries(st.integers(2, 7), st.integers(2, 9)).map(lambda d: tuple(peer(i, h) for i, h in d.items()))


class Forwarding(RuleBasedStateMachine):
    """Changes, kills, upgrades, failures and restarts of the agent, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.port = FakeForwarder()
        self.want = tunnel()
        self.restart()

    @rule(peers=TABLES, port=st.sampled_from((8285, 9000)))
    def change(self, peers: tuple[TunnelPeer, ...], port: int) -> None:
        """Want something else."""
        self.want = tunnel(*peers, port=port)
        self.reconciler.set_desired(self.want)

    @rule()
    def sync(self) -> None:
        """Sync as the agent does."""
        self.reconciler.sync()

    @rule()
    def kill(self) -> None:
        """Kill the process."""
        self.port.kill()

    @rule(program=st.sampled_from("12"))
    def upgrade(self, program: str) -> None:
        """Install another program; the agent sees it when it next looks."""
        self.port.program = program

    @rule(peers=TABLES)
    @precondition(lambda self: self.port.process is not None)
    def somebody_writes(self, peers: tuple[TunnelPeer, ...]) -> None:
        """Somebody else fills the table; the agent's full comparison follows."""
        self.port.replace(peers)
        self.reconciler.forget()

    @rule(number=st.integers(0, 2))
    def fail(self, number: int) -> None:
        """Sync while every third line is refused."""
        self.port.refuse = lambda change: (change.peer.prefix.network >> 8 & 255) % 3 == number
        self.reconciler.sync()
        self.port.refuse = lambda _change: False

    @rule()
    def spoil(self) -> None:
        """Sync while nothing works."""
        self.port.spoiled = True
        self.reconciler.sync()
        self.port.spoiled = False

    @rule()
    def restart(self) -> None:
        """Start the agent anew, knowing nothing."""
        self.reconciler = ForwarderReconciler(self.port)
        self.reconciler.set_desired(self.want)

    def teardown(self) -> None:
        """One more round, and one process runs with exactly the table that is desired."""
        self.reconciler.drifted()
        self.reconciler.sync()
        assert self.port.process is not None
        assert self.port.peers() == self.want.peers
        assert self.port.process.arguments == msgspec.structs.replace(self.want, peers=(), uplink="")
        assert (self.reconciler.dirty, self.reconciler.drifted(), self.reconciler.sync().changed) == (False, False, 0)


TestForwarding = Forwarding.TestCase
TestForwarding.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
