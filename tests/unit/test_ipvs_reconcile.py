"""Reconciling IPVS over a kernel in memory: what is written, what is looked at, and how real servers go."""

import msgspec
import pytest

from kernelstate.diff_ipvs import IpvsOwnership
from kernelstate.fake_ipvs import FakeIpvs
from kernelstate.objects.address import Prefix
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.reconcile_ipvs import DRAIN_LOOK, SAMPLE, SHOWN_ERRORS, IpvsReconciler

WEB = ServerKey(4, "tcp", 0x0A600001, 443)
DNS = ServerKey(4, "udp", 0x0A60000A, 53)
WEB6 = ServerKey(6, "tcp", 0xFD96 << 112, 443)
NODE_PORT = ServerKey(4, "tcp", 0xC0A80101, 30443)
A, B, C = (RealServer(0x0AF40100 + n, 8080) for n in (1, 2, 3))
STATE = {
    WEB: VirtualServer("rr", (A, B)),
    DNS: VirtualServer("rr", (A, B)),
    WEB6: VirtualServer("rr", (A,)),
    NODE_PORT: VirtualServer("rr", (A, B)),
}
OWNERSHIP = IpvsOwnership(frozenset({Prefix.parse("192.168.1.1")}), excluded=(Prefix.parse("10.99.0.0/16"),))
SERVICE_ADDRESSES = frozenset(map(Prefix.parse, ("10.96.0.1", "10.96.0.10", "fd96::", "10.99.0.1")))


