"""The packet filter is kept as desired: least writes, refusals contained, others left alone."""

from __future__ import annotations

from kernelstate.diff import LONG_CHAIN
from kernelstate.fake import FakeNetfilter, RecordingNetfilter
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import Anchor, ChainKey, Comment, Jump, Rule, Ruleset, Verdict
from kernelstate.ownership import Ownership
from kernelstate.ports import Reconciler, SyncReport
from kernelstate.reconcile import NetfilterReconciler

OURS = Ownership(names=frozenset({"KUBE-SERVICES"}), prefixes=("KUBE-SVC-",), comments=frozenset({"ours"}))
V4: tuple[Family, ...] = (4,)


def nat(name: str, family: Family = 4) -> ChainKey:
    return ChainKey(family, "nat", name)


def forward(name: str) -> ChainKey:
    return ChainKey(4, "filter", name)


SERVICES, A, B = nat("KUBE-SERVICES"), nat("KUBE-SVC-A"), nat("KUBE-SVC-B")
ACCEPT, RETURN = Rule(Verdict.ACCEPT), Rule(Verdict.RETURN)
TO_A, TO_B = Rule(Jump("KUBE-SVC-A")), Rule(Jump("KUBE-SVC-B"))
DOOR = Anchor(nat("PREROUTING"), Rule(Jump("KUBE-SERVICES")))
DESIRED = Ruleset({SERVICES: (TO_A, TO_B), A: (ACCEPT,), B: (RETURN,)}, (DOOR,))
FOREIGN = "*nat\n:DOCKER - [0:0]\n-A DOCKER -j RETURN\n-A PREROUTING -j DOCKER\nCOMMIT\n"


def start(port: FakeNetfilter, desired: Ruleset = DESIRED) -> NetfilterReconciler:
    reconciler: Reconciler = NetfilterReconciler(port, OURS, V4)  # the annotation is a check of the protocol
    assert isinstance(reconciler, NetfilterReconciler)
    reconciler.set_desired(desired)
    return reconciler


def test_nothing_before_something_is_desired() -> None:
    """A reconciler that was told nothing looks at nothing and writes nothing."""
    port = FakeNetfilter()
    reconciler = NetfilterReconciler(port, OURS)
    assert reconciler.sync() == SyncReport("netfilter")
    assert (port.applied, port.observations, reconciler.dirty, reconciler.drifted()) == ([], 0, False, False)


def test_first_sync_then_silence() -> None:
    """The first sync writes everything in one text, the next one neither writes nor looks."""
    port = FakeNetfilter()
    port.run(4, FOREIGN)
    reconciler = start(port)
    assert reconciler.dirty
    assert reconciler.sync() == SyncReport("netfilter", changed=4)
    seen = port.observe(4)
    looked = port.observations
    assert {key: seen.chains[key] for key in DESIRED.chains} == DESIRED.chains
    assert [a.rule for a in seen.anchors] == [DOOR.rule, Rule(Jump("DOCKER"))]
    assert not reconciler.dirty
    assert reconciler.sync() == SyncReport("netfilter")
    assert (len(port.applied), port.observations) == (1, looked)


def test_a_small_change_writes_the_chain_it_touches() -> None:
    """With the changed keys named, only those are compared and written, and unchanged rules keep their counters."""
    port = FakeNetfilter()
    reconciler = start(port)
    reconciler.sync()
    before = port.births(4)
    reconciler.set_desired(Ruleset({**DESIRED.chains, A: (RETURN,)}, DESIRED.anchors), [A])
    assert reconciler.pending() == {4: "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -j RETURN\nCOMMIT\n"}
    assert reconciler.sync().changed == 1
    after = port.births(4)
    assert [key for key in after if after[key] != before[key]] == [A]


