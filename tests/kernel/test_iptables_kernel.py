"""The packet filter of a real kernel, in both variants, in a namespace of its own."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from kernelstate.errors import KernelRefusedError
from kernelstate.fake import FakeNetfilter
from kernelstate.linux import xt_readback
from kernelstate.linux.iptables import IptablesPort, Variant, choose_variant, legacy_tables
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import (
    AddrType,
    Anchor,
    ChainKey,
    Comment,
    ConnState,
    Dnat,
    Jump,
    Mark,
    Masquerade,
    Recent,
    Reject,
    Rule,
    Ruleset,
    SetXmark,
    Statistic,
    Transport,
    Verdict,
)
from kernelstate.ownership import Ownership
from kernelstate.ports import SyncReport
from kernelstate.reconcile import NetfilterReconciler

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("in_netns")]

OURS = Ownership(names=frozenset({"KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-FORWARD"}), prefixes=("KUBE-S",))
P = Prefix.parse
TCP80 = Transport("tcp", (80, 80))
ADDRESSES: dict[int, tuple[str, str, str]] = {
    4: ("10.96.0.1", "10.1.0.5", "10.1.0.0/16"),
    6: ("fd00::1", "fd01::5", "fd01::/64"),
}


def ruleset(family: Family) -> Ruleset:
    """Every kind of rule a renderer writes, in chains that are reachable where the kernel wants them to be."""
    service, pod, pods = (P(text) for text in ADDRESSES[family])

    def nat(name: str) -> ChainKey:
        return ChainKey(family, "nat", name)

    def filter_(name: str) -> ChainKey:
        return ChainKey(family, "filter", name)

    cluster_ip = Comment("ns1/svc1:p80 cluster IP")
    sep = Jump("KUBE-SEP-A")
    portals = Rule(Jump("KUBE-SERVICES"), (Comment("kubernetes service portals"),))
    new_portals = Rule(Jump("KUBE-SERVICES"), (ConnState(("NEW",)), Comment("kubernetes service portals")))
    return Ruleset(
        {
            nat("KUBE-SERVICES"): (
                Rule(Jump("KUBE-SVC-A"), (cluster_ip, TCP80), "tcp", None, service),
                Rule(Jump("KUBE-SVC-B"), (Comment("x last"), AddrType(dst="LOCAL"))),
            ),
            nat("KUBE-SVC-A"): (
                Rule(Jump("KUBE-MARK-MASQ"), (cluster_ip, TCP80), "tcp", pods, service, source_negated=True),
                Rule(sep, (Comment("ns1/svc1:p80 -> a"), Recent("KUBE-SEP-A", set=False, seconds=10800))),
                Rule(sep, (Comment("ns1/svc1:p80 -> a"), Statistic.one_of(3))),
                Rule(sep),
            ),
            nat("KUBE-SVC-B"): (),
            nat("KUBE-SEP-A"): (
                Rule(Jump("KUBE-MARK-MASQ"), (Comment("ns1/svc1:p80"),), source=pod),
                Rule(
                    Dnat(family, pod.network, 8080),
                    (Comment("ns1/svc1:p80"), Recent("KUBE-SEP-A", set=True), Transport("tcp")),
                    "tcp",
                ),
                Rule(Dnat(family, pod.network, 0), (Transport("udp"),), "udp"),
            ),
            nat("KUBE-MARK-MASQ"): (Rule(SetXmark(0x4000, 0x4000)),),
            nat("KUBE-POSTROUTING"): (
                Rule(Verdict.RETURN, (Mark(0x4000, 0x4000, negated=True),)),
                Rule(SetXmark(0x4000, 0)),
                Rule(Masquerade(random_fully=True), (Comment("kubernetes service traffic requiring SNAT"),)),
            ),
            filter_("KUBE-SERVICES"): (
                Rule(Reject(), (Comment("a has no endpoints"), TCP80), "tcp", None, service),
                Rule(Verdict.DROP, (Comment("b"), AddrType(dst="LOCAL"), Transport("sctp", (30000, 30010))), "sctp"),
                Rule(None, (Comment("only counts"),), in_interface="eth+", out_interface="lo", in_interface_negated=True),
            ),
            filter_("KUBE-FORWARD"): (
                Rule(Verdict.DROP, (ConnState(("INVALID",)),)),
                Rule(Verdict.ACCEPT, (Comment("forwarding rules"), Mark(0x4000, 0x4000))),
                Rule(Verdict.ACCEPT, (ConnState(("DNAT", "ESTABLISHED", "RELATED"), negated=True),)),
            ),
        },
        (
            Anchor(filter_("FORWARD"), Rule(Jump("KUBE-FORWARD"), (Comment("kubernetes forwarding rules"),))),
            Anchor(filter_("FORWARD"), new_portals),
            Anchor(nat("PREROUTING"), portals),
            Anchor(nat("OUTPUT"), portals),
            Anchor(nat("POSTROUTING"), Rule(Jump("KUBE-POSTROUTING"), (Comment("kubernetes postrouting rules"),))),
        ),
    )


@pytest.fixture(params=["legacy", "nft"])
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[4, 6])
def family(request: pytest.FixtureRequest) -> Family:
    return request.param  # type: ignore[no-any-return]


def iptables(variant: str, *arguments: str, family: Family = 4) -> str:
    command = [f"ip{'6' if family == 6 else ''}tables-{variant}", "-w", "5", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def start(port: IptablesPort, desired: Ruleset, families: tuple[Family, ...] = (4,)) -> NetfilterReconciler:
    reconciler = NetfilterReconciler(port, OURS, families)
    reconciler.set_desired(desired)
    return reconciler


def test_apply_then_observe_is_equal(variant: Variant, family: Family) -> None:
    """What was applied is what is observed, and a second process finds nothing to write."""
    port = IptablesPort(variant)
    desired = ruleset(family)
    assert start(port, desired, (family,)).sync() == SyncReport("netfilter", changed=len(desired.chains) + len(desired.anchors))
    seen = port.observe(family)
    assert seen.chains == desired.chains
    assert sorted(seen.anchors, key=str) == sorted(desired.anchors, key=str)
    assert start(port, desired, (family,)).sync() == SyncReport("netfilter")


def test_python_iptables_reads_the_same(family: Family) -> None:
    """Read through libiptc, without our text or the iptables programs, the kernel holds what was desired."""
    port = IptablesPort("legacy")
    desired = ruleset(family)
    start(port, desired, (family,)).sync()
    for table in ("filter", "nat"):
        wanted = {key: rules for key, rules in desired.chains.items() if key.table == table}
        assert xt_readback.read_back(family, table, [key.name for key in wanted]) == wanted
    doors = xt_readback.read_back(family, "nat", ["PREROUTING", "NOT-THERE"])
    assert doors == {ChainKey(family, "nat", "PREROUTING"): (desired.anchors[2].rule,)}


def test_a_foreign_flush_is_noticed_and_repaired(variant: Variant) -> None:
    """After ``-t nat -F`` by somebody else the filter table is left alone and nat is back, behind a cheap check."""
    port = IptablesPort(variant)
    reconciler = start(port, ruleset(4))
    reconciler.sync()
    assert not reconciler.drifted()
    iptables(variant, "-t", "nat", "-F")
    assert reconciler.drifted()
    pending = reconciler.pending()
    assert "*filter" not in pending[4]
    assert reconciler.sync().ok
    assert port.observe(4).chains == ruleset(4).chains
    assert not reconciler.drifted()
    assert reconciler.sync() == SyncReport("netfilter")


def test_counters_survive_what_does_not_concern_them(variant: Variant) -> None:
    """A no-op, a restart and a change elsewhere leave a rule's counters as they were."""
    port = IptablesPort(variant)
    counted = Rule(Verdict.ACCEPT, (Comment("counted"),), destination=P("127.0.0.1"))
    key = ChainKey(4, "filter", "KUBE-SERVICES")
    desired = Ruleset({key: (counted,)}, (Anchor(ChainKey(4, "filter", "OUTPUT"), Rule(Jump("KUBE-SERVICES"))),))
    start(port, desired).sync()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"?", ("127.0.0.1", 9))

    def packets() -> int:
        listing = iptables(variant, "-t", "filter", "-L", "KUBE-SERVICES", "-v", "-n", "-x")
        found = re.search(r"^\s*(\d+).*counted", listing, re.MULTILINE)
        assert found
        return int(found[1])

    before = packets()
    assert before > 0
    again = start(port, desired)
    again.sync()
    other = ChainKey(4, "filter", "KUBE-SVC-NEW")
    again.set_desired(Ruleset({**desired.chains, other: (counted,)}, desired.anchors), [other])
    assert again.sync().changed == 1
    assert packets() == before


