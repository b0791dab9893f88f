"""The daemon's loop: wait, take the newest snapshot, write what differs, watch that it stays.

    objects change --.                                        .--> kernel.py   links, rules, tables, servers
    links change  ---+--> pipeline: what should be -- sync ---+
    somebody else's  |                                        '--> conntrack   flows to endpoints that are gone
    flush, a timer --'

Nothing is written before the first complete snapshot. The kernel forwards on its own: a killed agent is missed by nobody until
the next change, and a restarted one writes only what differs.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Never, Protocol

import msgspec

from clusterstate.objects import Node
from clusterstate.snapshot import Name, Update
from netpolicy.table import PolicyTable, is_of_cluster
from nodeplane.attendant import Attendant, Round
from nodeplane.config import NodeConfig
from nodeplane.denied import DeniedLogger
from nodeplane.flows import FlowKeeper
from nodeplane.kernel import NodeKernel, timed
from nodeplane.node_servers import Health
from nodeplane.pipeline import Desired, HostFacts, Pipeline
from nodeplane.pod_gate import PodGate
from nodeplane.policy_flows import PolicyFlows
from nodeplane.status import PeerStatus, Status
from proxy.health import HealthEndpoint, Places

log = logging.getLogger("nodeplane.agent")

QUIET = 0.01
"""Seconds without another change after which a burst of changes counts as over."""
BURST = 0.2
"""Seconds after which a burst is taken in whether it is over or not."""
DRIFT_CHECK = 1.0
"""Seconds between two cheap looks for somebody else's changes."""
VERIFY_SHARE = 200
"""At least so many times as long as a full comparison took until the next one."""
RESTS, LONGEST_REST = 4, 1.0
"""After a write the next waits so many times as long as that one took, and seconds at most, where no period is configured: a change is
programmed at once while that is cheap, and a burst takes a fifth of a core; kube-proxy always waits the second."""
RETRY = 2.0
"""Seconds after which what failed is tried again."""


LEAVING = "ToBeDeletedByClusterAutoscaler"
"""The taint of a Node that is about to be taken away."""


class Source(Protocol):
    """Where snapshots come from."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``poll`` may have something."""

    def poll(self) -> Update | None:
        """Return the newest snapshot if it differs from the last; never blocks."""


class Host(Protocol):
    """What the agent asks of the machine besides its reconcilers."""

    def facts(self, node: Node | None) -> HostFacts:
        """Return addresses and uplink as they are now; ``node`` helps to tell which link is the uplink."""

    def use(self, config: NodeConfig) -> None:
        """Go by another configuration from now on; mode and overlay are as before."""

    def prepare(self, desired: Desired) -> Sequence[str]:
        """Set the sysctls and write the files that the desired state relies on; return what failed, one line each."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when links, addresses, routes or neighbours changed."""

    def changed(self) -> bool:
        """Drain that descriptor; whether something changed that concerns us. Never blocks."""


class HealthPort(Protocol):
    """The health check ports of Services."""

    def set(self, endpoints: Mapping[Name, tuple[HealthEndpoint, ...]], places: Places) -> list[str]:
        """Answer for exactly these from now on; return one line for each port that cannot be opened."""


