"""One family's packet filter: when to look at the kernel, what to compare, what to remember.

Looks at the start, whenever the generation is not the one left behind by our own last write, and when told to; otherwise
memory is enough, and a sync costs what changed. Chains are compared by value, so what is right already is not written again
and keeps its counters, also after a restart.

    _desired    what shall be       one mapping for both families, shared with whoever renders it
    _kernel     what is             our chains only; holds the desired tuple itself wherever the two are equal
    _errors     what was refused    by chain; stays dirty, tried again by itself at each sync (see ``contain.py``)

What the difference is, is ``diff.py``'s business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from kernelstate.contain import write_in_steps
from kernelstate.diff import Delete, Edit, InsertAnchor, Plan, RemoveAnchor, Replace, Rules, diff_anchors, diff_chains
from kernelstate.errors import KernelRefusedError, KernelStateError
from kernelstate.objects.address import Family
from kernelstate.objects.netfilter import Anchor, ChainKey, Rule, Ruleset
from kernelstate.ownership import Ownership
from kernelstate.ports import NetfilterPort

Done = tuple[int, list[str]]


class FamilyFilter:
    """Desired and remembered state of one family; ``sync`` and ``cleanup`` return (changes made, error lines)."""

    def __init__(self, family: Family, port: NetfilterPort, ownership: Ownership) -> None:
        self.family = family
        self._port = port
        self._ownership = ownership
        self._desired: Ruleset | None = None
        self._anchors: tuple[Anchor, ...] = ()
        self._retired: set[tuple[ChainKey, Rule]] = set()  # anchors of ours that are not desired any more
        self._kernel: dict[ChainKey, Rules] = {}
        self._others: dict[ChainKey, list[Rule]] | None = None  # chains that are not ours, while anchors are unchecked
        self._candidates: set[ChainKey] | None = None  # chains that may differ; None is all of them
        self._errors: dict[ChainKey, str] = {}
        self._generation: object = None  # left behind by our last look or write; None: look first
        self._has_looked = False
        self._repairing = False  # what is being written answers to somebody else's change
        self._look_again = False  # somebody may have written while we did

    def set_desired(self, ruleset: Ruleset, changed: Iterable[ChainKey] | None) -> None:
        """Take a new desired state; see ``NetfilterReconciler.set_desired``."""
        self._desired = ruleset
        if changed is None:
            self._candidates = None
            self._errors.clear()
        else:
            ours = {key for key in changed if key.family == self.family}
            for key in ours & self._errors.keys():
                del self._errors[key]
            if self._candidates is not None:
                self._candidates |= ours
        anchors = tuple(anchor for anchor in ruleset.anchors if anchor.chain.family == self.family)
        if anchors != self._anchors:
            self._retired |= {(anchor.chain, anchor.rule) for anchor in self._anchors}
            self._retired -= {(anchor.chain, anchor.rule) for anchor in anchors}
            self._anchors = anchors
            self.forget()  # where they go depends on what others have put there

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel."""
        return self._desired is not None and bool(self._generation is None or self._candidates != set() or self._errors)

    def forget(self) -> None:
        """Trust no memory: observe before the next comparison."""
        self._generation = None

    def drifted(self) -> bool:
        """Whether somebody else wrote since our last look or write; the next sync then observes.

        After a repair the answer is yes once more: who breaks one thing often breaks another a moment later, and what came in
        while we wrote cannot be told from our own writing by the generation.
        """
        if self._look_again:
            self._look_again = False
            self.forget()
        if self._desired is not None and self._generation is not None:
            try:
                if self._port.generation(self.family) != self._generation:
                    self.forget()
            except KernelStateError:
                self.forget()
        return self._desired is not None and self._generation is None

    def plan(self) -> Plan:
        """Return what has to be written, after observing where memory cannot be trusted. Raises KernelStateError."""
        if self._desired is None:
            return Plan()
        if self._generation is None or self._port.generation(self.family) != self._generation:
            self._observe()
        if self._candidates is None:
            desired = dict.fromkeys([key for key in self._desired.chains if key.family == self.family])
            keys = [*desired, *sorted(key for key in self._kernel if key not in desired)]
        else:
            keys = sorted(self._candidates)
        if self._errors:
            keys = [key for key in keys if key not in self._errors]
        return Plan((*self._anchor_changes(), *self._chain_changes(keys)))

    def sync(self) -> Done:
        """Write what differs; what the kernel refuses is contained and returned as one error line for each chain."""
        if self._desired is None:
            return 0, []
        done = 0
        try:
            self._repairing = False
            plan = self.plan()
            refused_before = sorted(self._errors)
            if plan:
                done += self._write(plan)
            retry = Plan(tuple(self._chain_changes(refused_before)))
            refused = write_in_steps(retry, self._apply)
            done += len(retry.changes) - len(refused)
            self._errors = {key: words for key, words in self._errors.items() if key not in refused_before} | refused
        except KernelStateError as error:
            self._candidates = None
            self.forget()
            return done, [*self._errors.values(), f"sync IPv{self.family} packet filter: {error}"]
        self._candidates = set()
        self._others = None
        if any(not self._ownership.owns(key.name) for key in self._errors):
            self.forget()  # a refused anchor: where it has to go must be looked up again
        return done, list(self._errors.values())

    def cleanup(self) -> Done:
        """Remove all rules and chains of ours, desired or not."""
        try:
            self._observe()
            doors = self._others or {}
            anchors = [RemoveAnchor(key, rule) for key, rules in doors.items() for rule in rules if self._is_ours(key, rule)]
            plan = Plan((*anchors, *map(Delete, sorted(self._kernel))))
            refused = write_in_steps(plan, self._apply)
        except KernelStateError as error:
            return 0, [f"clean up IPv{self.family} packet filter: {error}"]
        finally:
            self._candidates = None
            self.forget()
        return len(plan.changes) - len(refused), list(refused.values())

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _observe(self) -> None:
        """Replace memory by what the kernel holds. The generation is read first: a write in between is then noticed."""
        self._repairing, self._has_looked = self._has_looked, True
        generation = self._port.generation(self.family)
        desired = self._desired.chains if self._desired else {}
        seen = self._port.observe(self.family, desired)
        doors = {anchor.chain for anchor in self._anchors} | {key for key, _ in self._retired}
        others: dict[ChainKey, list[Rule]] = defaultdict(list)
        for anchor in seen.anchors:
            others[anchor.chain].append(anchor.rule)
        self._kernel = {}
        for key, rules in seen.chains.items():
            if self._ownership.owns(key.name):
                wanted = desired.get(key)
                self._kernel[key] = wanted if wanted is not None and wanted == rules else rules
            elif key in doors:
                others[key] = list(rules)
        self._others = {**{key: [] for key in doors}, **others}
        self._candidates = None
        self._errors = {key: words for key, words in self._errors.items() if self._ownership.owns(key.name)}
        self._generation = generation

    def _chain_changes(self, keys: Iterable[ChainKey]) -> Iterator[Replace | Edit | Delete]:
        return diff_chains(self._kernel, self._desired.chains if self._desired else {}, keys)

    def _anchor_changes(self) -> Iterator[RemoveAnchor | InsertAnchor]:
        for key, rules in sorted((self._others or {}).items()):
            anchors = [anchor for anchor in self._anchors if anchor.chain == key]
            yield from diff_anchors(key, rules, anchors, lambda rule, key=key: self._is_ours(key, rule))  # type: ignore[misc]

    def _is_ours(self, key: ChainKey, rule: Rule) -> bool:
        if self._ownership.claims(rule) or (key, rule) in self._retired:
            return True
        return any(anchor.chain == key and anchor.rule == rule for anchor in self._anchors)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self, plan: Plan) -> int:
        """Apply a plan in one text, or contained when that is refused; returns how many changes were made."""
        try:
            self._apply(plan)
        except KernelRefusedError as error:
            if error.line == 0:  # not about any line: the lock, the tool, the table as a whole
                raise
        else:
            return len(plan.changes)
        self._observe()  # a table before the refused one is committed
        plan = self.plan()
        refused = write_in_steps(plan, self._apply)
        self._errors.update(refused)
        return len(plan.changes) - len(refused)

    def _apply(self, plan: Plan) -> None:
        """Write a plan and remember it. Raises KernelRefusedError."""
        self._look_again |= self._repairing or self._port.generation(self.family) != self._generation
        self._port.apply(self.family, plan.text())
        # Read at once, and only after a write of our own: whatever somebody else does later is news.
        self._generation = self._port.generation(self.family)
        for change in plan.changes:
            if isinstance(change, (Replace, Edit)):  # a union costs five times as much, for each chain
                self._kernel[change.key] = change.rules
            elif isinstance(change, Delete):
                self._kernel.pop(change.key, None)
