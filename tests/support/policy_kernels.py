"""Policies brought to the kernel in each of the ways there are, and looked at there; for tests that change them one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kernelstate.linux import netns as namespaces
from kernelstate.linux.ipset import LinuxIpset
from kernelstate.linux.iptables import IptablesPort, Variant
from kernelstate.linux.nftables import NftablesPort
from kernelstate.objects.netfilter import Ruleset
from kernelstate.objects.nftables import TableKey
from kernelstate.ownership import Ownership
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_nftables import NftablesReconciler
from kernelstate.reconcile_sets import IpsetReconciler
from netpolicy.compile import PolicyChange
from netpolicy.render.denied import DeniedLog
from netpolicy.render.iptables import CHAIN_NAMES, DENIED, ISOLATED, PREFIXES, IptablesPolicyProgram
from netpolicy.render.nftables import NAMES, NftablesPolicyProgram
from netpolicy.table import PolicyTable


class PolicyKernel(Protocol):
    """One way to enforce policies, in the network namespace in which it was made."""

    def bring(self, table: PolicyTable, change: PolicyChange) -> None:
        """Let the kernel hold what a change of the table comes to, and look whether it does."""

    def close(self) -> None:
        """Let go of it."""


class Nftables:
    """A table for each family."""

    def __init__(self, log: DeniedLog | None = None) -> None:
        self._port = NftablesPort()
        self._reconciler = NftablesReconciler(self._port, NAMES, "policies", in_turn=True)
        self._program = NftablesPolicyProgram(log)
        self.close = self._port.close

    def bring(self, table: PolicyTable, change: PolicyChange) -> None:
        """Let the kernel hold it."""
        self._reconciler.set_desired(self._program.tables, self._program.update(table, change))
        report = self._reconciler.sync()
        assert report.ok, report.errors
        held = {f: self._port.observe(TableKey(f, NAMES[f]), t) for f, t in self._program.tables.items()}
        assert held == self._program.tables


class Iptables:
    """Chains and sets. Sets come first; those that are not wanted go when no rule asks them any more."""

    def __init__(self, node: str, variant: Variant, log: DeniedLog | None = None) -> None:
        self._node, self._sets_port, self._port = node, LinuxIpset(), IptablesPort(variant)
        self._sets = IpsetReconciler(self._sets_port, Ownership(prefixes=(ISOLATED, *DENIED.values(), *PREFIXES)), "policies")
        self._chains = NetfilterReconciler(self._port, Ownership(CHAIN_NAMES, PREFIXES))
        self._program = IptablesPolicyProgram(log)
        self._is_first = True

    def bring(self, table: PolicyTable, change: PolicyChange) -> None:
        """Let the kernel hold it."""
        done = self._program.update(table, change)
        with namespaces.inside(self._node):
            self._sets.set_desired(self._program.sets, None if self._is_first else done.sets)
            if not self._is_first:
                self._sets.exchange(done.members)
            changed = None if self._is_first else done.chains
            self._chains.set_desired(Ruleset(self._program.chains, self._program.anchors), changed, (4, 6))
            for part in (self._sets, self._chains, self._sets):
                report = part.sync()
                assert report.ok, report.errors
            self._is_first = False
            held = self._sets_port.headers()
            assert held.keys() == self._program.sets.keys()
            for name, one in self._program.sets.items():
                assert self._sets_port.members(one.spec) == one.members, name
            for family in (4, 6):
                tables = self._port.observe(family)
                wanted = {key: rules for key, rules in self._program.chains.items() if key.family == family}
                assert {key: tables.chains[key] for key in wanted} == wanted

    def close(self) -> None:
        """Nothing is held open."""


KERNELS: dict[str, Callable[..., PolicyKernel]] = {
    "nftables": lambda _node, log=None: Nftables(log),
    "iptables-legacy": lambda node, log=None: Iptables(node, "legacy", log),
    "iptables-nft": lambda node, log=None: Iptables(node, "nft", log),
}
"""Called in the node's namespace, with its name and how often what is denied is logged."""
