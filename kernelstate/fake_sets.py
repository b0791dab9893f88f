"""ipsets in memory: refuse what the kernel would refuse, and exchange their contents as it does.

Implements ``reconcile_sets.IpsetPort`` for tests that need no kernel. Decides what reconciling relies on: a set holds no more than
its room, one that rules refer to cannot be destroyed, and rules keep asking a name whatever set bears it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernelstate.diff_sets import (
    AddMembers,
    CreateSet,
    DeleteMembers,
    DestroySet,
    SetChange,
    SetHeader,
    SwapSets,
)
from kernelstate.errors import KernelRefusedError
from kernelstate.objects.sets import Member, SetSpec


class FakeIpset:
    """``refuse`` decides which changes fail; ``applied`` lists all that were tried, ``references`` counts rules by set name."""

    def __init__(self, refuse: Callable[[SetChange], bool] = lambda _c: False) -> None:
        self.sets: dict[str, tuple[SetSpec, int, set[Member]]] = {}
        self.references: dict[str, int] = {}
        self.applied: list[SetChange] = []
        self.listings = 0
        self.broken = False
        self.refuse = refuse

    def headers(self) -> dict[str, SetHeader]:
        """Return every set's header."""
        if self.broken:
            raise KernelRefusedError("list", "ipsets", "broken")
        return {
            name: SetHeader(spec, room, len(members), self.references.get(name, 0))
            for name, (spec, room, members) in self.sets.items()
        }

    def members(self, spec: SetSpec) -> frozenset[Member]:
        """Return a set's members."""
        self.listings += 1
        if self.broken or spec.name not in self.sets:
            raise KernelRefusedError("list", f"ipset {spec.name}", "No such file or directory")
        return frozenset(self.sets[spec.name][2])

    def apply(self, changes: Sequence[SetChange]) -> str:
        """Do each until one is refused."""
        if self.broken:
            raise KernelRefusedError("change", "ipsets", "broken")
        for change in changes:
            self.applied.append(change)
            words = "refused by the test" if self.refuse(change) else self._apply(change)
            if words:
                return f"{change}: {words}"
        return ""

    def _apply(self, change: SetChange) -> str:
        match change:
            case CreateSet(spec, room):
                if spec.name in self.sets:
                    return "exists already"
                self.sets[spec.name] = (spec, room, set())
            case AddMembers(spec, members):
                if spec.name not in self.sets:
                    return "No such file or directory"
                _, room, held = self.sets[spec.name]
                held.update(members)
                if len(held) > room:
                    return "set is full"
            case DeleteMembers(spec, members):
                if spec.name not in self.sets:
                    return "No such file or directory"
                self.sets[spec.name][2].difference_update(members)
            case SwapSets(first, second):
                if {first, second} - self.sets.keys():
                    return "No such file or directory"
                one, two = self.sets[first], self.sets[second]
                self.sets[first] = (two[0]._replace(name=first), *two[1:])
                self.sets[second] = (one[0]._replace(name=second), *one[1:])
            case DestroySet(name):
                if self.references.get(name):
                    return "in use by a rule or another set"
                self.sets.pop(name, None)
        return ""
