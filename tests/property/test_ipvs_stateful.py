"""Whatever happens in whatever order, IPVS ends up as desired, and messages are in proportion to what changed."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kernelstate.diff_ipvs import IpvsOwnership
from kernelstate.fake_ipvs import FakeIpvs
from kernelstate.objects.address import Prefix
from kernelstate.objects.ipvs import RealServer, ServerKey, VirtualServer
from kernelstate.reconcile_ipvs import DRAIN_LOOK, IpvsReconciler

KEYS = [ServerKey(f, p, n, 80) for f in (4, 6) for p in ("tcp", "udp") for n in (1, 2)] + [ServerKey(4, "tcp", 9, 30001)]
FOREIGN = ServerKey(4, "tcp", 77, 80)
FOREIGN_SERVER = VirtualServer("wlc", (RealServer(5, 5),))
ADDRESSES = frozenset(Prefix(f, n, 32 if f == 4 else 128) for f in (4, 6) for n in (1, 2))
OWNERSHIP = IpvsOwnership(frozenset({Prefix(4, 9, 32)}))

keys = st.sampled_from(KEYS)
reals = st.tuples(st.integers(1, 4), st.just(8080))
real_servers = st.sets(reals, max_size=4).map(lambda found: tuple(RealServer(*real) for real in sorted(found)))
servers = st.builds(VirtualServer, st.sampled_from(["rr", "mh"]), real_servers, st.sampled_from([0, 60]))


class Ipvs(RuleBasedStateMachine):
    """Random desired states, refusals, connections and interference over the fake kernel."""

    def __init__(self):
        super().__init__()
        self.bad = set()
        self.now = 0.0
        self.port = FakeIpvs(refuse=lambda change: change.key in self.bad)
        self.desired = {}
        self.changed = set()
        self.make()

    def make(self):
        self.reconciler = IpvsReconciler(self.port, lambda: ADDRESSES, clock=lambda: self.now)
        self.reconciler.set_desired(self.desired, None, OWNERSHIP)

    @initialize()
    def foreign_server(self):
        """Somebody else is here already."""
        self.port.put(FOREIGN, FOREIGN_SERVER)

    # -- desired changes ---------------------------------------------------------------------------------------------

    @rule(key=keys, server=servers)
    def want(self, key, server):
        """Want a virtual server, or want it otherwise."""
        self.desired[key] = server
        self.changed.add(key)

    @rule(key=keys)
    def drop(self, key):
        """Stop wanting one."""
        self.desired.pop(key, None)
        self.changed.add(key)

    # -- the world ---------------------------------------------------------------------------------------------------

    @rule(key=keys, real=reals, count=st.integers(0, 2))
    def connections(self, key, real, count):
        """Let clients come and go."""
        self.port.connections[key, real] = count

    @rule(seconds=st.sampled_from([1.0, DRAIN_LOOK, 100.0]))
    def time_passes(self, seconds):
        """Let time pass."""
        self.now += seconds

    @rule()
    def somebody_clears(self):
        """Do ``ipvsadm -C``, except for the foreign server."""
        for key in KEYS:
            self.port.take(key)

    @rule(key=keys)
    def somebody_deletes(self, key):
        """Delete one."""
        self.port.take(key)

    @rule(key=keys, server=servers)
    def somebody_makes(self, key, server):
        """Make or change one."""
        self.port.put(key, server)

    @rule(key=keys, real=reals, weight=st.integers(0, 2))
    def somebody_sets(self, key, real, weight):
        """Add or change one real server."""
        if key in self.port.shapes:
            self.port.reals[key][real] = weight

    @rule(key=keys)
    def kernel_dislikes(self, key):
        """Let the kernel refuse every change of one server."""
        self.bad.add(key)

    @rule(silent=st.booleans())
    def kernel_is_silent(self, silent):
        """Let the kernel answer nothing at all, or again."""
        self.port.broken = silent

    @rule()
    def restart(self):
        """Start over with the same desired state and no memory."""
        self.make()

    # -- us ----------------------------------------------------------------------------------------------------------

    def hand_over(self):
        self.reconciler.set_desired(self.desired, self.changed)
        self.changed = set()

    @rule()
    def sync(self):
        """Sync once; what can be written is, as far as memory was right, and what was refused stays dirty."""
        self.hand_over()
        report = self.reconciler.sync()
        assert report.ok == (not self.reconciler.dirty)
        assert not (self.port.broken and self.port.applied and report.changed)

    @rule()
    def notice(self):
        """Let the reconciler look whether anything drifted."""
        self.reconciler.drifted()

    @rule()
    def converge(self):
        """With nothing in the way, a full look brings everything to the desired state, and after it nothing is written."""
        self.settle()
        applied, looks = len(self.port.applied), self.port.looks
        assert self.reconciler.sync().changed == 0
        assert (len(self.port.applied), self.port.looks) == (applied, looks)
        assert not self.reconciler.drifted()

    def settle(self):
        self.bad.clear()
        self.port.broken = False
        self.hand_over()
        self.reconciler.forget()
        self.reconciler.drifted()
        assert self.reconciler.sync().errors == ()
        self.assert_as_desired()

    @rule()
    def drained(self):
        """Once every client is gone and time has passed, no real server is left that is not wanted."""
        self.settle()
        self.port.connections.clear()
        self.now += 1000.0
        due = self.reconciler.draining > 0
        assert self.reconciler.drifted() == due
        self.reconciler.sync()
        assert self.reconciler.draining == 0
        quiet = self.port.state(quiet=True)
        assert {key: server for key, server in quiet.items() if key != FOREIGN} == self.desired

    @rule(key=keys, server=servers)
    def one_change_after_convergence(self, key, server):
        """After convergence one server's change asks nothing and writes to that server only, no more than it differs by."""
        self.settle()
        before = self.desired.get(key)
        self.want(key, server)
        self.hand_over()
        self.port.applied.clear()
        looks = self.port.looks
        self.reconciler._next_look = float("inf")
        assert self.reconciler.sync().ok
        assert self.port.looks == looks
        assert {change.key for change in self.port.applied} <= {key}
        old = set(before.real_servers) if before else set()
        shape = before is None or (before.scheduler, before.timeout) != (server.scheduler, server.timeout)
        assert len(self.port.applied) == shape + len(old ^ set(server.real_servers))
        self.assert_as_desired()

    def assert_as_desired(self):
        """Check that clients meet just what is desired: real servers of weight 0 get none."""
        assert {key: server for key, server in self.port.state().items() if key != FOREIGN} == self.desired

    @invariant()
    def foreign_server_is_left_alone(self):
        """Check that what somebody else made on an address of their own is as they made it."""
        assert self.port.state().get(FOREIGN, FOREIGN_SERVER) == FOREIGN_SERVER


TestIpvs = Ipvs.TestCase
TestIpvs.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
