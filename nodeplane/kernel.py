"""Every part of the kernel that a node's agent keeps as desired, in the order in which it is written.

Whoever is asked first must be there first: tables and servers before the rules that lead to them.

    mode iptables    policies, links, tunnel, packet filter
    mode nftables    policies, links, tunnel, nftables, packet filter
    mode ebpf        policies, links, tunnel, nftables, programs at sockets, packet filter, short lane
    mode ipvs        policies, links, tunnel, sets, virtual servers, addresses of kube-ipvs0, packet filter

Policies are a table of nftables, or sets that rules of the packet filter ask.

The tunnel is what stands behind and beside the links: the forwarder behind a TUN, and programs at the TUN and at the uplink.

``retired`` are the parts that only other modes use. They are emptied once this mode is in place, so that a node which changes
its mode answers all the time, and nothing of the old mode is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kernelstate.diff_ipvs import IpvsOwnership
from kernelstate.errors import KernelStateError
from kernelstate.objects.address import Family
from kernelstate.objects.tunnel import TunnelState
from kernelstate.ports import Reconciler, SyncReport
from kernelstate.reconcile import NetfilterReconciler
from kernelstate.reconcile_forwarder import ForwarderReconciler
from kernelstate.reconcile_links import LinkReconciler
from kernelstate.reconcile_nftables import NftablesReconciler
from nodeplane.pipeline import Desired
from nodeplane.service_programs import ServiceChange, ServiceState

if TYPE_CHECKING:
    from kernelstate.reconcile_addresses import AddressReconciler
    from kernelstate.reconcile_ebpf import SocketReconciler
    from kernelstate.reconcile_ipvs import IpvsReconciler
    from kernelstate.reconcile_lane import LaneReconciler
    from kernelstate.reconcile_sets import IpsetReconciler
    from kernelstate.reconcile_tunnel import TunnelReconciler


class IpvsParts(NamedTuple):
    """What mode ``ipvs`` needs besides rules."""

    sets: IpsetReconciler
    servers: IpvsReconciler
    addresses: AddressReconciler

    def set_desired(self, services: ServiceState, change: ServiceChange | None, ownership: IpvsOwnership) -> None:
        """Tell each what should exist."""
        self.sets.set_desired(services.sets, None if change is None else change.sets)
        self.servers.set_desired(services.servers, None if change is None else change.servers, ownership)
        self.addresses.set_desired(services.addresses, None if change is None else change.addresses)


class TunnelParts(NamedTuple):
    """The kernel's programs at the tunnel and at the uplink, and which of them are wanted and can be had."""

    programs: TunnelReconciler
    wraps: bool
    guards: bool

    def set_desired(self, state: TunnelState) -> None:
        """Tell what should be done; what is not wanted, and an earlier agent left, is taken off."""
        self.programs.set_desired(TunnelState(state.udp if self.wraps else None, state.guard if self.guards else None))


