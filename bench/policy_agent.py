"""The real agent of ``control.py`` with policies alone: every step measured, and counted what it comes to.

                                  nftables                      iptables
    read      files to a snapshot FileSource                    FileSource
    compile   to the policy table PolicyCompiler                PolicyCompiler
    render    to what should be   NftablesPolicyProgram         IptablesPolicyProgram
    plan      to changes          TableKeeper.sync              IpsetReconciler.sync, FamilyFilter.plan
    print     to what is written  NftablesPort.load, .fill      LinuxIpset.apply, Plan.text
    kernel    not the agent's     libnftables, netlink          netlink; iptables-legacy-restore, a process of its own

Both modes write to the current network namespace. Connections that a change forbids are looked for behind these steps, by whoever
runs the agent; they depend on the node's traffic and are not in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from bench.cluster import NODE
from bench.control import MeasuredAgent, Work
from bench.ports import Written
from bench.stages import KERNEL, Door, Stages
from clusterstate.sources.files import FileSource
from kernelstate.diff import Plan
from kernelstate.diff_sets import AddMembers, CreateSet, DeleteMembers, SetChange
from kernelstate.linux.ipset import LinuxIpset
from kernelstate.linux.iptables import IptablesPort
from kernelstate.linux.nfnetlink import NfNetlink
from kernelstate.linux.nft_library import Library
from kernelstate.linux.nftables import NftablesPort
from kernelstate.objects.address import Family
from kernelstate.objects.nftables import Chain, Data, ElementKey, NamedSet, TableKey
from kernelstate.ownership import Ownership
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_family import FamilyFilter
from kernelstate.reconcile_nftables import NftablesReconciler
from kernelstate.reconcile_sets import IpsetReconciler
from kernelstate.reconcile_table import TableKeeper
from netpolicy.compile import PolicyCompiler
from netpolicy.render.iptables import ISOLATED, PREFIXES, IptablesPolicyProgram
from netpolicy.render.nftables import NAMES, NftablesPolicyProgram
from nodeplane.config import NodeConfig
from nodeplane.kernel import NodeKernel
from nodeplane.pipeline import OWNERSHIP

COMMON: tuple[Door, ...] = (
    (FileSource, "load", "read"),
    (FileSource, "poll", "read"),
    (PolicyCompiler, "update", "compile"),
)
DOORS: Mapping[str, tuple[Door, ...]] = {
    "nftables": (
        *COMMON,
        (NftablesPolicyProgram, "update", "render"),
        (TableKeeper, "sync", "plan"),
        (NftablesPort, "load", "print"),
        (NftablesPort, "fill", "print"),
        (Library, "run", KERNEL),
        (NfNetlink, "commit", KERNEL),
    ),
    "iptables": (
        *COMMON,
        (IptablesPolicyProgram, "update", "render"),
        (IpsetReconciler, "sync", "plan"),
        (FamilyFilter, "plan", "plan"),
        (Plan, "text", "print"),
        (LinuxIpset, "apply", "print"),
        (NfNetlink, "execute", KERNEL),
        (IptablesPort, "apply", KERNEL),
    ),
}
"""Where stages begin, by policy mode."""


class Counted(msgspec.Struct, frozen=True):
    """What one change came to: chains and sets that are made, written again or gone, and elements of sets that stay."""

    chains: int
    sets: int
    elements: int


class PolicyAgent(MeasuredAgent):
    """An agent that enforces policies through ``mode`` and leaves Services alone; use inside ``stages.watching()``."""

    def __init__(self, path: Path, mode: str, stages: Stages) -> None:
        self._put_together(path, NodeConfig(NODE, None, policy=mode), stages)

    def _kernel(self, config: NodeConfig, written: Written) -> NodeKernel:
        netfilter = NetfilterReconciler(_CountingRules(written), OWNERSHIP)
        if config.policy == "nftables":
            return NodeKernel(netfilter, policies=NftablesReconciler(_CountingTables(written), NAMES, "policies"))
        ownership = Ownership(prefixes=(ISOLATED, *PREFIXES))
        return NodeKernel(netfilter, policies=IpsetReconciler(_CountingSets(written), ownership, "policies"))

    def change(self) -> tuple[Work, Counted]:
        """Take in what has changed on disk since; return what it cost, and what the renderer said may differ.

        Sets that no rule refers to any more are destroyed afterwards, as an agent does within a second: no change finds those of an earlier one.
        """
        work = self.follow()
        desired = self.agent.desired
        assert desired is not None
        assert desired.policy_change is not None, "no policy or pod has changed"
        update = desired.policy_change
        if self.agent.kernel.drifted():
            self.agent.sync()
        tables = update.tables.values()
        return work, Counted(
            chains=len(update.chains) + sum(len(table.chains) for table in tables),
            sets=len(update.sets) + sum(len(table.sets) for table in tables),
            elements=sum(len(one.added) + len(one.removed) for one in update.members)
            + sum(len(keys) for table in tables for name, keys in table.elements.items() if name not in table.sets),
        )


class _CountingTables(NftablesPort):
    """The kernel's tables; keeps texts and counts elements that go without one."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self._written = written

    def apply(self, text: str) -> None:
        self._written.texts.append(text)
        super().apply(text)

    def load(self, key: TableKey, named: NamedSet, elements: Mapping[ElementKey, Data]) -> None:
        self._written.elements += len(elements)
        super().load(key, named, elements)

    def fill(self, key: TableKey, sets: Mapping[str, NamedSet], chains: Mapping[str, Chain]) -> None:
        self._written.elements += len(sets) + sum(len(chain.rules) for chain in chains.values())
        super().fill(key, sets, chains)


class _CountingSets(LinuxIpset):
    """The kernel's ipsets; counts sets that are made, and members."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self._written = written

    def apply(self, changes: Sequence[SetChange]) -> str:
        self._written.elements += sum(len(one.members) for one in changes if isinstance(one, AddMembers | DeleteMembers))
        self._written.elements += sum(isinstance(one, CreateSet) for one in changes)
        return super().apply(changes)


class _CountingRules(IptablesPort):
    """The kernel's rules, through iptables-legacy; keeps texts."""

    def __init__(self, written: Written) -> None:
        super().__init__("legacy")
        self._written = written

    def apply(self, family: Family, restore_text: str) -> None:
        self._written.texts.append(restore_text)
        super().apply(family, restore_text)