def test_foreign_rules_stay_and_cleanup_leaves_nothing_of_ours(variant: Variant) -> None:
    """Cleanup takes away chains and jumps of ours; rules of others, even among them, are as before."""
    port = IptablesPort(variant)
    iptables(variant, "-t", "nat", "-N", "DOCKER")
    iptables(variant, "-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER")
    iptables(variant, "-A", "FORWARD", "-m", "limit", "--limit", "3/min", "-j", "LOG", "--log-prefix", "dropped: ")
    iptables(variant, "-A", "FORWARD", "-j", "DROP")
    before = port.observe(4)
    reconciler = start(port, ruleset(4))
    reconciler.sync()
    assert [a for a in port.observe(4).anchors if not OURS.claims(a.rule)] == list(before.anchors)
    assert reconciler.cleanup().ok
    assert port.observe(4) == before


def test_a_rule_the_kernel_refuses_is_contained(variant: Variant) -> None:
    """A rule that is impossible in its table stays out with the kernel's words, and all others are programmed."""
    port = IptablesPort(variant)
    desired = ruleset(4)
    bad = ChainKey(4, "nat", "KUBE-SVC-BAD")
    chains = {**desired.chains, bad: (Rule(Reject()),), ChainKey(4, "nat", "KUBE-SVC-" + "X" * 20): ()}
    reconciler = start(port, Ruleset(chains, desired.anchors))
    report = reconciler.sync()
    assert len(report.errors) == 2
    assert "KUBE-SVC-BAD" in report.errors[1]
    assert "XXX" in report.errors[0]
    seen = port.observe(4).chains
    assert {key: seen[key] for key in desired.chains} == desired.chains
    assert reconciler.dirty
    reconciler.set_desired(desired, [key for key in chains if key not in desired.chains])
    assert reconciler.sync().ok
    assert port.observe(4).chains == desired.chains