class Agent:
    """One node's agent. Everything it is given is used from the thread that calls ``start`` and ``run``, and only there."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        source: Source,
        host: Host,
        kernel: NodeKernel,
        flows: FlowKeeper | None = None,
        policy_flows: PolicyFlows | None = None,
        health: HealthPort | None = None,
        gate: PodGate | None = None,
        denied: DeniedLogger | None = None,
        attendants: Sequence[Attendant] = (),
        publish: Callable[[Status], None],
        alive: Callable[[], None] = lambda: None,
        status: Status,
        watched: Sequence[int] = (),
    ) -> None:
        self.pipeline, self.source, self.host = pipeline, source, host
        self.kernel, self.flows, self.policy_flows, self.health = kernel, flows, policy_flows, health
        self.gate, self.denied = gate, denied
        self.attendants = list(attendants)
        self.publish, self.status, self.alive = publish, status, alive
        self.watched = tuple(watched)
        """Descriptors that become readable when a reconciler may have drifted."""
        self.desired: Desired | None = None
        self._update: Update | None = None
        self._facts = HostFacts()
        self._failing_since: float | None = None
        self._turned = time.monotonic()
        self._is_full = True
        """Whether the next write compares everything."""
        self._host_errors: tuple[str, ...] = ()
        self._last_end = self._took = 0.0
        self._next_verify = 0.0
        self._retry_at: float | None = None

    # -- one round ---------------------------------------------------------------------------------------------------

    def start(self, update: Update) -> None:
        """Bring the kernel to the first complete snapshot. The collector waits: the first sync makes no garbage cycles."""
        gc.disable()
        self._facts = self.host.facts(self._node(update))
        self.take(update)
        self.sync()
        gc.collect()
        gc.freeze()
        gc.enable()

    def take(self, update: Update) -> None:
        """Compile and render an update and hand the result to the reconcilers; writes nothing yet."""
        if self.gate is not None:
            update = self.gate.amend(update)
        if self.denied is not None:
            self.denied.learn(update.snapshot)
        before, self._update = self.desired, update
        self.desired = desired = self.pipeline.update(update, self._facts)
        if self.flows is not None:
            self.flows.take(desired.stale, time.monotonic())
        if self.policy_flows is not None and desired.policies is not None and desired.policy_change is not None:
            self.policy_flows.take(desired.policies, desired.policy_change.meaning)
        self.kernel.set_desired(desired)
        for attendant in self.attendants:
            attendant.taken(update, desired)
        if before is None or before.peers != desired.peers or before.families != desired.families:
            self._host_errors = tuple(self.host.prepare(desired))

    def sync(self) -> bool:
        """Write what differs and publish the status; True if nothing is left to do."""
        started = time.perf_counter()
        if self._host_errors and self.desired is not None:
            self._host_errors = tuple(self.host.prepare(self.desired))
        reports = self.kernel.sync()
        if self.flows is not None and all(r.ok for r in reports if r.part != "links"):
            flows, local = self.flows, frozenset(self._facts.local_addresses)
            reports.append(timed(lambda: flows.sync(local, time.monotonic())))
        refused = [error for r in reports if r.part in self.kernel.policy_parts for error in r.errors]
        if self.policy_flows is not None and not refused:
            reports.append(self.policy_flows.sync(frozenset(self._facts.local_addresses)))
            if self.gate is not None and self._update is not None:
                self.gate.settle(self._update.snapshot)
        elif self.gate is not None and refused:
            self.gate.fail(refused[0])
        if any(report.changed for report in reports):
            reports.append(self.kernel.renew())
        errors = (*self._host_errors, *(e for r in reports for e in r.errors), *self._open_health_ports())
        written = [f"{r.changed} in {r.part}" for r in reports if r.changed]
        if written:
            log.info("changed %s, %.1f ms", ", ".join(written), 1000 * (time.perf_counter() - started))
        self._last_end = now = time.monotonic()
        if self._next_verify <= now:
            # A full look at a large ruleset takes seconds of CPU: never more than one part in VERIFY_SHARE of all time.
            self._next_verify = now + max(self.pipeline.config.sync_period, VERIFY_SHARE * (time.perf_counter() - started))
        self._retry_at = self._last_end + RETRY if errors else None
        self._failing_since = (self._failing_since or now) if errors else None
        self._publish(errors)
        made = Round(time.perf_counter() - started, tuple(reports), errors, self._is_full, self.status)
        self._is_full = False
        for attendant in self.attendants:
            attendant.synced(made)
        return not errors

    def _open_health_ports(self) -> list[str]:
        """Answer load balancers for exactly the Services that want it; return the ports that cannot be opened."""
        if self.health is None or self.desired is None:
            return []
        return self.health.set(self.desired.health, self.desired.health_places)

    def reconfigure(self, config: NodeConfig) -> None:
        """Go on with a configuration that differs in nothing but settings; the kernel is brought to what it says at once."""
        assert self._update is not None
        self.pipeline.reconfigure(config)
        self.host.use(config)
        nothing: frozenset[Never] = frozenset()
        self.take(msgspec.structs.replace(self._update, changed=nothing, service_changed=nothing))
        if self.desired is not None:
            self._host_errors = tuple(self.host.prepare(self.desired))
        self.accept()
        self.sync()

    def accept(self) -> None:
        """Say in the status that the configuration is the one that is stated."""
        if self.status.refused:
            self.status = msgspec.structs.replace(self.status, refused="")
            self.publish(self.status)

    def refuse(self, why: str) -> None:
        """Say in the status why a new configuration was not taken."""
        self.status = msgspec.structs.replace(self.status, refused=why, refused_at=time.time())
        self.publish(self.status)

    def is_healthy(self) -> bool:
        """Whether Services are kept up to date: for twice the sync period nothing has been failing or stuck. Safe from any thread."""
        since = min(self._turned, self._failing_since or self._turned)
        return time.monotonic() - since < 2 * self.pipeline.config.sync_period

    def node_health(self) -> Health:
        """Return how this node is. Safe from any thread."""
        node, status = self._node(self._update), self.status
        eligible = node is not None and not node.deleting and LEAVING not in node.taints
        return Health(self.is_healthy(), eligible, status.last_good, tuple(f for f in (4, 6) if f in status.families))

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool], wake: int) -> None:
        """Go on until ``stop`` says so; ``wake`` is a descriptor that becomes readable when it should be asked."""
        poller = select.poll()
        source, host = self.source.fileno(), self.host.fileno()
        gate = [self.gate.fileno()] if self.gate is not None else []
        for descriptor in (source, host, wake, *gate, *self.watched):
            poller.register(descriptor, select.POLLIN)
        waiting = False
        while not stop():
            self._turned = time.monotonic()
            ready = {fd for fd, _ in poller.poll(1000 * self._seconds_until_due(waiting))}
            self.alive()
            for attendant in self.attendants:
                attendant.turn()
            if wake in ready:
                os.read(wake, 64)
            waiting = waiting or source in ready
            host_changed = host in ready and self.host.changed()
            # A pod that starts waits for no period: what it waits for may be among the objects that do.
            asked = self.gate is not None and self.gate.take()
            if waiting and (asked or time.monotonic() >= self._rested_at()):
                self._round(self._newest(), host_changed, asked)
                waiting = False
                poller.modify(source, select.POLLIN)
            else:
                self._round(None, host_changed, asked)
                if waiting:
                    poller.modify(source, 0)  # its change waits for the minimum period; do not spin on it

    def _round(self, update: Update | None, host_changed: bool, asked: bool) -> None:
        """Take in what is new, ``asked`` for pods that start among it, and sync if anything is due."""
        due = update is not None or host_changed or asked or self._is_due()
        newest = update or self._update
        assert newest is not None
        nothing: frozenset[Never] = frozenset()
        if asked:
            update = update or msgspec.structs.replace(newest, changed=nothing, service_changed=nothing)
        if host_changed or (update is not None and self._node(update) != self._node(self._update)):
            facts = self.host.facts(self._node(newest))
            if facts != self._facts:
                self._facts = facts
                update = update or msgspec.structs.replace(newest, changed=nothing, service_changed=nothing)
        started = time.monotonic()
        if update is not None:
            self.take(update)
        if due:
            self.sync()
            self._took = self._last_end - started

    def _rested_at(self) -> float:
        """Return from when on the next change may be written, on the monotonic clock."""
        stated = self.pipeline.config.min_sync_period
        return self._last_end + (min(RESTS * self._took, LONGEST_REST) if stated is None else stated)

    def _node(self, update: Update | None) -> Node | None:
        return update.snapshot.nodes.get(self.pipeline.config.node_name) if update else None

    def _newest(self) -> Update | None:
        """Return the newest snapshot, a burst of changes taken together."""
        newest = self.source.poll()
        end = time.monotonic() + BURST
        while time.monotonic() < end and select.select([self.source.fileno()], [], [], QUIET)[0]:
            more = self.source.poll()
            if more is not None:
                newest = more.after(newest) if newest is not None else more
        return newest

    def _is_due(self) -> bool:
        now = time.monotonic()
        drifted = self.kernel.drifted()  # each time: that also takes in events, whose descriptors would else stay readable
        if self._retry_at is not None:
            return now >= self._retry_at
        if now >= self._next_verify:
            self.kernel.forget()
            self._is_full = True
            return True
        if self._flows_due(now):
            return True
        return drifted or bool(self.kernel.dirty)

    def _flows_due(self, now: float) -> bool:
        due = self.flows.next_due if self.flows is not None else None
        return due is not None and now >= due

    def _seconds_until_due(self, waiting: bool) -> float:
        now = time.monotonic()
        deadlines = [now + DRIFT_CHECK, self._next_verify if self._retry_at is None else self._retry_at]
        if self.flows is not None and self.flows.next_due is not None and self._retry_at is None:
            deadlines.append(self.flows.next_due)
        if waiting:
            deadlines.append(self._rested_at())
        return max(0.0, min(deadlines) - now)

    # -- what people see ---------------------------------------------------------------------------------------------

    def _publish(self, errors: tuple[str, ...]) -> None:
        update, desired = self._update, self.desired
        assert update is not None
        assert desired is not None
        before, lease = self.status, self._facts.lease
        own = (line for attendant in self.attendants for line in attendant.problems())
        problems = (*desired.problems, *(lease.problems if lease is not None else ()), *own)
        object_errors = tuple(str(e) for e in update.errors)
        for level, old, new in (
            (logging.ERROR, before.errors, errors),
            (logging.WARNING, before.object_errors, object_errors),
            (logging.WARNING, before.problems, problems),
        ):
            for line in new:
                if line not in old:
                    log.log(level, "%s", line)
        # Without members there is nothing of the overlay to be dirty: that is not the same as being in sync.
        pending = (*self.kernel.dirty, *(("lease",) if lease is not None and self._facts.members is None else ()))
        self.status = msgspec.structs.replace(
            before,
            synced=not pending and not errors,
            generation=update.generation,
            revision=update.snapshot.revision,
            kept=update.kept,
            last_sync=time.time(),
            last_good=before.last_good if errors else time.time(),
            services=len(self.pipeline.compiler.entries),
            endpoints=self.pipeline.endpoints,
            chains=len(desired.ruleset.chains),
            rules=self.pipeline.rules,
            elements=desired.services.elements,
            servers=len(desired.services.servers),
            frontends=len(desired.services.sockets.frontends) if self.kernel.sockets is not None else 0,
            lane=self.kernel.lane.links if self.kernel.lane is not None else 0,
            **policy_counts(desired.policies),
            policy_pods=_policy_pods(desired) if self.pipeline.config.policy else {},
            families=desired.families,
            finished=tuple(link.name for link in desired.links.links if link.tx_checksum is False) if desired.links else (),
            peers=_peers(desired),
            pending=pending,
            errors=errors,
            object_errors=object_errors,
            problems=problems,
            lease=lease,
        )
        self.publish(self.status)


def policy_counts(table: PolicyTable | None) -> dict[str, int]:
    """Return what a status says of policies: how many of each kind are about pods here, and about how many."""
    if table is None:
        return dict.fromkeys(("policies", "isolated", "cluster_policies", "governed"), 0)
    return {
        "policies": sum(1 for name in table.rules if not is_of_cluster(name)),
        "isolated": sum(1 for pod in table.pods.values() if pod.is_isolated),
        "cluster_policies": sum(1 for name, rules in table.rules.items() if rules and is_of_cluster(name)),
        "governed": sum(1 for pod in table.pods.values() if pod.is_governed),
    }


def _policy_pods(desired: Desired) -> dict[str, str]:
    pods = desired.policies.pods.values() if desired.policies is not None else ()
    return {str(address): "/".join(pod.pod) for pod in pods for address in pod.addresses}


def _peers(desired: Desired) -> tuple[PeerStatus, ...]:
    if desired.peers is None:
        return ()
    return tuple(
        PeerStatus(
            p.node, tuple(map(str, p.pod_cidrs)), ", ".join(map(str, p.public_ips)), p.ways[0].reach.value, p.ways[0].why
        )
        for p in desired.peers.peers
    )
