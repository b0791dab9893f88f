"""ipsets in the kernel: written and read back, as pyroute2 and the ipset tool see them, grown, swapped and repaired."""

import socket

import pytest
from pyroute2 import IPSet
from pyroute2.ipset import PortEntry

from kernelstate.diff_sets import (
    SMALLEST,
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    SwapSets,
    temporary_name,
)
from kernelstate.linux import netns as namespaces
from kernelstate.linux.ipset import LinuxIpset, has_ipset
from kernelstate.objects.sets import IpSet, SetSpec
from kernelstate.ownership import Ownership
from kernelstate.reconcile_sets import IpsetReconciler

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not has_ipset(), reason="no ipset in this kernel"),
]

OURS = Ownership(prefixes=("KUBE-",))
V4, V6 = 0x0A600000, 0xFD96 << 112
SPECS = {
    4: [SetSpec(f"KUBE-{n}", kind) for n, kind in enumerate(
        ("hash:ip", "hash:net", "hash:ip,port", "hash:ip,port,ip", "hash:ip,port,net", "bitmap:port")
    )],
    6: [SetSpec(f"KUBE-6-{n}", kind, 6) for n, kind in enumerate(
        ("hash:ip", "hash:net", "hash:ip,port", "hash:ip,port,ip", "hash:ip,port,net")
    )],
}  # fmt: skip


def member(spec, n):
    """Return the n-th of many different members."""
    base, step = (V4, 8) if spec.family == 4 else (V6, 64)
    network = (base + (n << step), (32 if spec.family == 4 else 128) - step)
    service = (base + n, ("tcp", "udp", "sctp")[n % 3], 1 + n % 65535)
    return {
        "hash:ip": (base + n,),
        "hash:net": (network,),
        "hash:ip,port": service,
        "hash:ip,port,ip": (*service, base + 7 * n),
        "hash:ip,port,net": (*service, network),
        "bitmap:port": (n % 65536,),
    }[spec.type]


def filled(spec, count):
    return IpSet(spec, frozenset(member(spec, n) for n in range(count)))


SETS = {spec.name: filled(spec, 2000) for family in (4, 6) for spec in SPECS[family]}
"""Of each type and family one, with more members than go into one message."""


def held(port):
    return {name: IpSet(header.spec, port.members(header.spec)) for name, header in port.headers().items()}


@pytest.fixture
def port(in_netns):
    return LinuxIpset()


def synced(port, sets=SETS):
    reconciler = IpsetReconciler(port, OURS)
    reconciler.set_desired(dict(sets))
    assert reconciler.sync().errors == ()
    return reconciler


def test_written_and_read_back(port):
    """Sets of every type and family read back as they were written; a second look finds nothing to do."""
    reconciler = synced(port)
    assert held(port) == SETS
    assert {header.room for header in port.headers().values()} == {SMALLEST}
    assert not reconciler.drifted()
    assert IpsetReconciler(port, OURS).cleanup().changed == len(SETS)
    assert port.headers() == {}


def test_restart_writes_nothing(port):
    """Whoever starts over finds every set right and writes nothing."""
    synced(port)
    again = IpsetReconciler(port, OURS)
    again.set_desired(SETS)
    assert again.sync().changed == 0


@pytest.mark.parametrize("family", [4, 6])
def test_as_the_tool_prints_it(port, in_netns, family):
    """``ipset save`` prints of each type the member that was meant."""
    sets = {spec.name: filled(spec, 2) for spec in SPECS[family]}
    synced(port, sets)
    a, net = ("10.96.0.", "/24") if family == 4 else ("fd96::", "/64")
    zero = "10.96.0.0" if family == 4 else "fd96::"
    second = "10.96.1.0/24" if family == 4 else "fd96:0:0:1::/64"
    name = "KUBE-" if family == 4 else "KUBE-6-"
    expected = {
        f"add {name}0 {zero}",
        f"add {name}0 {a}1",
        f"add {name}1 {zero}{net}",
        f"add {name}1 {second}",
        f"add {name}2 {zero},tcp:1",
        f"add {name}2 {a}1,udp:2",
        f"add {name}3 {zero},tcp:1,{zero}",
        f"add {name}3 {a}1,udp:2,{a}7",
        f"add {name}4 {zero},tcp:1,{zero}{net}",
        f"add {name}4 {a}1,udp:2,{second}",
        *({"add KUBE-5 0", "add KUBE-5 1"} if family == 4 else set()),
    }
    printed = namespaces.run(in_netns, ["ipset", "save"]).splitlines()
    assert {line for line in printed if line.startswith("add")} == expected
    created = [line for line in printed if line.startswith(f"create {name}2 ")]
    assert "hash:ip,port" in created[0]
    assert f"family {'inet' if family == 4 else 'inet6'} hashsize 1024 maxelem 65536" in created[0]


def test_as_pyroute2_sees_it(port, in_netns):
    """pyroute2 lists the same header and members, and what pyroute2 adds is observed."""
    spec = SetSpec("KUBE-W", "hash:ip,port")
    synced(port, {"KUBE-W": IpSet(spec, frozenset({(V4 + 1, "tcp", 80)}))})
    with IPSet() as witness:
        (listed,) = witness.list("KUBE-W")
        assert (listed.get("IPSET_ATTR_TYPENAME"), listed.get("IPSET_ATTR_FAMILY")) == ("hash:ip,port", socket.AF_INET)
        (entry,) = listed.get("IPSET_ATTR_ADT").get_attrs("IPSET_ATTR_DATA")
        address = entry.get("IPSET_ATTR_IP_FROM").get("IPSET_ATTR_IPADDR_IPV4")
        assert (address, entry.get("IPSET_ATTR_PROTO"), entry.get("IPSET_ATTR_PORT_FROM")) == ("10.96.0.1", 6, 80)
        witness.add("KUBE-W", ("10.96.0.2", PortEntry(53, protocol=17)), etype="ip,port")
    assert port.members(spec) == {(V4 + 1, "tcp", 80), (V4 + 2, "udp", 53)}