class Clock:
    """Time that stands still until it is moved."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def port():
    return FakeIpvs()


def make(port, clock=None, state=STATE, **options):
    """Make a reconciler that wants ``state``, synced."""
    reconciler = IpvsReconciler(port, lambda: SERVICE_ADDRESSES, clock=clock or Clock(), **options)
    reconciler.set_desired(dict(state), None, OWNERSHIP)
    assert reconciler.sync().errors == ()
    port.applied.clear()
    return reconciler


def want(reconciler, key, server):
    """Change one server of the desired state."""
    state = reconciler._desired
    state.pop(key, None)
    if server is not None:
        state[key] = server
    reconciler.set_desired(state, [key])


def texts(port):
    return [str(change) for change in port.applied]


def test_first_sync_makes_everything(port):
    """An empty kernel gets each virtual server with what is behind it, and then nothing more."""
    reconciler = make(port)
    assert port.state() == STATE
    assert not reconciler.dirty
    assert not reconciler.drifted()
    looks = port.looks
    assert reconciler.sync().changed == 0
    assert (port.applied, port.looks) == ([], looks)


def test_restart_writes_nothing(port):
    """Whoever starts over finds everything right and writes nothing."""
    make(port)
    make(port)
    assert port.applied == []


def test_a_change_costs_its_own_size(port):
    """One real server more is one message, and nothing is looked at."""
    reconciler = make(port)
    looks = port.looks
    want(reconciler, WEB, VirtualServer("rr", (A, B, C)))
    assert reconciler.sync().changed == 1
    assert texts(port) == ["add real server 10.244.1.3:8080 of virtual server tcp 10.96.0.1:443"]
    assert port.looks == looks


def test_scheduler_is_set_in_place(port):
    """Another scheduler or persistence leaves the virtual server and its connections where they are."""
    reconciler = make(port)
    want(reconciler, WEB, VirtualServer("mh", (A, B), 600, by_port=True))
    reconciler.sync()
    assert texts(port) == ["set virtual server tcp 10.96.0.1:443"]
    assert port.state()[WEB] == VirtualServer("mh", (A, B), 600, by_port=True)


def test_tcp_real_server_drains(port, clock):
    """A TCP real server that goes gets weight 0 first, stays while it has a connection, and goes when it has none."""
    reconciler = make(port, clock)
    port.connections[WEB, A[:2]] = 1
    want(reconciler, WEB, VirtualServer("rr", (B,)))
    reconciler.sync()
    assert texts(port) == ["set real server 10.244.1.1:8080 of virtual server tcp 10.96.0.1:443"]
    assert port.reals[WEB] == {A[:2]: 0, B[:2]: 1}
    assert (reconciler.dirty, reconciler.draining) == (False, 1)
    clock.now += DRAIN_LOOK
    assert reconciler.drifted()
    assert reconciler.sync().changed == 0
    assert not reconciler.drifted()
    port.connections.clear()
    clock.now += DRAIN_LOOK
    assert reconciler.drifted()
    assert reconciler.sync().changed == 1
    assert port.reals[WEB] == {B[:2]: 1}
    assert reconciler.draining == 0
    clock.now += DRAIN_LOOK
    assert not reconciler.drifted()


def test_only_what_drains_is_looked_at(port, clock):
    """A look at what drains asks for the real servers of its own virtual server and no other."""
    reconciler = make(port, clock)
    want(reconciler, WEB, VirtualServer("rr", (B,)))
    reconciler.sync()
    looks = port.looks
    clock.now += DRAIN_LOOK
    reconciler.sync()
    assert port.looks == looks + 1


def test_udp_real_server_goes_at_once(port):
    """UDP clients never say goodbye: their real server is deleted, not drained."""
    reconciler = make(port)
    want(reconciler, DNS, VirtualServer("rr", (B,)))
    reconciler.sync()
    assert texts(port) == ["delete real server 10.244.1.1:8080 of virtual server udp 10.96.0.10:53"]


def test_comes_back_with_its_connections(port, clock):
    """A real server that is wanted again while it drains gets its weight back, is not made anew and stays for good."""
    reconciler = make(port, clock)
    want(reconciler, WEB, VirtualServer("rr", (B,)))
    reconciler.sync()
    port.applied.clear()
    want(reconciler, WEB, VirtualServer("rr", (A, B)))
    reconciler.sync()
    assert texts(port) == ["set real server 10.244.1.1:8080 of virtual server tcp 10.96.0.1:443"]
    clock.now += DRAIN_LOOK
    assert not reconciler.drifted()
    assert port.state() == STATE


def test_others_are_there_before_one_goes(port):
    """When every real server is replaced, the new one is added before the old ones are quiet."""
    reconciler = make(port)
    want(reconciler, WEB, VirtualServer("rr", (C,)))
    reconciler.sync()
    assert [change.verb for change in port.applied] == ["add real", "set real", "set real"]
    assert port.state()[WEB].real_servers == (C,)


def test_virtual_server_goes_at_once(port, clock):
    """A virtual server that goes takes its real servers with it, draining or not, after everything else is written."""
    reconciler = make(port, clock)
    want(reconciler, WEB, VirtualServer("rr", (B,)))
    reconciler.sync()
    port.applied.clear()
    want(reconciler, WEB, None)
    want(reconciler, WEB6, VirtualServer("rr", (A, B)))
    reconciler.sync()
    assert [change.verb for change in port.applied] == ["add real", "delete server"]
    assert WEB not in port.shapes
    assert reconciler.draining == 0


def test_draining_goes_on_after_a_restart(port, clock):
    """A real server of weight 0 that nobody wants is taken for one that drains: it is neither revived nor cut off."""
    before = make(port, clock)
    port.connections[WEB, A[:2]] = 1
    want(before, WEB, VirtualServer("rr", (B,)))
    before.sync()
    reconciler = make(port, clock, {**STATE, WEB: VirtualServer("rr", (B,))})
    assert port.reals[WEB] == {A[:2]: 0, B[:2]: 1}
    port.connections.clear()
    clock.now += DRAIN_LOOK
    assert reconciler.drifted()
    reconciler.sync()
    assert port.reals[WEB] == {B[:2]: 1}


@pytest.mark.parametrize(("seconds", "after"), [(None, {A[:2]: 0, B[:2]: 1}), (60, {B[:2]: 1})])
def test_drain_is_bounded(port, clock, seconds, after):
    """With a bound, a real server goes when it is over, connections or not; without one it keeps them."""
    reconciler = make(port, clock, drain_seconds=seconds)
    port.connections[WEB, A[:2]] = 1
    want(reconciler, WEB, VirtualServer("rr", (B,)))
    reconciler.sync()
    clock.now += 59
    reconciler.sync()
    assert port.reals[WEB] == {A[:2]: 0, B[:2]: 1}
    clock.now += DRAIN_LOOK
    reconciler.sync()
    assert port.reals[WEB] == after


def test_no_drain_at_all(port):
    """With a bound of 0 a TCP real server is deleted at once."""
    reconciler = make(port, drain_seconds=0)
    want(reconciler, WEB, VirtualServer("rr", (B,)))
    reconciler.sync()
    assert texts(port) == ["delete real server 10.244.1.1:8080 of virtual server tcp 10.96.0.1:443"]


OURS = {
    "on our link": (ServerKey(4, "sctp", 0x0A600001, 9), True),
    "on our link, of IPv6": (ServerKey(6, "udp", 0xFD96 << 112, 1), True),
    "node port": (ServerKey(4, "tcp", 0xC0A80101, 32767), True),
    "below node ports": (ServerKey(4, "tcp", 0xC0A80101, 29999), False),
    "port of another node": (ServerKey(4, "tcp", 0xC0A80102, 30000), False),
    "elsewhere": (ServerKey(4, "tcp", 0x0A600002, 443), False),
    "excluded, though on our link": (ServerKey(4, "tcp", 0x0A630001, 443), False),
}


@pytest.mark.parametrize(("key", "ours"), OURS.values(), ids=OURS)
def test_what_is_ours_at_the_start(port, key, ours):
    """What an earlier run left goes; what somebody else made stays, also in cleanup."""
    port.put(key, VirtualServer("wlc", (A,)))
    reconciler = make(port)
    assert (key in port.shapes) != ours
    assert reconciler.cleanup().errors == ()
    assert set(port.shapes) == set() if ours else {key}


@pytest.mark.parametrize("key", [WEB, WEB6, DNS])
def test_missing_server_is_noticed(port, key):
    """A virtual server that somebody deletes is noticed: by the count, or, for IPv6, when its turn comes."""
    reconciler = make(port)
    port.take(key)
    assert reconciler.drifted()
    assert reconciler.sync().errors == ()
    assert port.state() == STATE


def test_other_changes_are_noticed_in_turn(port):
    """A changed weight, scheduler or real server anywhere is noticed after as many looks as it takes to see them all."""
    many = {ServerKey(4, "tcp", 0x0A600000 + n, 80): VirtualServer("rr", (A, B)) for n in range(5 * SAMPLE)}
    reconciler = make(port, state=many)
    keys = sorted(many)
    port.put(keys[3], VirtualServer("rr", (A, RealServer(*B[:2], 9))))
    port.put(keys[17], VirtualServer("lc", (A, B)))
    port.put(keys[38], VirtualServer("rr", (B, C)))
    for _ in range(2 * 5):
        if reconciler.drifted():
            looks = port.looks
            assert reconciler.sync().errors == ()
            assert port.looks - looks <= 1 + SAMPLE  # only what was found to differ is looked up
    assert port.state() == many


def test_forget_sees_everything(port):
    """After ``forget`` the next sync repairs what no cheap check has met yet."""
    reconciler = make(port)
    port.put(WEB, VirtualServer("wrr", (C,)))
    reconciler.forget()
    assert reconciler.dirty
    reconciler.sync()
    assert port.state() == STATE


def test_refused_server_stands_alone(port):
    """What the kernel refuses is told and stays dirty; the rest is written, and it is tried again by the next sync."""
    port.refuse = lambda change: change.key == DNS and change.verb == "add server"
    reconciler = IpvsReconciler(port, clock=Clock())
    reconciler.set_desired(STATE)
    report = reconciler.sync()
    assert report.errors == ("add virtual server udp 10.96.0.10:53: refused by the test",)
    assert port.state() == {key: server for key, server in STATE.items() if key != DNS}
    assert reconciler.dirty
    port.refuse = lambda _change: False
    assert reconciler.sync().ok
    assert port.state() == STATE
    assert not reconciler.dirty


def test_many_refusals_are_counted(port):
    """Refusals beyond the first few are told as a number."""
    port.refuse = lambda change: change.verb == "add server"
    reconciler = IpvsReconciler(port, clock=Clock())
    reconciler.set_desired({ServerKey(4, "tcp", n, 80): VirtualServer("rr", ()) for n in range(SHOWN_ERRORS + 3)})
    report = reconciler.sync()
    assert len(report.errors) == SHOWN_ERRORS + 1
    assert report.errors[-1] == "and 3 more virtual servers"


def test_wrong_memory_is_corrected_in_the_same_sync(port):
    """A real server that is there already, or gone already, is looked up and put right without a failure."""
    reconciler = make(port)
    port.reals[WEB][C[:2]] = 5
    del port.reals[WEB][B[:2]]
    want(reconciler, WEB, VirtualServer("rr", (A, RealServer(*B[:2], 3), C)))
    assert reconciler.sync().ok
    assert port.state()[WEB].real_servers == (A, RealServer(*B[:2], 3), C)


def test_silence_of_the_kernel_is_survived(port):
    """When the kernel does not answer, that is told, everything stays dirty, and later all is looked at again."""
    reconciler = make(port)
    port.broken = True
    want(reconciler, WEB, None)
    assert reconciler.sync().errors == ("change IPVS: broken",)
    assert reconciler.dirty
    assert reconciler.drifted()
    port.broken = False
    assert reconciler.sync().ok
    assert port.state() == {key: server for key, server in STATE.items() if key != WEB}


def test_never_writes_before_it_is_told(port):
    """Without a desired state nothing is looked at or written."""
    port.put(WEB, msgspec.structs.replace(STATE[WEB]))
    reconciler = IpvsReconciler(port)
    assert (reconciler.dirty, reconciler.drifted(), reconciler.sync().changed, port.looks) == (False, False, 0, 0)
