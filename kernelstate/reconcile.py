"""Keeps the packet filter as desired: remembers what the kernel holds, compares what changed, writes the difference.

      set_desired(ruleset, changed)                    somebody else
               |                                             | iptables -F
               v                                             v
      desired chains --diff--> plan --text--> port.apply --> kernel --observe--> remembered chains
               ^                  |                             |
               |                  +-- refused: piece by piece   +-- generation: has anybody else written?
               +-- dirty keys, errors

Here is what the agent drives: both families behind one face. When to look at the kernel, when memory is enough and how a
refusal is contained is decided per family in ``reconcile_family.py``; what the difference is in ``diff.py``; what is ours in
``ownership.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from kernelstate.objects.address import Family
from kernelstate.objects.netfilter import ChainKey, Ruleset
from kernelstate.ownership import Ownership
from kernelstate.ports import NetfilterPort, SyncReport
from kernelstate.reconcile_family import FamilyFilter

FAMILIES: tuple[Family, ...] = (4, 6)


class NetfilterReconciler:
    """One variant's packet filter in the current network namespace; implements ``ports.Reconciler``.

    Not safe for use by several threads at once.
    """

    part = "netfilter"

    def __init__(self, port: NetfilterPort, ownership: Ownership, families: Collection[Family] = FAMILIES) -> None:
        self._port = port
        self._ownership = ownership
        self._families = {family: FamilyFilter(family, port, ownership) for family in families}

    def set_desired(
        self, ruleset: Ruleset, changed: Collection[ChainKey] | None = None, families: Collection[Family] | None = None
    ) -> None:
        """Say what shall exist from now on; nothing is written before ``sync``.

        ``changed`` names every chain that differs from the ruleset handed over before, None means any may. ``families`` other
        than these are no longer looked after; by default nothing changes in that.
        """
        if families is not None:
            known = self._families
            self._families = {f: known.get(f) or FamilyFilter(f, self._port, self._ownership) for f in families}
        for state in self._families.values():
            state.set_desired(ruleset, changed)

    @property
    def dirty(self) -> bool:
        """Whether something desired is known not to be in the kernel yet."""
        return any(state.dirty for state in self._families.values())

    def sync(self) -> SyncReport:
        """Write what differs. The first sync, and one after ``drifted`` said so, observes first."""
        return self._report(state.sync for state in self._families.values())

    def forget(self) -> None:
        """Trust no memory: the next ``sync`` observes everything, also what ``drifted`` cannot see; costs a full listing."""
        for state in self._families.values():
            state.forget()

    def verify(self) -> SyncReport:
        """Observe everything and repair what differs."""
        self.forget()
        return self.sync()

    def drifted(self) -> bool:
        """Ask the generation whether anybody else wrote since we did; if so the next ``sync`` observes. Microseconds."""
        return any(state.drifted() for state in self._families.values())

    def cleanup(self) -> SyncReport:
        """Remove every rule and chain of ours; a later ``sync`` would bring them back."""
        return self._report(state.cleanup for state in self._families.values())

    def pending(self) -> dict[Family, str]:
        """Return the text that ``sync`` would hand to iptables-restore now, by family; families in sync are left out."""
        texts = {family: state.plan().text() for family, state in self._families.items()}
        return {family: text for family, text in texts.items() if text}

    def _report(self, steps: Iterable[Callable[[], tuple[int, list[str]]]]) -> SyncReport:
        done = [step() for step in steps]
        return SyncReport(self.part, sum(count for count, _ in done), tuple(line for _, errors in done for line in errors))
