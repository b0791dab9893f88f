"""What may be written, and what becomes of it: the rules between a request and the store. Knows no HTTP.

    names and namespaces -> defaults -> can it be read (clusterstate) -> does it fit the others (controlplane) -> store

A Service has its addresses and ports when the answer goes out; a pod is placed, started and ended by ``plane``. Deleting a pod or a
namespace only marks it (``deletionGracePeriodSeconds`` tells that from an object that was given as terminating): it is gone when what
it stands for is.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from clusterstate.objects import ObjectRef
from clusterstate.parse import KINDS as READ
from clusterstate.parse import parse_object
from netnslab.api.defaults import completed
from netnslab.api.events import lab_event
from netnslab.api.kinds import BY_NAME, EVENT, NAMESPACE, NODE, OF_THE_LAB, POD, SERVICE, Kind
from netnslab.api.refusal import Refusal, bad_request, invalid, not_found
from netnslab.api.selectors import Raw
from netnslab.api.store import Entry, Key, Store
from netnslab.api.strict import unknown_fields
from netnslab.controlplane import complete, is_own
from netnslab.errors import LabInputError
from netnslab.given import Given, reference
from netnslab.memory import Memory
from netnslab.topology import Topology

GRACE = 30
KEPT_SPEC = frozenset({"image", "activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds"})
"""What may change in a pod's spec."""
CHECKED = frozenset({"Service", "Node"})
"""Kinds of which two may not have the same address, port or place."""
MOST_EVENTS = 1000