def test_a_long_chain_is_edited_in_place() -> None:
    """Adding a rule to a long chain writes that rule and leaves the counters of the others."""
    port = FakeNetfilter()
    rules = tuple(Rule(Verdict.ACCEPT, destination=Prefix(4, i, 32)) for i in range(1, 4 * LONG_CHAIN))
    reconciler = start(port, Ruleset({SERVICES: rules}))
    reconciler.sync()
    before = port.births(4)[SERVICES]
    reconciler.set_desired(Ruleset({SERVICES: (*rules[:100], RETURN, *rules[100:])}), [SERVICES])
    assert reconciler.pending() == {4: "*nat\n-I KUBE-SERVICES 101 -j RETURN\nCOMMIT\n"}
    reconciler.sync()
    after = port.births(4)[SERVICES]
    assert after == [*before[:100], (RETURN, after[100][1]), *before[100:]]


def test_a_restart_writes_only_what_is_wrong() -> None:
    """A new process observes, keeps what is right, deletes stale chains and anchors of ours, and touches nothing else."""
    port = FakeNetfilter()
    port.run(4, FOREIGN)
    start(port).sync()
    port.run(
        4,
        "*nat\n:KUBE-SVC-OLD - [0:0]\n:KUBE-SVC-B - [0:0]\n-A KUBE-SVC-OLD -j ACCEPT\n-A PREROUTING -j KUBE-SVC-OLD\nCOMMIT\n",
    )
    before = port.births(4)
    assert start(port).sync() == SyncReport("netfilter", changed=3)
    after = port.births(4)
    assert port.applied[-1][1] == (
        "*nat\n:KUBE-SVC-B - [0:0]\n:KUBE-SVC-OLD - [0:0]\n-D PREROUTING -j KUBE-SVC-OLD\n-A KUBE-SVC-B -j RETURN\n-X KUBE-SVC-OLD\nCOMMIT\n"
    )
    same = [SERVICES, A, nat("DOCKER")]
    assert [after[key] for key in same] == [before[key] for key in same]
    assert start(port).sync().changed == 0


def test_a_chain_that_goes_and_comes_back() -> None:
    """A chain deleted by us is written again when it is desired again with the very same rules."""
    port = FakeNetfilter()
    reconciler = start(port)
    reconciler.sync()
    reconciler.set_desired(Ruleset({SERVICES: (TO_A,), A: (ACCEPT,)}, DESIRED.anchors), [SERVICES, B])
    assert reconciler.sync().changed == 2
    reconciler.set_desired(DESIRED, [SERVICES, B])
    assert reconciler.sync().changed == 2
    assert port.observe(4) == DESIRED
    assert len(port.applied) == 3


def test_a_foreign_flush_is_noticed_and_only_that_is_repaired() -> None:
    """After ``-t nat -F`` the check says so at no cost, and the filter table is not written again."""
    port = FakeNetfilter()
    reconciler = start(port, Ruleset({**DESIRED.chains, forward("KUBE-SERVICES"): (ACCEPT,)}, DESIRED.anchors))
    reconciler.sync()
    before = port.births(4)
    assert not reconciler.drifted()
    port.flush(4, "nat")
    assert reconciler.drifted()
    assert reconciler.dirty
    assert reconciler.sync().ok
    after = port.births(4)
    assert after[forward("KUBE-SERVICES")] == before[forward("KUBE-SERVICES")]
    assert "*filter" not in port.applied[-1][1]
    assert [rule for rule, _ in after[SERVICES]] == [TO_A, TO_B]