def test_only_the_change_is_written(port):
    """One member more and one less are two changes."""
    reconciler = synced(port)
    spec = SPECS[4][2]
    members = SETS[spec.name].members - {member(spec, 5)} | {member(spec, 5000)}
    reconciler.set_desired({**SETS, spec.name: IpSet(spec, members)}, [spec.name])
    assert reconciler.sync().changed == 2
    assert port.members(spec) == members
    assert not reconciler.drifted()


def test_grows_beyond_its_room_under_rules(port, in_netns):
    """A set grows beyond 65,536 members while a rule refers to it: the rule sees the new set, and nothing is left over."""
    spec = SetSpec("KUBE-GROW", "hash:ip")
    reconciler = synced(port, {spec.name: filled(spec, 10)})
    rule = ["iptables-legacy", "-A", "INPUT", "-m", "set", "--match-set", spec.name, "dst", "-j", "ACCEPT"]
    namespaces.run(in_netns, rule)
    many = filled(spec, SMALLEST + 10)
    reconciler.set_desired({spec.name: many}, [spec.name])
    assert reconciler.sync().ok
    (header,) = port.headers().values()
    assert (header.spec, header.room, header.elements, header.references) == (spec, 4 * SMALLEST, SMALLEST + 10, 1)
    assert port.members(spec) == many.members
    assert not reconciler.drifted()


def test_waits_until_no_rule_refers_to_it(port, in_netns):
    """A set that a rule refers to outlives its being wanted, and goes once the rule is gone."""
    spec = SetSpec("KUBE-USED", "hash:ip")
    reconciler = synced(port, {spec.name: filled(spec, 1)})
    rule = ["INPUT", "-m", "set", "--match-set", spec.name, "dst", "-j", "ACCEPT"]
    namespaces.run(in_netns, ["iptables-legacy", "-A", *rule])
    reconciler.set_desired({}, [spec.name])
    assert (reconciler.sync().ok, reconciler.drifted()) == (True, False)
    namespaces.run(in_netns, ["iptables-legacy", "-D", *rule])
    assert reconciler.drifted()
    assert reconciler.sync().changed == 1
    assert port.headers() == {}


@pytest.mark.parametrize(
    "damage",
    [
        ["flush"],
        ["flush", "KUBE-2"],
        ["destroy", "KUBE-0"],
        ["del", "KUBE-2", "10.96.0.0,tcp:1"],
        ["add", "KUBE-0", "1.2.3.4"],
        ["create", "KUBE-LEFT", "hash:ip"],
        ["swap", "KUBE-0", "KUBE-9"],
    ],
)
def test_damage_is_noticed_and_repaired(port, in_netns, damage):
    """What somebody else does to sets shows in their headers and is undone; sets of others stay as they are."""
    other = SetSpec("OTHER", "hash:ip")
    sets = {**{spec.name: filled(spec, 5) for spec in SPECS[4]}, "KUBE-9": filled(SetSpec("KUBE-9", "hash:ip"), 3)}
    assert port.apply([CreateSet(other, 1024), AddMembers(other, [(1,)])]) == ""
    reconciler = synced(port, sets)
    assert not reconciler.drifted()
    namespaces.run(in_netns, ["ipset", *damage])
    assert reconciler.drifted()
    assert reconciler.sync().ok
    left = held(port)
    assert len(left.pop("OTHER").members) == (damage != ["flush"])
    assert left == sets
    assert not reconciler.drifted()


def test_words_of_refusals(port):
    """A refusal names what was tried and what the kernel meant, and what comes after it is not tried."""
    a, b = SetSpec("KUBE-A", "hash:ip"), SetSpec("KUBE-B", "hash:net")
    assert port.apply([CreateSet(a, 64), CreateSet(b, 64)]) == ""
    refused = port.apply([AddMembers(a, [(n,) for n in range(1, 100_000)]), DestroySet("KUBE-A")])
    assert refused == "add 99999 members to ipset KUBE-A: set is full"
    assert port.apply([CreateSet(SetSpec("KUBE-A", "hash:net"), 64)]).endswith(": File exists")
    assert port.apply([SwapSets("KUBE-A", "KUBE-NONE")]).startswith("swap ipsets KUBE-A and KUBE-NONE: ")
    assert port.apply([AddMembers(b, [((V4, 0),)])]).endswith(": bad prefix length")
    assert port.apply([DeleteMembers(b, [((V4, 24),)]), DestroySet("KUBE-NONE")]) == ""


def test_what_half_a_growth_left_goes(port):
    """A temporary set that an earlier run left half-filled is destroyed."""
    left = SetSpec(temporary_name("KUBE-0"), "hash:ip")
    assert port.apply([CreateSet(left, SMALLEST), AddMembers(left, [(1,)])]) == ""
    synced(port, {"KUBE-0": SETS["KUBE-0"]})
    assert held(port) == {"KUBE-0": SETS["KUBE-0"]}