class NodeKernel:
    """The reconcilers of one node, behind one face."""

    def __init__(
        self,
        netfilter: NetfilterReconciler,
        *,
        links: LinkReconciler | None = None,
        forwarder: ForwarderReconciler | None = None,
        tunnel: TunnelParts | None = None,
        overlay_tables: NftablesReconciler | None = None,
        policies: NftablesReconciler | IpsetReconciler | None = None,
        nftables: NftablesReconciler | None = None,
        ipvs: IpvsParts | None = None,
        sockets: SocketReconciler | None = None,
        lane: LaneReconciler | None = None,
        families: Sequence[Family] = (4, 6),
        retired: Sequence[Reconciler] = (),
    ) -> None:
        self.netfilter, self.links, self.nftables, self.ipvs = netfilter, links, nftables, ipvs
        self.forwarder, self.tunnel = forwarder, tunnel
        self.overlay_tables, self.policies, self.sockets = overlay_tables, policies, sockets
        self.lane = lane
        self.families = tuple(families)
        """The families whose packet filter this kernel has."""
        self.retired = list(retired)
        self._has_policies = False

    @property
    def parts(self) -> list[Reconciler]:
        """The parts in the order in which they are written."""
        programs = self.tunnel.programs if self.tunnel else None
        overlay: list[Reconciler | None] = [self.policies, self.links, self.forwarder, programs, self.overlay_tables]
        found: list[Reconciler | None] = [*overlay, self.nftables, *(self.ipvs or ()), self.sockets, self.netfilter, self.lane]
        return [part for part in found if part is not None]

    @property
    def policy_parts(self) -> tuple[str, ...]:
        """The names of the parts that have to be right before policies are in force."""
        if self.policies is None:
            return ()
        through_rules = not isinstance(self.policies, NftablesReconciler)
        return (self.policies.part, self.netfilter.part) if through_rules else (self.policies.part,)

    def set_desired(self, desired: Desired) -> None:
        """Tell every part what should exist; nothing is written yet."""
        # A family that is not in use is looked after as well: what an earlier agent left in it goes.
        families = sorted({*self.families, *desired.families})
        self.netfilter.set_desired(desired.ruleset, desired.changed_chains, families)
        change = desired.service_change
        if self.nftables is not None:
            self.nftables.set_desired(desired.services.tables, change.tables if change else None)
        if self.ipvs is not None:
            self.ipvs.set_desired(desired.services, change, desired.ipvs_ownership)
        if self.sockets is not None:
            self.sockets.set_desired(desired.services.sockets, change.sockets if change else None)
        if self.links is not None and desired.links is not None:
            self.links.set_desired(desired.links)
        if self.forwarder is not None and desired.tunnel is not None:
            self.forwarder.set_desired(desired.tunnel.udp)
        if self.tunnel is not None and desired.tunnel is not None:
            self.tunnel.set_desired(desired.tunnel)
        if self.overlay_tables is not None:
            self.overlay_tables.set_desired(desired.overlay_tables)
        self._set_policies(desired)
        if self.lane is not None:
            pods = desired.policies.pods.values() if desired.policies is not None else ()
            self.lane.set_judged((address.version, int(address)) for pod in pods for address in pod.addresses)

    def _set_policies(self, desired: Desired) -> None:
        """Tell what policies become: before the first time everything may differ, afterwards what is named, or nothing."""
        state, change = desired.policy_state, desired.policy_change
        if isinstance(self.policies, NftablesReconciler):
            tables = change.tables if change is not None else {}
            self.policies.set_desired(state.tables, tables if self._has_policies else None)
        elif self.policies is not None:
            self.policies.set_desired(state.sets, (change.sets if change else ()) if self._has_policies else None)
            if change is not None and self._has_policies:
                self.policies.exchange(change.members)
        self._has_policies = True

    def sync(self) -> list[SyncReport]:
        """Write what differs, part by part, then empty what is retired."""
        reports = [timed(part.sync) for part in self.parts]
        if self.retired and all(report.ok for report in reports):
            reports += self._retire()
        return reports

    def renew(self) -> SyncReport:
        """Let no packet go by what was before something changed."""
        error = self.lane.renew() if self.lane is not None else ""
        return SyncReport("lane", 0, (error,) if error else ())

    def _retire(self) -> list[SyncReport]:
        """Empty the parts of other modes; what fails is tried again at the next sync."""
        reports = []
        for part in tuple(self.retired):
            try:
                report = timed(part.cleanup)
            except KernelStateError as error:
                report = SyncReport(part.part, 0, (str(error),))
            if report.ok:
                self.retired.remove(part)
            reports.append(report)
        return reports

    @property
    def dirty(self) -> tuple[str, ...]:
        """The parts of which something desired is known not to be in the kernel."""
        return tuple(part.part for part in self.parts if part.dirty)

    def drifted(self) -> bool:
        """Ask every part whether somebody else changed something; all are asked, for that also takes in their events."""
        answers = [part.drifted() for part in self.parts]
        return any(answers)

    def forget(self) -> None:
        """Trust no memory of what only a full look shows: the next sync observes rules, tables, servers, the forwarder's peers."""
        parts = (
            self.netfilter,
            self.policies,
            self.forwarder,
            self.overlay_tables,
            self.nftables,
            *(self.ipvs or ()),
            self.sockets,
            self.lane,
        )
        for part in parts:
            if part is not None:
                part.forget()


def timed(write: Callable[[], SyncReport]) -> SyncReport:
    """Return what a write reports, and how long it took."""
    started = time.perf_counter()
    report = write()
    return msgspec.structs.replace(report, seconds=time.perf_counter() - started)