class Registry:
    """The one who writes into the store."""

    def __init__(self, store: Store, topology: Topology, memory: Memory, stamp: Callable[[], str], seed: random.Random) -> None:
        self.store, self.topology, self.memory = store, topology, memory
        self._stamp, self._random, self._events = stamp, seed, 0

    # -- what the lab's control plane works on ---------------------------------------------------------------------------

    def given(self) -> Given:
        """Return the objects that people, or the workloads' controllers, gave; not those that the control plane makes of them."""
        found: Given = {}
        for name in sorted(OF_THE_LAB):
            for entry in self.store.all(BY_NAME[name]):
                if not is_own(entry.raw):
                    found[reference(entry.raw)] = entry.raw
        return found

    # -- one object ------------------------------------------------------------------------------------------------------

    def create(self, kind: Kind, namespace: str, raw: Any, *, strict: bool = False, dry_run: bool = False) -> Raw:
        """Add an object; return it as it is then. Raises Refusal."""
        raw, key = self._named(kind, namespace, raw)
        if strict:
            _check_fields(kind, raw)
        self._check_namespace(kind, key[0])
        if kind.has_status and kind is not NODE:
            raw = {field: value for field, value in raw.items() if field != "status"}
        if kind in {POD, NAMESPACE}:
            raw["status"] = {"phase": "Pending" if kind is POD else "Active"}
        if kind.kind in {"Deployment", "ReplicaSet"}:
            raw["metadata"] = {**raw["metadata"], "generation": 1}
        raw = self._fitting(kind, key, raw, None)
        if dry_run:
            return {**raw, "metadata": {"uid": "", "creationTimestamp": self._stamp(), **raw["metadata"]}}
        if kind is EVENT:
            self._forget_events()
        if kind is NODE:
            self._revive(key[1])
        return self.store.create(kind, key, raw).raw

    def update(self, kind: Kind, key: Key, body: Any, *, part: str = "", strict: bool = False, dry_run: bool = False) -> Raw:
        """Put an object, or its status, in the place of what was; return it as it is then. Raises Refusal."""
        before = self.store.get(kind, key)
        raw, named = self._named(kind, key[0], body)
        if named != key:
            raise bad_request(f"the name of the object ({named[1]}) does not match the name on the URL ({key[1]})")
        _check_version(kind, before, raw)
        if strict and not part:
            _check_fields(kind, raw)
        if part == "status":
            raw = {**before.raw, "metadata": raw["metadata"], "status": raw.get("status") or {}}
        elif kind.has_status:
            raw = {**raw, "status": before.raw.get("status") or {}}
        raw = self._kept(kind, before, raw, part)
        raw = self._fitting(kind, key, raw, before)
        if dry_run:
            return raw
        return self.store.replace(kind, key, raw).raw

    def delete(self, kind: Kind, key: Key, options: Raw) -> Raw:
        """Delete an object, or mark it; return it, or a Status. Raises Refusal."""
        entry = self.store.get(kind, key)
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted and wanted != entry.raw["metadata"]["uid"]:
            raise Refusal(409, "Conflict", f"the UID in the precondition ({wanted}) does not match that of {key[1]}")
        if "All" in (options.get("dryRun") or []):
            return entry.raw
        if options.get("propagationPolicy") == "Orphan":
            self._orphan(entry)
        if kind in {POD, NAMESPACE}:
            return self._mark(kind, key, entry, options)
        self.store.remove(kind, key)
        if kind is NODE:
            self._remove_node(key[1])
        about = {"name": key[1], "group": kind.group, "kind": kind.plural, "uid": entry.raw["metadata"]["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": about}

    # -- many at once: `nodeplane lab apply` -------------------------------------------------------------------------------

    def put_all(self, objects: Iterable[Raw]) -> tuple[list[ObjectRef], list[ObjectRef]]:
        """Create or replace objects as they are given, all or none; return those created and those changed. Raises Refusal."""
        wanted = {reference(raw): raw for raw in objects}
        nodes = {ref.name for ref in wanted if ref.kind == "Node"}
        memory = self.memory
        revived = [name for name in memory.removed_nodes if name not in nodes]
        given = self.given() | wanted
        found = self._complete(given, msgspec.structs.replace(memory, removed_nodes=revived))
        self.memory.removed_nodes = revived
        created, changed = list[ObjectRef](), list[ObjectRef]()
        for ref in sorted(found.keys() - given.keys()):
            if ref.kind == "Namespace":
                self._write(ref, found[ref])
        for ref, raw in wanted.items():
            before = self.store.find(BY_NAME[ref.kind], (ref.namespace, ref.name))
            self._write(ref, found.get(ref, raw))
            if before is None:
                created.append(ref)
            elif before is not self.store.find(BY_NAME[ref.kind], (ref.namespace, ref.name)):
                changed.append(ref)
        return created, changed

    def _write(self, ref: ObjectRef, raw: Raw) -> None:
        kind, key = BY_NAME[ref.kind], (ref.namespace, ref.name)
        raw, _ = self._named(kind, ref.namespace, raw)
        if self.store.find(kind, key) is None:
            self.store.create(kind, key, raw)
        else:
            self.store.replace(kind, key, raw)

    # -- steps -----------------------------------------------------------------------------------------------------------

    def _named(self, kind: Kind, namespace: str, raw: Any) -> tuple[Raw, Key]:
        """Return an object with kind, name and namespace in place, and its key."""
        if not isinstance(raw, dict) or not isinstance(raw.get("metadata") or {}, dict):
            raise bad_request("the body of the request must be an object")
        if raw.get("kind", kind.kind) != kind.kind or raw.get("apiVersion", kind.api_version) != kind.api_version:
            said = f"{raw.get('apiVersion')} {raw.get('kind')}"
            raise bad_request(f"{said} in the body does not match {kind.api_version} {kind.kind}, which the URL is of")
        metadata = {key: value for key, value in (raw.get("metadata") or {}).items() if key != "managedFields"}
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = f"{metadata['generateName']}{self.suffix()}"
        name = metadata.get("name")
        if not isinstance(name, str) or not name:
            raise invalid(kind.kind, kind.group, "", "metadata.name", "Required value: name or generateName is required")
        space = (metadata.get("namespace") or namespace or "default") if kind.namespaced else ""
        if namespace and space != namespace:
            raise bad_request(f"the namespace of the object ({space}) does not match the namespace on the URL ({namespace})")
        metadata = {**metadata, **({"namespace": space} if space else {})}
        rest = {key: value for key, value in raw.items() if key not in {"kind", "apiVersion", "metadata"}}
        whole = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, **rest}
        return completed(kind, whole), (space, name)

    def suffix(self) -> str:
        """Return five letters and digits, as generated names end with."""
        return "".join(self._random.choices(string.ascii_lowercase + string.digits, k=5))

    def _check_namespace(self, kind: Kind, space: str) -> None:
        if not kind.namespaced:
            return
        found = self.store.find(NAMESPACE, ("", space))
        if found is None:
            raise not_found("namespaces", "", space)
        if found.raw["metadata"].get("deletionTimestamp"):
            words = f"unable to create new content in namespace {space} because it is being terminated"
            raise Refusal(403, "Forbidden", words)

    def _kept(self, kind: Kind, before: Entry, raw: Raw, part: str) -> Raw:
        """Return an update with what it may not change as it was. Raises Refusal for what it tries to."""
        mark = {field: before.raw["metadata"].get(field) for field in ("deletionTimestamp", "deletionGracePeriodSeconds")}
        metadata = {**raw["metadata"], **{field: value for field, value in mark.items() if value is not None}}
        if kind is POD and not part:
            if not raw["spec"].get("nodeName") and before.raw["spec"].get("nodeName"):
                raw = {**raw, "spec": {**raw["spec"], "nodeName": before.raw["spec"]["nodeName"]}}
            if _fixed(raw["spec"]) != _fixed(completed(kind, before.raw)["spec"]):
                words = "Forbidden: pod updates may not change fields other than containers' image and tolerations"
                raise invalid(kind.kind, "", metadata["name"], "spec", words)
        if "generation" in before.raw["metadata"]:
            same = raw.get("spec") == before.raw.get("spec")
            metadata["generation"] = before.raw["metadata"]["generation"] + (not same)
        return {**raw, "metadata": metadata}

    def _fitting(self, kind: Kind, key: Key, raw: Raw, before: Entry | None) -> Raw:
        """Return an object as it is kept; raises Refusal for one that cannot be read or does not fit the others."""
        if kind.kind in {"Deployment", "ReplicaSet"}:
            _check_template(kind, raw)
        elif kind.kind in READ:
            errors = parse_object(raw, "").errors
            if errors:
                raise invalid(kind.kind, kind.group, key[1], errors[0].field, errors[0].reason)
        if kind is POD and not raw["spec"].get("containers"):
            raise invalid(kind.kind, "", key[1], "spec.containers", "Required value")
        if kind.kind not in CHECKED or (before is not None and before.raw.get("spec") == raw.get("spec")):
            return raw
        memory = self.memory
        if kind is NODE:
            memory = msgspec.structs.replace(memory, removed_nodes=[n for n in memory.removed_nodes if n != key[1]])
        ref = reference(raw)
        found = self._complete(self.given() | {ref: raw}, memory)[ref]
        if kind is SERVICE and (place := found["spec"].get("clusterIPs")) is not None and before is not None:
            old = before.raw["spec"].get("clusterIP")
            if old and old != place[0] and old != "None" and place[0] != "None":
                raise invalid(
                    kind.kind, "", key[1], "spec.clusterIPs[0]", f"Invalid value: {place[0]!r}: may not change once set"
                )
        return found

    def _complete(self, given: Given, memory: Memory) -> Given:
        """Ask the control plane whether objects fit together; return them as it leaves them. Raises Refusal."""
        try:
            done = complete(
                {ref: raw for ref, raw in given.items() if ref.kind != "Pod" or _is_placed(raw)}, self.topology, memory
            )
        except LabInputError as error:
            ref, _, rest = str(error).partition(": ")
            kind, _, name = ref.partition(" ")
            field, _, reason = rest.partition(": ")
            raise invalid(kind, "", name.rpartition("/")[2], field if reason else "", reason or rest) from error
        self.memory.services = done.memory.services
        return done.objects

    # -- ends ------------------------------------------------------------------------------------------------------------

    def _mark(self, kind: Kind, key: Key, entry: Entry, options: Raw) -> Raw:
        """Mark what takes time to go."""
        if kind is NAMESPACE and key[1] in {"default", "kube-system"}:
            raise Refusal(403, "Forbidden", f'namespaces "{key[1]}" is forbidden: this namespace may not be deleted')
        metadata = entry.raw["metadata"]
        if "deletionGracePeriodSeconds" in metadata:
            return entry.raw
        grace = options.get("gracePeriodSeconds")
        marks = {"deletionTimestamp": self._stamp(), "deletionGracePeriodSeconds": GRACE if grace is None else grace}
        raw = {**entry.raw, "metadata": {**metadata, **marks}}
        if kind is NAMESPACE:
            raw["status"] = {**(raw.get("status") or {}), "phase": "Terminating"}
        return self.store.replace(kind, key, raw).raw

    def _orphan(self, owner: Entry) -> None:
        uid = owner.raw["metadata"]["uid"]
        for name in ("ReplicaSet", "Pod"):
            for entry in self.store.all(BY_NAME[name], owner.raw["metadata"].get("namespace", "")):
                owners = entry.raw["metadata"].get("ownerReferences") or []
                rest = [one for one in owners if one.get("uid") != uid]
                if len(rest) < len(owners):
                    raw = {**entry.raw, "metadata": {**entry.raw["metadata"], "ownerReferences": rest}}
                    self.store.replace(BY_NAME[name], _key(entry.raw), raw)

    def _remove_node(self, name: str) -> None:
        """Let a node's pods go with it, at once: nobody is left who would end them."""
        if self.topology.node(name) is not None and name not in self.memory.removed_nodes:
            self.memory.removed_nodes = [*self.memory.removed_nodes, name]
        for entry in self.store.all(POD):
            if entry.raw["spec"].get("nodeName") == name:
                self._mark(POD, _key(entry.raw), entry, {"gracePeriodSeconds": 0})

    def _revive(self, name: str) -> None:
        self.memory.removed_nodes = [one for one in self.memory.removed_nodes if one != name]

    # -- Events ----------------------------------------------------------------------------------------------------------

    def say(self, about: Raw, reason: str, message: str, *, warning: bool = False) -> None:
        """Write an Event about an object, unless the last one about it said just that."""
        metadata = about["metadata"]
        for entry in self.store.all(EVENT, metadata.get("namespace") or "default"):
            told = entry.raw
            if (told.get("involvedObject") or {}).get("uid") == metadata.get("uid") and told.get("message") == message:
                return
        self._events += 1
        self._forget_events()
        event = lab_event(about, reason, message, self._stamp(), self._random.getrandbits(60), warning=warning)
        self.store.create(EVENT, _key(event), event)

    def _forget_events(self) -> None:
        held = self.store.all(EVENT)
        if len(held) >= MOST_EVENTS:
            oldest = min(held, key=lambda entry: entry.version)
            self.store.remove(EVENT, _key(oldest.raw))


