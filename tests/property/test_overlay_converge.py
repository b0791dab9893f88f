"""The link reconciler's state machine: whatever happens to the kernel, the desired state is there once it has settled."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kernelstate.fake_links import FakeLinks
from kernelstate.objects.address import Prefix
from kernelstate.objects.links import Address, FdbEntry, Link, LinkObject, LinkState, Neigh, Route, Vxlan
from kernelstate.reconcile_links import LinkReconciler

FOREIGN = Route(Prefix.parse("172.16.0.0/16"), ip_address("192.168.1.254"), "eth0", protocol=3)
PEERS = st.sets(st.integers(2, 6))


def desired(peers: set[int], vni: int) -> LinkState:
    """Return a tunnel with these peers; VNI 0 is host-gw: routes alone."""
    name, objects = f"flannel.{vni}", list[LinkObject]()
    if vni:
        objects += [
            Link(name, 1450, "02:00:00:00:00:01", Vxlan(vni, None, "eth0")),
            Address(name, ip_address("10.244.1.0"), 32),
        ]
    for i in peers:
        gateway, outer, mac = ip_address(f"10.244.{i}.0"), ip_address(f"192.168.1.{i}"), f"02:00:00:00:00:{i:02x}"
        if vni:
            objects += [Neigh(name, gateway, mac), FdbEntry(name, mac, outer)]
        objects.append(
            Route(Prefix.parse(f"{gateway}/24"), gateway if vni else outer, name if vni else "eth0", onlink=bool(vni))
        )
    return LinkState.of(objects)


class Links(RuleBasedStateMachine):
    """Changes of what is desired, interference, failures and restarts, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeLinks()
        self.kernel.put(FOREIGN)
        self.reconciler = LinkReconciler(self.kernel)
        self.want = LinkState()
        self.reconciler.set_desired(self.want)

    @rule(peers=PEERS, vni=st.integers(0, 2))
    def change(self, peers: set[int], vni: int) -> None:
        """Want something else."""
        self.want = desired(peers, vni)
        self.reconciler.set_desired(self.want)

    @rule()
    def sync(self) -> None:
        """Sync as the agent does."""
        self.reconciler.sync()

    @rule(data=st.data())
    def somebody_deletes(self, data: st.DataObject) -> None:
        """Somebody deletes one object of ours."""
        own = [o for o in self.kernel.objects.values() if o != FOREIGN and getattr(o, "name", "") != "eth0"]
        if own:
            self.kernel.take(data.draw(st.sampled_from(sorted(own, key=str))))

    @rule(data=st.data())
    def somebody_changes(self, data: st.DataObject) -> None:
        """Somebody sets a neighbour to another MAC, or to one that expires."""
        neighbours = sorted((o for o in self.kernel.objects.values() if isinstance(o, Neigh)), key=str)
        if neighbours:
            victim = data.draw(st.sampled_from(neighbours))
            self.kernel.put(Neigh(victim.link, victim.address, data.draw(st.sampled_from(("", "02:00:00:00:00:99")))))

    @rule(mac=st.sampled_from(("02:00:00:00:00:01", "02:00:00:00:00:98")), up=st.booleans())
    def somebody_sets_a_link(self, mac: str, up: bool) -> None:
        """Somebody changes a link of ours in place."""
        for link in [o for o in self.kernel.objects.values() if isinstance(o, Link) and o.kind]:
            self.kernel.put(msgspec.structs.replace(link, mac=mac, up=up, alias=""))

    @rule()
    def restart(self) -> None:
        """Start the agent anew, knowing nothing."""
        self.reconciler = LinkReconciler(self.kernel)
        self.reconciler.set_desired(self.want)

    @rule()
    def lose_events(self) -> None:
        """More happened than the event buffer held."""
        self.kernel.overflow()

    @rule(number=st.integers(0, 6))
    def fail(self, number: int) -> None:
        """Sync while every seventh change is refused."""
        seen: list[object] = []

        def refuse(change: object) -> bool:
            seen.append(change)
            return len(seen) % 7 == number

        self.kernel.refuse = refuse
        self.reconciler.sync()
        self.kernel.refuse = lambda _change: False

    @invariant()
    def others_are_left_alone(self) -> None:
        """Keep what is not ours where it is."""
        assert FOREIGN in self.kernel.objects.values()
        assert ("link", "eth0") in self.kernel.objects

    def teardown(self) -> None:
        """Two more rounds, and the kernel holds exactly what is desired, and a third has nothing to do."""
        for _ in range(2):
            self.reconciler.drifted()
            self.reconciler.sync()
        assert self.kernel.observe(self.want.own_links, []) == self.want
        assert not self.reconciler.dirty
        assert self.reconciler.sync().changed == 0


TestLinks = Links.TestCase
TestLinks.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
