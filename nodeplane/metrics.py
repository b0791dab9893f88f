"""What is counted: kube-proxy's metrics under their own names, and what nodeplane adds.

    kubeproxy_*   as kube-proxy 1.36 has them, where the same thing exists here
    nodeplane_*   each part of the kernel by itself, objects, policies, peers, the configuration
    process_*     of the agent's process

Both families are written in one go here, so what kube-proxy measures for each is measured once, and said of each family in use. Not
there: ``..._partial_restore_failures_total`` (nothing falls back to a full restore), ``..._iptables_last`` (rules are edited one by
one), the two counters that need nfacct, and Go's own. Source: kube-proxy pkg/proxy/metrics.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.metadata import version
from itertools import chain

from clusterstate.objects import EndpointSlice
from clusterstate.snapshot import Snapshot, Update
from kernelstate.ports import SyncReport
from nodeplane.attendant import Attendant, Round
from nodeplane.exposition import Numbers, Registry
from nodeplane.pipeline import Desired, Pipeline

FAMILIES = {4: "IPv4", 6: "IPv6"}
SYNC_BUCKETS = tuple(0.001 * 2**i for i in range(15))
PROGRAMMING_BUCKETS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
_P = "kubeproxy_sync_proxy_rules_"
_FAMILY = ("ip_family",)
_PAGE, _TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class NodeMetrics(Attendant):
    """Counts what the agent does. ``print`` may be called from any thread, the rest from the agent's."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._began = clock, clock()
        self.registry = registry = Registry()
        self.pipeline: Pipeline | None = None
        self._snapshot: Snapshot | None = None
        self._queued_at = 0.0
        """Since when a change waits to be programmed; 0: none does."""
        self._waiting: list[EndpointSlice] = []
        """Slices that changed since the last write that worked."""
        self._make_kubeproxy(registry)
        self._make_own(registry)

    def _make_kubeproxy(self, registry: Registry) -> None:
        histogram, gauge, counter = registry.histogram, registry.gauge, registry.counter
        self._duration = histogram(f"{_P}duration_seconds", "Time of one write to the kernel.", SYNC_BUCKETS, _FAMILY)
        self._full = histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds", "Of those that compare everything.", SYNC_BUCKETS, _FAMILY
        )
        self._partial = histogram(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds", "Of those that write what changed.", SYNC_BUCKETS, _FAMILY
        )
        self._last = gauge(f"{_P}last_timestamp_seconds", "When the kernel was last as desired.", _FAMILY)
        self._queued = gauge(f"{_P}last_queued_timestamp_seconds", "When a change last came in.", _FAMILY)
        self._programming = histogram(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of a pod or Service to its being in the kernel.",
            PROGRAMMING_BUCKETS,
            _FAMILY,
        )
        self._slice_changes = counter(f"{_P}endpoint_changes_total", "EndpointSlices that came, changed or went.")
        self._slices_pending = gauge(f"{_P}endpoint_changes_pending", "Of these, not in the kernel yet.")
        self._service_changes = counter(f"{_P}service_changes_total", "Services that came, changed or went.")
        self._services_pending = gauge(f"{_P}service_changes_pending", "Of these, not in the kernel yet.")
        self._no_local = gauge(
            f"{_P}no_local_endpoints_total", "Ports with policy Local and no endpoint here.", ("traffic_policy", "ip_family")
        )
        self._restore_failures = counter(f"{_P}iptables_restore_failures_total", "Writes of rules that failed.", _FAMILY)
        self._nftables_failures = counter(f"{_P}nftables_sync_failures_total", "Writes of tables that failed.", _FAMILY)
        self._rules = gauge(f"{_P}iptables_total", "Rules of ours.", ("table", "ip_family"))
        self.healthz = counter("kubeproxy_proxy_healthz_total", "Answers at /healthz.", ("code",))
        self.livez = counter("kubeproxy_proxy_livez_total", "Answers at /livez.", ("code",))
        self._conntrack = histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds", "Time of looking for stale flows.", SYNC_BUCKETS, _FAMILY
        )
        self._ended = counter("kubeproxy_conntrack_reconciler_deleted_entries_total", "Flows that were ended.", _FAMILY)

    def _make_own(self, registry: Registry) -> None:
        gauge, counter, part = registry.gauge, registry.counter, ("part",)
        gauge("nodeplane_build_info", "The program's version.", ("version",)).set(1, version("nodeplane"))
        self._info = gauge("nodeplane_info", "What this node is set to.", ("node", "mode", "iptables", "overlay", "engine"))
        self._part_seconds = counter("nodeplane_part_sync_seconds_total", "Time spent on a part of the kernel.", part)
        self._part_syncs = counter("nodeplane_part_syncs_total", "How often a part was brought to what is desired.", part)
        self._part_changes = counter("nodeplane_part_changes_total", "Changes written to a part.", part)
        self._part_failures = counter("nodeplane_part_failures_total", "Errors of a part.", part)
        self._dirty = gauge("nodeplane_part_dirty", "1 for a part that is known to differ from what is desired.", part)
        self._synced = gauge("nodeplane_synced", "1 while the kernel is as desired.")
        self._lag = gauge("nodeplane_lag_seconds", "How long the oldest change has waited that is not in the kernel; 0: none.")
        self._objects = gauge("nodeplane_objects", "Objects known.", ("kind",))
        self._from_file = gauge("nodeplane_objects_kept", "1 while objects come from the file kept over reboots.")
        self._complaints = gauge("nodeplane_complaints", "Lines of `nodeplane status`, by their heading.", ("kind",))
        self._counts = gauge("nodeplane_programmed", "What this node programs.", ("what",))
        self._peers = gauge("nodeplane_peers", "Other nodes in the overlay, by the way to them.", ("reach",))
        self._told = gauge("nodeplane_told_pods", "Pods whose addresses are known from their start alone.")
        self.told: Callable[[], int] = lambda: 0
        self._refused = gauge("nodeplane_config_refused", "1 while the configuration file is not the one in force.")
        self.refused: Callable[[], bool] = lambda: False
        self._lease_until = gauge(
            "nodeplane_lease_until_seconds", "When this node's lease in etcd ends; 0: never.", ("subnets",)
        )
        self._process = (
            gauge("process_start_time_seconds", "When the process started."),
            counter("process_cpu_seconds_total", "Its processor time."),
            gauge("process_resident_memory_bytes", "Its memory."),
            gauge("process_open_fds", "Its descriptors."),
        )
        self._process[0].set(self._began)

    # -- the agent at work -------------------------------------------------------------------------------------------

    def taken(self, update: Update, desired: Desired) -> None:
        """Count what changed, and note since when it waits."""
        now = self._clock()
        first, self._snapshot = self._snapshot is None, update.snapshot
        services, slices = _changes(update, first=first)
        self._service_changes.add(by=services)
        self._services_pending.add(by=services)
        self._slice_changes.add(by=slices)
        self._slices_pending.add(by=slices)
        if update.changed is None or update.changed:
            self._queued_at = self._queued_at or now
            for family in desired.families:
                self._queued.set(now, FAMILIES[family])
        self._waiting += _changed_slices(update)

    def synced(self, made: Round) -> None:
        """Note what a write did, and how long."""
        families = [FAMILIES[family] for family in made.status.families]
        for family in families:
            for histogram in (self._duration, self._full if made.full else self._partial):
                histogram.observe(made.seconds, family)
        for report in made.reports:
            self._note(report, families)
        self._dirty.replace({(part,): 1.0 for part in made.status.pending})
        if not made.errors:
            self._arrived(families)
        self._say(made)

    def _note(self, report: SyncReport, families: list[str]) -> None:
        self._part_seconds.add(report.part, by=report.seconds)
        self._part_syncs.add(report.part)
        self._part_changes.add(report.part, by=report.changed)
        self._part_failures.add(report.part, by=len(report.errors))
        if report.part == "conntrack":
            for family in families:
                self._conntrack.observe(report.seconds, family)
                self._ended.add(family, by=report.changed if family == families[0] else 0)
        failures = {"netfilter": self._restore_failures, "nftables": self._nftables_failures}.get(report.part)
        if failures is not None:
            for family in families:
                failures.add(family, by=any(family in line for line in report.errors))

    def _arrived(self, families: Iterable[str]) -> None:
        """All that was taken is in the kernel."""
        now = self._clock()
        for one in self._waiting:
            caused = _seconds(one.changed_at)
            if caused >= self._began:  # what is older waited for this agent to start, not for it to work
                self._programming.observe(max(0.0, now - caused), FAMILIES[one.family])
        self._waiting = []
        self._queued_at = 0.0
        self._services_pending.set(0)
        self._slices_pending.set(0)
        for family in families:
            self._last.set(now, family)

    def _say(self, made: Round) -> None:
        status = made.status
        kinds = ("errors", "object_errors", "problems", "pending")
        self._complaints.replace({(kind,): float(len(getattr(status, kind))) for kind in kinds})
        self._info.replace({(status.node, status.mode, status.iptables_variant, status.overlay, status.engine): 1.0})
        self._synced.set(status.synced)
        self._from_file.set(bool(status.kept))
        counts = ("services", "endpoints", "chains", "rules", "elements", "servers", "policies", "isolated")
        self._counts.replace({(name,): float(getattr(status, name)) for name in counts})
        self._peers.replace({(reach,): float(n) for reach, n in Counter(p.reach for p in status.peers).items()})
        if status.lease is not None:
            self._lease_until.replace({(", ".join(status.lease.subnets),): status.lease.until})

    # -- who asks ----------------------------------------------------------------------------------------------------

    def print(self) -> bytes:
        """Return everything as text; what costs something to count is counted now, in the asker's thread."""
        snapshot, pipeline = self._snapshot, self.pipeline
        self._lag.set(max(0.0, self._clock() - self._queued_at) if self._queued_at else 0.0)
        self._told.set(self.told())
        self._refused.set(self.refused())
        if snapshot is not None:
            self._objects.replace({(kind,): float(number) for kind, number in _numbers(snapshot).items()})
        if pipeline is not None:
            _set(self._no_local, _without_local(pipeline))
            _set(self._rules, _rules_by_table(pipeline))
        self._measure_process()
        return self.registry.print()

    def _measure_process(self) -> None:
        _, cpu, memory, descriptors = self._process
        cpu.set(time.process_time())
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            memory.set(int(file.read().split()[1]) * _PAGE)
        descriptors.set(len(os.listdir("/proc/self/fd")))  # noqa: PTH208


