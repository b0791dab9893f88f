"""Whatever happens in whatever order, the packet filter ends up as desired and what is right is not written again."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kernelstate.errors import KernelRefusedError
from kernelstate.fake import FakeNetfilter
from kernelstate.objects.address import Family, Prefix
from kernelstate.objects.netfilter import Anchor, ChainKey, Jump, Rule, Ruleset, Table, Verdict
from kernelstate.ownership import Ownership
from kernelstate.reconcile import NetfilterReconciler

OURS = Ownership(names=frozenset({"KUBE-SERVICES"}), prefixes=("KUBE-SVC-",))
FAMILY: Family = 4
TABLES: tuple[Table, ...] = ("filter", "nat")
NAMES = [f"KUBE-SVC-{letter}" for letter in "ABC"]
DOORS = {"filter": ["FORWARD", "INPUT"], "nat": ["PREROUTING", "OUTPUT"]}

tables = st.sampled_from(TABLES)
leaf_rules = st.builds(Rule, st.sampled_from(Verdict), destination=st.integers(1, 5).map(lambda host: Prefix(4, host, 32)))
chains = st.sampled_from(NAMES)


class Reconciling(RuleBasedStateMachine):
    """Random desired states, refusals and interference over the fake kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[Rule] = set()
        self.port = FakeNetfilter(refuse=lambda key, rule: key.name.startswith("KUBE-") and rule in self.bad)
        self.reconciler = NetfilterReconciler(self.port, OURS, [FAMILY])
        self.chains: dict[ChainKey, tuple[Rule, ...]] = {}
        self.anchors: tuple[Anchor, ...] = ()
        self.changed: set[ChainKey] = set()
        self.foreign: dict[ChainKey, list[Rule]] = {}

    @initialize()
    def foreign_rules(self) -> None:
        """Somebody else is here already."""
        self.port.run(FAMILY, "*nat\n:DOCKER - [0:0]\n-A DOCKER -j RETURN\n-A PREROUTING -j DOCKER\nCOMMIT\n")

    # -- desired changes ---------------------------------------------------------------------------------------------

    @rule(table=tables, name=chains, body=st.lists(leaf_rules, max_size=3), long=st.booleans())
    def set_chain(self, table: Table, name: str, body: list[Rule], long: bool) -> None:
        """Fill a chain; a long one is edited rather than rewritten."""
        filler = [Rule(Verdict.ACCEPT, destination=Prefix(4, 1000 + i, 32)) for i in range(80)] if long else []
        self._want(ChainKey(FAMILY, table, name), (*filler[:40], *body, *filler[40:]))

    @rule(table=tables, jumps=st.sets(chains))
    def set_top(self, table: Table, jumps: set[str]) -> None:
        """Let the top chain jump to some of the chains that are desired."""
        there = [name for name in sorted(jumps) if ChainKey(FAMILY, table, name) in self.chains]
        self._want(ChainKey(FAMILY, table, "KUBE-SERVICES"), tuple(Rule(Jump(name)) for name in there))

    @rule(table=tables, name=chains)
    def drop_chain(self, table: Table, name: str) -> None:
        """Stop wanting a chain, and the jumps to it."""
        if self.chains.pop(ChainKey(FAMILY, table, name), None) is not None:
            self.changed.add(ChainKey(FAMILY, table, name))
        top = ChainKey(FAMILY, table, "KUBE-SERVICES")
        if top in self.chains:
            self._want(top, tuple(rule for rule in self.chains[top] if rule.target != Jump(name)))

    @rule(table=tables, first=st.booleans())
    def set_anchors(self, table: Table, first: bool) -> None:
        """Want the top chain entered from both doors, or no longer."""
        top = ChainKey(FAMILY, table, "KUBE-SERVICES")
        if any(anchor.chain.table == table for anchor in self.anchors):
            self.anchors = tuple(anchor for anchor in self.anchors if anchor.chain.table != table)
        else:
            if top not in self.chains:
                self._want(top, ())
            doors = [ChainKey(FAMILY, table, name) for name in DOORS[table]]
            self.anchors += tuple(Anchor(door, Rule(Jump("KUBE-SERVICES")), first) for door in doors)

    def _want(self, key: ChainKey, rules: tuple[Rule, ...]) -> None:
        self.chains[key] = rules
        self.changed.add(key)

    # -- the world ---------------------------------------------------------------------------------------------------

    @rule(table=tables)
    def somebody_flushes(self, table: Table) -> None:
        """Do ``iptables -t TABLE -F``; foreign rules are gone as well, for good."""
        self.port.flush(FAMILY, table)

    @rule(table=tables, name=chains)
    def somebody_empties(self, table: Table, name: str) -> None:
        """Empty, or create, one chain of ours."""
        self.port.run(FAMILY, f"*{table}\n:{name} - [0:0]\nCOMMIT\n")

    @rule(table=tables, name=chains)
    def somebody_jumps(self, table: Table, name: str) -> None:
        """Put a jump to a chain of ours where it does not belong."""
        self.port.run(FAMILY, f"*{table}\n:{name} - [0:0]\n-A {DOORS[table][0]} -j {name}\nCOMMIT\n")

    @rule(table=tables, name=chains)
    def somebody_deletes(self, table: Table, name: str) -> None:
        """Delete a chain of ours, if the kernel lets them."""
        try:
            self.port.run(FAMILY, f"*{table}\n:{name} - [0:0]\n-X {name}\nCOMMIT\n")
        except KernelRefusedError:
            return

    @rule(count=st.integers(1, 3))
    def restore_will_fail(self, count: int) -> None:
        """Let the next restores fail as a whole."""
        self.port.fail_next = count

    @rule(rule=leaf_rules)
    def kernel_dislikes(self, rule: Rule) -> None:
        """Let the kernel refuse one rule from now on, until the next convergence."""
        self.bad.add(rule)

    @rule()
    def restart(self) -> None:
        """Start over with the same desired state and no memory."""
        self.reconciler = NetfilterReconciler(self.port, OURS, [FAMILY])
        self.changed = set(self.chains)

    # -- us ----------------------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        self.reconciler.set_desired(Ruleset(self.chains, self.anchors), self.changed)
        self.changed = set()

    @rule()
    def sync(self) -> None:
        """Sync once; what can be written is, whatever is refused."""
        self._hand_over()
        report = self.reconciler.sync()
        assert report.ok == (not self.reconciler.dirty)
        if report.ok:
            self._assert_as_desired()
        if not report.ok and not self.port.fail_next and "lock" not in "".join(report.errors):
            seen = self.port.observe(FAMILY).chains
            for key, rules in self.chains.items():
                if not self.bad & set(rules):
                    assert seen[key] == rules, key

    @rule()
    def converge(self) -> None:
        """With nothing in the way, one sync brings the kernel to the desired state and the next writes nothing."""
        self.port.fail_next = 0
        self.bad.clear()
        self._hand_over()
        assert self.reconciler.sync().errors == ()
        self._assert_as_desired()
        births, applied = self.port.births(FAMILY), len(self.port.applied)
        assert self.reconciler.sync().changed == 0
        assert (self.port.births(FAMILY), len(self.port.applied)) == (births, applied)
        assert not self.reconciler.dirty
        if self.reconciler.drifted():  # after a repair it looks once more, and finds nothing
            assert self.reconciler.sync().changed == 0
        assert not self.reconciler.drifted()

    def _assert_as_desired(self) -> None:
        seen = self.port.observe(FAMILY)
        assert {key: rules for key, rules in seen.chains.items() if OURS.owns(key.name)} == self.chains
        ours = sorted((anchor.chain, str(anchor.rule)) for anchor in seen.anchors if OURS.claims(anchor.rule))
        assert ours == sorted((anchor.chain, str(anchor.rule)) for anchor in self.anchors)

    @rule()
    def verify(self) -> None:
        """After convergence a full look finds nothing to do: memory was right."""
        self.converge()
        assert self.reconciler.verify().changed == 0

    @precondition(lambda self: not self.changed)
    @rule(table=tables, name=chains, body=st.lists(leaf_rules, min_size=1, max_size=2))
    def one_change_after_convergence(self, table: Table, name: str, body: list[Rule]) -> None:
        """After convergence a change of one chain leaves every other rule's counters alone."""
        self.converge()
        key = ChainKey(FAMILY, table, name)
        before = self.port.births(FAMILY)
        self._want(key, tuple(body))
        self._hand_over()
        assert self.reconciler.sync().ok
        after = self.port.births(FAMILY)
        assert {k: v for k, v in after.items() if k != key} == {k: v for k, v in before.items() if k != key}

    @invariant()
    def foreign_chain_is_left_alone(self) -> None:
        """Check that the chain of somebody else exists, and holds what they left in it."""
        assert self.port.observe(FAMILY).chains[ChainKey(FAMILY, "nat", "DOCKER")] in {(Rule(Verdict.RETURN),), ()}


TestReconciling = Reconciling.TestCase
TestReconciling.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