def _key(raw: Raw) -> Key:
    return raw["metadata"].get("namespace") or "", raw["metadata"]["name"]


def _is_placed(pod: Raw) -> bool:
    return bool((pod.get("spec") or {}).get("nodeName"))


def _fixed(spec: Raw) -> Raw:
    """Return a pod's spec without what may change."""
    rest = {key: value for key, value in spec.items() if key not in KEPT_SPEC}
    for field in ("containers", "initContainers"):
        if field in rest:
            rest[field] = [{k: v for k, v in one.items() if k not in KEPT_SPEC} for one in rest[field]]
    return rest


def _check_fields(kind: Kind, raw: Raw) -> None:
    """Refuse fields that the kind does not have. Raises Refusal."""
    unknown = unknown_fields(kind, raw)
    if unknown:
        words = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise bad_request(f"{kind.kind} in version {kind.version!r} cannot be handled: strict decoding error: {words}")


def _check_version(kind: Kind, before: Entry, raw: Raw) -> None:
    """Refuse to write over what the writer has not seen. Raises Refusal."""
    stated = raw["metadata"].get("resourceVersion")
    if stated and stated != str(before.version):
        name = raw["metadata"]["name"]
        words = (
            f'Operation cannot be fulfilled on {kind.plural} "{name}": the object has been modified; please apply your changes'
        )
        raise Refusal(409, "Conflict", f"{words} to the latest version and try again", name=name, kind=kind.plural)


def _check_template(kind: Kind, raw: Raw) -> None:
    """Refuse a workload whose pods it would not find again, or that could not be started. Raises Refusal."""
    name, spec = raw["metadata"]["name"], raw["spec"]
    template = spec["template"]
    if not isinstance(spec["replicas"], int) or spec["replicas"] < 0:
        raise invalid(kind.kind, kind.group, name, "spec.replicas", f"Invalid value: {spec['replicas']!r}: must be 0 or more")
    selector = (spec.get("selector") or {}).get("matchLabels") or {}
    if not selector:
        raise invalid(
            kind.kind, kind.group, name, "spec.selector", "Required value: matchLabels; the lab knows no expressions here"
        )
    labels = (template.get("metadata") or {}).get("labels") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        words = f"Invalid value: {labels}: `selector` does not match template `labels`"
        raise invalid(kind.kind, kind.group, name, "spec.template.metadata.labels", words)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "labels": labels}, "spec": template["spec"]}
    errors = parse_object(pod, "").errors
    if errors or not template["spec"].get("containers"):
        field, reason = (errors[0].field, errors[0].reason) if errors else ("spec.containers", "Required value")
        raise invalid(kind.kind, kind.group, name, f"spec.template.{field}", reason)
