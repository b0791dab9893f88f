"""Whatever happens to keys in etcd, and however much of it a node misses, the members it knows are those that etcd has.

etcd (a dictionary and a log) --events, in order, late, or cut off by compaction--> LeaseBook
                              --a listing, after each cut-----------------------------^
"""

from __future__ import annotations

from ipaddress import IPv4Address, ip_network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overlay.lease import Vtep, derived_mac
from overlay.netconf import NetConf
from overlay.registration import Registration
from overlay.registry.etcd import LeaseAttrs, Subnets, own_attrs, own_member, print_attrs
from overlay.registry.etcd_book import LeaseBook

CONF = NetConf(ip_network("10.5.0.0/16"))
OWN = Subnets(ip_network("10.5.1.0/24"))
ATTRS = own_attrs(CONF, "n1", {4: IPv4Address("192.168.1.1")})
OWN_MEMBER = own_member("n1", OWN, ATTRS, CONF)
KEYS = st.integers(2, 6).map(lambda i: f"10.5.{i}.0-24")
NODES = st.integers(2, 5)


def value_of(node: int) -> str:
    """Return what a node writes."""
    vtep = Vtep(1, derived_mac(f"n{node}", 1, 4))
    return print_attrs(LeaseAttrs(IPv4Address(f"192.168.1.{node}"), None, "vxlan", (vtep, None)))


class Leases(RuleBasedStateMachine):
    """Nodes, people and accidents change keys; one node follows."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[str, tuple[str, int, int]] = {}
        self.log: list[tuple[str, str | None, int, int]] = []
        self.revision = 1
        self.book = LeaseBook()
        self.read = 0
        self.relist()

    def change(self, key: str, value: str | None, lease: int) -> None:
        """Put a key, or with None delete it."""
        if value is None and key not in self.keys:
            return
        self.revision += 1
        self.keys.pop(key, None)
        if value is not None:
            self.keys[key] = (value, lease, self.revision)
        self.log.append((key, value, lease, self.revision))

    # -- what happens in etcd ----------------------------------------------------------------------------------------

    @rule(key=KEYS, node=NODES, lease=st.integers(0, 1))
    def node_writes(self, key: str, node: int, lease: int) -> None:
        """Take a key as a node does, perhaps one that another had, or a second one."""
        self.change(key, value_of(node), lease)

    @rule(key=KEYS, value=st.sampled_from(("", "{", '{"PublicIP":"x"}')))
    def somebody_writes_nonsense(self, key: str, value: str) -> None:
        """Put a value that cannot be read in the place of one that could."""
        self.change(key, value, 0)

    @rule(key=KEYS)
    def key_ends(self, key: str) -> None:
        """End a lease, or delete a key as people do."""
        self.change(key, None, 0)

    # -- what the node sees of it ------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 5))
    def follow(self, count: int) -> None:
        """Take in the next few events."""
        for key, value, lease, revision in self.log[self.read : self.read + count]:
            if value is None:
                self.book.delete(f"subnets/{key}", revision)
            else:
                self.book.put(f"subnets/{key}", value, lease, revision)
        self.read = min(len(self.log), self.read + count)

    @rule()
    def relist(self) -> None:
        """Lose the connection, or what it would have told to compaction: list again."""
        self.book.replace([(f"subnets/{k}", *found) for k, found in self.keys.items()], self.revision)
        self.read = len(self.log)

    @rule(key=KEYS)
    def write_ahead(self, key: str) -> None:
        """Write a key oneself and know it at once; the event of it comes later, after older ones."""
        self.change(key, value_of(9), 7)
        self.book.put(f"subnets/{key}", value_of(9), 7, self.revision)

    @invariant()
    def own_member_is_first(self) -> None:
        """Have this node among the members, whatever etcd says."""
        assert self.book.members(OWN_MEMBER, OWN.name, CONF)[0] == OWN_MEMBER

    def teardown(self) -> None:
        """Once all events are in: of each node the key it wrote last, of each unreadable key a problem, and nothing else."""
        self.follow(len(self.log))
        expected: dict[str, Registration] = {}
        unreadable = set()
        for key, (value, _lease, _) in sorted(self.keys.items(), key=lambda item: item[1][2]):
            node = next((i for i in (*range(2, 6), 9) if value == value_of(i)), None)
            if node is None:
                unreadable.add(key)
                continue
            subnet, address = ip_network(key.replace("-", "/")), IPv4Address(f"192.168.1.{node}")
            vtep = Vtep(1, derived_mac(f"n{node}", 1, 4))
            expected[str(address)] = Registration(str(address), 4, subnet, address, "PublicIP", vtep, f"etcd key {key}")
        found = self.book.members(OWN_MEMBER, OWN.name, CONF)[1:]
        assert {m.node: m.registrations[0] for m in found if m.registrations} == expected
        assert {m.node for m in found if not m.registrations} == unreadable
        assert {m.node: len(m.problems) for m in found if m.registrations} == {n: self.times(n) - 1 for n in expected}

    def times(self, address: str) -> int:
        """Return how many keys state an address."""
        return sum(f'"{address}"' in value for value, _, _ in self.keys.values())


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