def test_a_refused_chain_is_contained_and_retried() -> None:
    """One chain the kernel refuses stays dirty with its words; everything else goes through, now and later."""
    bad = Rule(Verdict.DROP, (Comment("bad"),))
    refusing = [True]
    port = FakeNetfilter(refuse=lambda _key, rule: refusing[0] and rule == bad)
    chains = {**DESIRED.chains, B: (bad,), forward("KUBE-SVC-F"): (ACCEPT,)}
    reconciler = start(port, Ruleset(chains, DESIRED.anchors))
    report = reconciler.sync()
    assert report.errors == (
        (
            "write IPv4 nat chain KUBE-SVC-B: iptables-restore -A KUBE-SVC-B -m comment --comment bad -j DROP:"
            " RULE_APPEND failed (Invalid argument)"
        ),
    )
    assert (port.observe(4).chains[SERVICES], port.observe(4).chains[B]) == ((TO_A, TO_B), ())
    assert reconciler.dirty
    looked = port.observations
    reconciler.set_desired(Ruleset({**chains, A: (RETURN,)}, DESIRED.anchors), [A])
    assert len(reconciler.sync().errors) == 1
    assert (port.observe(4).chains[A], port.observations) == ((RETURN,), looked + 1)
    refusing[0] = False
    assert reconciler.sync() == SyncReport("netfilter", changed=1)
    assert port.observe(4).chains[B] == (bad,)
    assert not reconciler.dirty


def test_a_refusal_that_names_no_chain_is_found_by_halving() -> None:
    """When only COMMIT is blamed, as for a loop, the guilty chains alone are left out."""
    port = FakeNetfilter()
    others = {nat(f"KUBE-SVC-{i:02}"): (ACCEPT,) for i in range(20)}
    loop = {A: (TO_B,), B: (TO_A,)}
    report = start(port, Ruleset({**others, **loop})).sync()
    assert len(report.errors) == 1
    assert "loop" in report.errors[0]
    seen = port.observe(4).chains
    assert all(seen[key] == rules for key, rules in others.items())
    assert len(port.applied) < 20


def test_a_refused_anchor_is_retried() -> None:
    """An anchor the kernel refuses leaves the chains written and is looked up and tried again."""
    refusing = [True]
    port = FakeNetfilter(refuse=lambda key, _rule: refusing[0] and key.name == "PREROUTING")
    reconciler = start(port)
    assert len(reconciler.sync().errors) == 1
    assert port.observe(4).chains == DESIRED.chains
    assert reconciler.dirty
    refusing[0] = False
    assert reconciler.sync() == SyncReport("netfilter", changed=1)
    assert port.observe(4) == DESIRED


def test_a_failure_of_the_tool_changes_nothing_and_is_retried() -> None:
    """When the restore fails as a whole, one error says so and the next sync does it all."""
    port = FakeNetfilter()
    port.fail_next = 1
    reconciler = start(port)
    assert reconciler.sync().errors == (
        "sync IPv4 packet filter: iptables-restore IPv4: Another app is currently holding the xtables lock.",
    )
    assert reconciler.dirty
    assert reconciler.sync() == SyncReport("netfilter", changed=4)


def test_anchors_that_are_no_longer_desired_go() -> None:
    """An anchor without a jump to us is found again by the memory of having wanted it, or by its comment."""
    port = FakeNetfilter()
    extra = Anchor(forward("FORWARD"), Rule(Verdict.ACCEPT, destination=Prefix(4, 0x0A000000, 8)), first=False)
    marked = Anchor(forward("FORWARD"), Rule(Verdict.ACCEPT, (Comment("ours"),)))
    port.run(4, "*filter\n-A FORWARD -j DROP\nCOMMIT\n")
    reconciler = start(port, Ruleset(DESIRED.chains, (DOOR, extra)))
    reconciler.sync()
    assert [a.rule for a in port.observe(4).anchors if a.chain == extra.chain] == [Rule(Verdict.DROP), extra.rule]
    reconciler.set_desired(Ruleset(DESIRED.chains, (DOOR, marked)), [])
    assert reconciler.sync().changed == 2
    assert [a.rule for a in port.observe(4).anchors if a.chain == extra.chain] == [marked.rule, Rule(Verdict.DROP)]
    assert start(port).sync().changed == 1
    assert [a.rule for a in port.observe(4).anchors if a.chain == extra.chain] == [Rule(Verdict.DROP)]


