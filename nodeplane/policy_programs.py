"""One shape for what policies ask of the kernel: the programs that render them, side by side.

    policy.mode   chains, anchors and sets   tables
    nftables                                 all of it
    iptables      all of it

As with Services, the pipeline moves along whichever the configuration names, and a change names what may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import msgspec

from kernelstate.diff_sets import MemberChange
from kernelstate.objects.address import Family
from kernelstate.objects.netfilter import Anchor, ChainKey, Rule
from kernelstate.objects.nftables import Table, TableChange
from kernelstate.objects.sets import IpSets
from netpolicy.compile import PolicyChange
from netpolicy.render.denied import DeniedLog
from netpolicy.table import PolicyTable


class PolicyState(msgspec.Struct, frozen=True):
    """What should exist for policies. The mappings are the program's own, updated in place."""

    chains: dict[ChainKey, tuple[Rule, ...]] = {}
    anchors: tuple[Anchor, ...] = ()
    sets: IpSets = {}
    tables: Mapping[Family, Table] = {}


class PolicyUpdate(NamedTuple):
    """A change of policies: in the table of meaning, and what may differ of the state."""

    meaning: PolicyChange
    chains: frozenset[ChainKey] = frozenset()
    sets: frozenset[str] = frozenset()
    """Sets that are new, or gone."""
    members: tuple[MemberChange, ...] = ()
    """Of the others."""
    tables: Mapping[Family, TableChange] = {}


class PolicyProgram(Protocol):
    """Rendered policies, moved along by changes."""

    @property
    def state(self) -> PolicyState:
        """What should exist now."""

    def update(self, table: PolicyTable, meaning: PolicyChange) -> PolicyUpdate:
        """Take in a change of the policy table and say what may differ now."""


class NftablesPolicies:
    """Policy mode ``nftables``."""

    def __init__(self, log: DeniedLog | None) -> None:
        from netpolicy.render.nftables import NftablesPolicyProgram  # noqa: PLC0415 (only where the mode asks for it)

        self._program = NftablesPolicyProgram(log)

    @property
    def state(self) -> PolicyState:
        """See ``PolicyProgram``."""
        return PolicyState(tables=self._program.tables)

    def update(self, table: PolicyTable, meaning: PolicyChange) -> PolicyUpdate:
        """See ``PolicyProgram``."""
        return PolicyUpdate(meaning, tables=self._program.update(table, meaning))


class IptablesPolicies:
    """Policy mode ``iptables``."""

    def __init__(self, log: DeniedLog | None) -> None:
        from netpolicy.render.iptables import IptablesPolicyProgram  # noqa: PLC0415 (only where the mode asks for it)

        self._program = IptablesPolicyProgram(log)

    @property
    def state(self) -> PolicyState:
        """See ``PolicyProgram``."""
        return PolicyState(self._program.chains, self._program.anchors, self._program.sets)

    def update(self, table: PolicyTable, meaning: PolicyChange) -> PolicyUpdate:
        """See ``PolicyProgram``."""
        return PolicyUpdate(meaning, *self._program.update(table, meaning))


POLICY_PROGRAMS: dict[str, Callable[[DeniedLog | None], PolicyProgram]] = {
    "iptables": IptablesPolicies,
    "nftables": NftablesPolicies,
}
"""The program of each policy mode."""