def test_a_refusal_names_the_rule_and_the_words(variant: Variant) -> None:
    """The error of a refused text names the rule's line and what the tool said, nothing else of its noise."""
    port = IptablesPort(variant)
    with pytest.raises(KernelRefusedError) as refused:
        port.apply(4, "*nat\n:C - [0:0]\n-A C -m nonsense -j ACCEPT\nCOMMIT\n")
    assert (refused.value.line, refused.value.obj) == (3, "-A C -m nonsense -j ACCEPT")
    assert refused.value.reason == "Couldn't load match `nonsense':No such file or directory"


def test_families_do_not_disturb_each_other(variant: Variant) -> None:
    """Our own write to one family is not mistaken for somebody else's to the other; somebody else's is seen."""
    port = IptablesPort(variant)
    both = Ruleset({**ruleset(4).chains, **ruleset(6).chains}, ruleset(4).anchors + ruleset(6).anchors)
    reconciler = start(port, both, (4, 6))
    assert reconciler.sync().ok
    assert not reconciler.drifted()
    key = ChainKey(6, "nat", "KUBE-SVC-B")
    reconciler.set_desired(Ruleset({**both.chains, key: (Rule(Verdict.RETURN),)}, both.anchors), [key])
    assert reconciler.sync().changed == 1
    assert not reconciler.drifted()
    iptables(variant, "-t", "filter", "-F", "KUBE-FORWARD", family=6)
    assert reconciler.drifted()
    assert reconciler.sync().changed == 1


