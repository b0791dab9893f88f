"""What happens after something was written: the controllers of a cluster, the scheduler and the kubelets, one round after another.

    a change --> workloads (Deployments, ReplicaSets) --> namespaces that end --> the lab's own control plane:
                 nodes for pods, addresses, EndpointSlices; pods are made, answer, and are taken away
                                |
                                '--> the store, from which everybody who watches is told   --> files (etcd's part)

A round begins when something differs from the last, and goes on until nothing does. Pods are made and ended in a thread; everything
else is in the server's own. A pod that is deleted is first said to be terminating, so that no node sends it anything new, and ended in
the round after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from clusterstate.objects import ObjectRef
from netnslab import lab
from netnslab.api.kinds import BY_NAME, DEPLOYMENT, ENDPOINTS, EVENT, NAMESPACE, NODE, POD, REPLICA_SET, SLICE, Kind
from netnslab.api.refusal import Refusal
from netnslab.api.registry import Registry
from netnslab.api.selectors import Raw
from netnslab.api.store import Change, Entry, Key
from netnslab.api.workloads import End, Make, Set, steps
from netnslab.controlplane import complete, is_own, unplaceable
from netnslab.endpoints import SERVICE_LABEL, endpoints_for, mirrored_slices
from netnslab.errors import LabError, LabInputError
from netnslab.given import Given, reference
from netnslab.lab import file_name
from netnslab.state import GENERATION, LabState, write_file

TOGETHER = 0.01
"""Seconds for which changes are collected before a round."""
TOLD = 2.0
"""Seconds that nodes have to stop sending to a pod that ends."""
AGAIN = 1.0
"""Seconds after which a round that failed is tried again."""
STEPS = 1000
"""How often workloads may be stepped in one round."""
log = logging.getLogger("netnslab.api")


class Plane:
    """The controllers. ``run`` is the server's task; ``settled`` waits until all that was written has taken effect."""

    def __init__(self, name: str, registry: Registry, folder: Path, stamp: Callable[[], str]) -> None:
        """``folder``: where objects are kept; ``stamp``: the time."""
        self._name, self._registry, self._store = name, registry, registry.store
        self._folder, self._stamp = folder, stamp
        self.told: Callable[[int], None] = lambda _version: None
        """Whom to say that a version is complete."""
        self._dirty: dict[tuple[Kind, Key], Entry | None] = {}
        self._wake = asyncio.Event()
        self._round = asyncio.Condition()
        self._done, self._error = 0, ""
        self._warnings: list[str] = []
        self._store.watch(self._changed)

    def _changed(self, change: Change) -> None:
        if change.kind is not EVENT:
            self._dirty[change.kind, change.key] = change.now
            self._wake.set()

    async def settled(self) -> tuple[int, list[str]]:
        """Wait until a round has left nothing to do; return the version then, and what was warned of. Raises LabError."""
        self._error, self._warnings = "", []
        wanted = self._store.version
        self._wake.set()
        async with self._round:
            await self._round.wait_for(lambda: self._error or (self._done >= wanted and not self._wake.is_set()))
        if self._error:
            raise LabError(self._error)
        return self._store.version, self._warnings

    async def run(self) -> None:
        """Do rounds for ever."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(TOGETHER)
            self._wake.clear()
            begun, error = self._store.version, ""
            try:
                await self._once()
            except (LabError, LabInputError, Refusal) as failed:
                error = str(failed)
                log.warning("not in effect: %s", error)
            except Exception as failed:  # the server goes on serving
                log.exception("a round failed")
                error = f"{type(failed).__name__}: {failed}"
            self._keep()
            if not error and self._store.version == begun:
                self._wake.clear()
            async with self._round:
                self._done, self._error = begun, error
                self._round.notify_all()
            if error:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), AGAIN)
                self._wake.set()

    async def _once(self) -> None:
        self._workloads()
        self._namespaces()
        given = self._registry.given()
        waiting = unplaceable(given, self._registry.topology, self._registry.memory)
        for ref, why in waiting.items():
            self._wait(ref, given.pop(ref), why)
        ending = {ref: raw for ref, raw in given.items() if ref.kind == "Pod" and _is_told(raw)}
        for ref in ending:
            del given[ref]
        if any(raw["metadata"]["deletionGracePeriodSeconds"] for raw in ending.values()):
            self._keep()
            await asyncio.to_thread(lab.await_told, self._name, self._store.version, TOLD)
        self._schedule(given)
        unstarted = {ref: _unstarted(raw) for ref, raw in given.items()}
        settled = await asyncio.to_thread(lab.settle, self._name, unstarted, self._registry.memory, self._claim)
        self._registry.memory.pods, self._registry.memory.last = settled.memory.pods, settled.memory.last
        self._warnings += settled.warnings
        self._take(settled.objects, given)
        for line in settled.warnings:
            self._warn(line)
        for ref, raw in ending.items():
            self._end(ref, raw)
        for entry in self._store.all(POD):
            if entry.raw["metadata"].get("deletionGracePeriodSeconds") is not None and not _is_told(entry.raw):
                self._store.replace(POD, _key(entry.raw), _unready(entry.raw))

    def _claim(self, state: LabState) -> None:
        """Let the state on disk have the version that is reached; runs in the thread."""
        state.generation = self._store.version

    # -- workloads, namespaces, pods ---------------------------------------------------------------------------------------

    def _workloads(self) -> None:
        for _ in range(STEPS):
            of = [[entry.raw for entry in self._store.all(kind)] for kind in (DEPLOYMENT, REPLICA_SET, POD)]
            wanted = steps(of[0], of[1], of[2], self._registry.suffix) if of[0] or of[1] or of[2] else []
            if not wanted:
                return
            for step in wanted:
                self._step(step)

    def _step(self, step: Make | Set | End) -> None:
        kind, metadata = BY_NAME[step.raw["kind"]], step.raw["metadata"]
        key = metadata["namespace"], metadata["name"]
        match step:
            case Make():
                self._registry.create(kind, key[0], step.raw)
            case Set():
                spec = (self._store.get(kind, key).raw).get("spec")
                generation = metadata.get("generation", 1) + (spec != step.raw["spec"])
                self._store.replace(kind, key, {**step.raw, "metadata": {**metadata, "generation": generation}})
            case End():
                self._registry.delete(kind, key, {})

    def _schedule(self, given: Given) -> None:
        """Say where pods go before they are made: a node's agent lets none start that it has not heard of."""
        waiting = [ref for ref, raw in given.items() if ref.kind == "Pod" and not raw["spec"].get("nodeName")]
        if not waiting:
            return
        unstarted = {ref: _unstarted(raw) for ref, raw in given.items()}
        placed = complete(unstarted, self._registry.topology, self._registry.memory).objects
        for ref in waiting:
            raw, node = given[ref], placed[ref]["spec"]["nodeName"]
            status = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]}
            bound = {**raw, "spec": {**raw["spec"], "nodeName": node}, "status": status}
            given[ref] = self._store.replace(POD, (ref.namespace, ref.name), bound).raw
            self._registry.say(bound, "Scheduled", f"Successfully assigned {ref.namespace}/{ref.name} to {node}")
        self._keep()

    def _namespaces(self) -> None:
        """Empty namespaces that are to go, and let go of those that are empty."""
        for entry in self._store.all(NAMESPACE):
            if not entry.raw["metadata"].get("deletionTimestamp"):
                continue
            name, left = entry.raw["metadata"]["name"], 0
            for kind in (one for one in BY_NAME.values() if one.namespaced):
                for one in self._store.all(kind, name):
                    left += kind is POD
                    self._registry.delete(kind, (name, one.raw["metadata"]["name"]), {})
            if not left:
                self._store.remove(NAMESPACE, ("", name))

    def _wait(self, ref: ObjectRef, raw: Raw, why: str) -> None:
        """Say of a pod that there is no node for it; let go of one that is deleted meanwhile."""
        key = ref.namespace, ref.name
        if raw["metadata"].get("deletionGracePeriodSeconds") is not None:
            self._store.remove(POD, key)
            return
        reason = why.partition(": ")[2]
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": reason}
        self._registry.say(raw, "FailedScheduling", reason, warning=True)
        self._store.replace(POD, key, {**raw, "status": {"phase": "Pending", "conditions": [condition]}})

    def _end(self, ref: ObjectRef, raw: Raw) -> None:
        """Let go of a pod that has ended, unless another has its name by now."""
        entry = self._store.find(POD, (ref.namespace, ref.name))
        if entry is not None and entry.raw["metadata"]["uid"] == raw["metadata"]["uid"]:
            self._store.remove(POD, (ref.namespace, ref.name))

    def _warn(self, line: str) -> None:
        """Write what a kubelet has to say of a pod as an Event: ``Pod default/web: command ...``."""
        log.warning("%s", line)
        name, _, reason = line.removeprefix("Pod ").partition(": ")
        namespace, _, pod = name.partition("/")
        entry = self._store.find(POD, (namespace, pod))
        if entry is not None:
            self._registry.say(entry.raw, "Failed", reason, warning=True)

    # -- what the control plane made -----------------------------------------------------------------------------------------

    def _take(self, objects: Given, given: Given) -> None:
        """Take what was filled in, where nobody has written something else meanwhile."""
        for ref, raw in objects.items():
            if ref.kind == "EndpointSlice" and ref not in given:
                continue
            kind, key = BY_NAME[ref.kind], (ref.namespace, ref.name)
            entry = self._store.find(kind, key)
            if entry is None:
                if ref not in given and kind is NODE and ref.name not in self._registry.memory.removed_nodes:
                    self._store.create(kind, key, raw)
            elif ref in given and entry.raw is given[ref] and raw != entry.raw:
                self._fill_in(kind, key, entry, raw)
        self._slices(objects)

    def _fill_in(self, kind: Kind, key: Key, entry: Entry, raw: Raw) -> None:
        if kind is POD:
            status = raw["status"]
            if "startTime" not in status and status.get("phase") == "Running":
                raw = {**raw, "status": {**status, "startTime": self._stamp(), "qosClass": "BestEffort"}}
        self._store.replace(kind, key, raw)

    def _slices(self, objects: Given) -> None:
        """Make, change and take away the slices of Services, and the Endpoints that are the older form of them."""
        wanted: dict[tuple[Kind, Key], Raw] = {}
        for ref, raw in objects.items():
            if ref.kind == "EndpointSlice" and is_own(raw):
                wanted[SLICE, (ref.namespace, ref.name)] = raw
            elif ref.kind == "Endpoints" and not is_own(raw):
                for one in mirrored_slices(raw):
                    wanted[SLICE, (ref.namespace, one["metadata"]["name"])] = one
        of: dict[Key, list[Raw]] = {}
        for (_, (namespace, _)), raw in wanted.items():
            of.setdefault((namespace, raw["metadata"]["labels"][SERVICE_LABEL]), []).append(raw)
        for key, slices in of.items():
            service = objects.get(ObjectRef("Service", *key))
            if service is not None and ObjectRef("Endpoints", *key) not in objects:
                wanted[ENDPOINTS, key] = endpoints_for(service, slices)
        for kind in (SLICE, ENDPOINTS):
            for entry in self._store.all(kind):
                ref = reference(entry.raw)
                if is_own(entry.raw) and (kind, (ref.namespace, ref.name)) not in wanted:
                    self._store.remove(kind, (ref.namespace, ref.name))
        for (kind, key), raw in wanted.items():
            if self._store.find(kind, key) is None:
                self._store.create(kind, key, raw)
            else:
                self._store.replace(kind, key, raw)

    # -- etcd's part ---------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Write what changed to files, from which a server that is started again goes on; then say that it is complete."""
        version, dirty = self._store.version, self._dirty
        self._dirty = {}
        for (kind, (namespace, name)), entry in dirty.items():
            path = self._folder / file_name(ObjectRef(kind.kind, namespace, name))
            if entry is None:
                path.unlink(missing_ok=True)
            else:
                write_file(path, entry.encoded + b"\n")
        if dirty:
            write_file(self._folder / GENERATION, f"{version}\n".encode())
        self.told(version)


def _key(raw: Raw) -> Key:
    return raw["metadata"].get("namespace") or "", raw["metadata"]["name"]


def _unstarted(raw: Raw) -> Raw:
    """Return a pod that waits without the word that it does: what the control plane then says of it is what it is."""
    status = raw.get("status") or {}
    if raw["kind"] == "Pod" and status.get("phase") == "Pending" and not status.get("podIPs"):
        return {key: value for key, value in raw.items() if key != "status"}
    return raw


def _unready(pod: Raw) -> Raw:
    conditions = [c for c in pod["status"].get("conditions") or [] if c.get("type") != "Ready"]
    return {**pod, "status": {**pod["status"], "conditions": [*conditions, {"type": "Ready", "status": "False"}]}}


def _is_told(pod: Raw) -> bool:
    """Tell a pod that everybody who watches has been told is ending: its status says so since the round before."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return pod["metadata"].get("deletionGracePeriodSeconds") is not None and not any(
        c.get("type") == "Ready" and c.get("status") == "True" for c in conditions
    )