def _changes(update: Update, *, first: bool) -> tuple[int, int]:
    """Return how many Services and slices differ; everything is new to a first snapshot."""
    if update.changed is None:
        slices = update.snapshot.slices.values()
        return (len(update.snapshot.services), sum(map(len, slices))) if first else (0, 0)
    kinds = Counter(ref.kind for ref in update.changed)
    return kinds["Service"], kinds["EndpointSlice"] + kinds["Endpoints"]


def _changed_slices(update: Update) -> list[EndpointSlice]:
    if update.changed is None or update.service_changed is None:
        return []
    groups = (update.snapshot.slices.get(name) for name in update.service_changed)
    slices = chain.from_iterable(group.values() for group in groups if group is not None)
    return [one for one in slices if one.changed_at and one.ref in update.changed]


def _seconds(stated: str) -> float:
    try:
        return datetime.fromisoformat(stated).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _numbers(snapshot: Snapshot) -> dict[str, int]:
    return {
        "Service": len(snapshot.services),
        "EndpointSlice": sum(map(len, snapshot.slices.values())),
        "Node": len(snapshot.nodes),
        "Pod": len(snapshot.pods),
        "Namespace": len(snapshot.namespaces),
        "NetworkPolicy": len(snapshot.policies),
        "ServiceCIDR": len(snapshot.service_cidrs),
    }


def _without_local(pipeline: Pipeline) -> Counter[tuple[str, ...]]:
    """Count ports of Services with a policy Local, endpoints somewhere, and none here."""
    found: Counter[tuple[str, ...]] = Counter()
    for entries in list(pipeline.compiler.entries.values()):
        for entry in entries:
            if entry.has_any and not entry.local:
                found["internal", FAMILIES[entry.family]] += entry.internal_local
                found["external", FAMILIES[entry.family]] += entry.external_local
    return found


def _rules_by_table(pipeline: Pipeline) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for key, rules in pipeline.chains():
        found[key.table, FAMILIES[key.family]] += len(rules)
    return found


def _set(numbers: Numbers, counted: Counter[tuple[str, ...]]) -> None:
    numbers.replace({labels: float(number) for labels, number in counted.items()})