def test_looking_creates_no_legacy_table() -> None:
    """Asking which variant is used, and for the generation, leaves a fresh namespace without tables."""
    variant, reason = choose_variant()
    command = Path(shutil.which("iptables") or "").resolve().name
    expected = "legacy" if "legacy" in command else "nft"
    assert (variant, reason) == (expected, f"neither variant holds rules, and this host's iptables is {command}")
    assert choose_variant(40000) == ("legacy", "neither variant holds rules, and legacy is the faster one for 40000 chains")
    assert IptablesPort("legacy").generation(4) == ()
    assert IptablesPort("legacy").observe(4) == Ruleset({})
    assert legacy_tables(4) == []


def test_the_variant_is_what_the_host_uses() -> None:
    """More rules decide; kubelet's hint chain decides over that."""
    iptables("nft", "-A", "INPUT", "-j", "ACCEPT")
    assert choose_variant() == ("nft", "iptables-nft holds 1 rules, iptables-legacy 0")
    iptables("legacy", "-A", "INPUT", "-j", "ACCEPT")
    iptables("legacy", "-A", "INPUT", "-j", "ACCEPT")
    assert choose_variant() == ("legacy", "iptables-legacy holds 2 rules, iptables-nft 1")
    iptables("nft", "-t", "mangle", "-N", "KUBE-KUBELET-CANARY")
    assert choose_variant() == ("nft", "kubelet left its chain KUBE-KUBELET-CANARY in iptables-nft")


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        pytest.param(":A - [0:0]\n:B - [0:0]\n-A A -j B\n-A OUTPUT -j A\n", True, id="a chain of jumps"),
        pytest.param(":B - [0:0]\n-X B\n", True, id="declare and delete"),
        pytest.param(":A - [0:0]\n-A A -j RETURN\n-I A 2 -j ACCEPT\n-D A -j RETURN\n", True, id="insert behind the last"),
        pytest.param(":A - [0:0]\n-A A -j RETURN\n:A - [0:0]\n-X A\n", True, id="a chain line flushes"),
        pytest.param("-A NOWHERE -j ACCEPT\n", False, id="no such chain"),
        pytest.param(":A - [0:0]\n-A A -j NOWHERE\n", False, id="jump to nowhere"),
        pytest.param(":A - [0:0]\n-A A -j RETURN\n-X A\n", False, id="delete a chain with rules"),
        pytest.param(":A - [0:0]\n-A OUTPUT -j A\n-X A\n", False, id="delete a chain somebody jumps to"),
        pytest.param(":A - [0:0]\n-D A -j RETURN\n", False, id="delete a rule that is not there"),
        pytest.param(":A - [0:0]\n-I A 2 -j RETURN\n", False, id="insert too far behind"),
        pytest.param(":A - [0:0]\n:B - [0:0]\n-A A -j B\n-A B -j A\n-A OUTPUT -j A\n", False, id="loop"),
        pytest.param(f":{'X' * 28} - [0:0]\n", True, id="28 characters"),
        pytest.param(f":{'X' * 29} - [0:0]\n", False, id="29 characters"),
    ],
)
def test_the_fake_takes_what_the_kernel_takes(variant: Variant, text: str, taken: bool) -> None:
    """Each row: text that the fake and the kernel both take and then hold the same, or both refuse and keep what they had."""
    real, fake = IptablesPort(variant), FakeNetfilter()
    whole = f"*nat\n{text}COMMIT\n"
    results = []
    for port in (real, fake):
        try:
            port.apply(4, whole)
        except KernelRefusedError:
            results.append(False)
        else:
            results.append(True)
    assert results == [taken, taken]
    assert real.observe(4) == fake.observe(4)