def test_an_anchor_in_somebody_elses_chain() -> None:
    """An anchor may live in a user chain that is not ours; the chain's other rules stay."""
    port = FakeNetfilter()
    port.run(4, FOREIGN)
    reconciler = start(port, Ruleset({SERVICES: ()}, (Anchor(nat("DOCKER"), DOOR.rule),)))
    reconciler.sync()
    assert port.observe(4).chains[nat("DOCKER")] == (DOOR.rule, RETURN)
    assert reconciler.cleanup().ok
    assert port.observe(4).chains == {nat("DOCKER"): (RETURN,)}


def test_verify_sees_what_the_generation_does_not() -> None:
    """A full look finds an edit that left the generation as it was."""
    port = FakeNetfilter()
    reconciler = start(port)
    reconciler.sync()
    port.run(4, "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -j RETURN\nCOMMIT\n")
    port._generation[4] -= 1
    assert not reconciler.drifted()
    assert reconciler.verify().changed == 1
    assert port.observe(4).chains[A] == (ACCEPT,)


def test_cleanup_leaves_what_is_not_ours() -> None:
    """Cleanup removes all chains and anchors of ours from every table, also after a restart, and nothing else."""
    port = FakeNetfilter()
    port.run(4, FOREIGN)
    before = port.births(4)
    start(port).sync()
    port.run(4, "*mangle\n:KUBE-SVC-STALE - [0:0]\n-A OUTPUT -j KUBE-SVC-STALE\nCOMMIT\n")
    assert NetfilterReconciler(port, OURS, V4).cleanup() == SyncReport("netfilter", changed=6)
    assert port.births(4) == before
    applied = len(port.applied)
    assert NetfilterReconciler(port, OURS).cleanup() == SyncReport("netfilter")
    assert len(port.applied) == applied


def test_families_are_independent() -> None:
    """What one family is refused does not hold up the other, and a family can be left out."""
    port = FakeNetfilter(refuse=lambda key, _rule: key.family == 6)
    reconciler = NetfilterReconciler(port, OURS)
    both = Ruleset({A: (ACCEPT,), nat("KUBE-SVC-A", 6): (ACCEPT,)})
    reconciler.set_desired(both)
    assert len(reconciler.sync().errors) == 1
    assert port.observe(4).chains[A] == (ACCEPT,)
    reconciler.set_desired(both, None, families=[4])
    assert reconciler.sync().ok


def test_the_recorder_keeps_the_text() -> None:
    """A recording port receives what iptables-restore would, and believes it."""
    port = RecordingNetfilter()
    reconciler = NetfilterReconciler(port, OURS, V4)
    reconciler.set_desired(Ruleset({A: (ACCEPT,)}))
    assert reconciler.sync().changed == 1
    assert port.texts == {4: "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -j ACCEPT\nCOMMIT\n"}
    assert reconciler.sync().changed == 0


def test_a_change_during_the_repair_is_not_missed() -> None:
    """Somebody who empties one chain, and another while that is being repaired, finds both back after the next round."""
    port = FakeNetfilter()
    chains = {ChainKey(4, "nat", f"KUBE-SVC-{n}"): (Rule(Verdict.RETURN),) for n in "AB"}
    reconciler = NetfilterReconciler(port, Ownership(prefixes=("KUBE-SVC-",)), (4,))
    reconciler.set_desired(Ruleset(chains))
    reconciler.sync()
    port.run(4, "*nat\n:KUBE-SVC-A - [0:0]\nCOMMIT\n")
    write = port.apply

    def apply_and_break(family: Family, text: str) -> None:
        write(family, text)
        port.run(4, "*nat\n:KUBE-SVC-B - [0:0]\nCOMMIT\n")
        port.apply = write  # type: ignore[method-assign]

    port.apply = apply_and_break  # type: ignore[method-assign]
    assert reconciler.drifted()
    reconciler.sync()
    assert reconciler.drifted()
    reconciler.sync()
    assert port.observe(4).chains == chains
    assert not reconciler.drifted() or reconciler.sync().changed == 0
