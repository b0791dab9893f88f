"""One consistent view of the cluster, and what changed since the one before.

A Snapshot is immutable, and so are its mappings (hash array mapped tries): the next snapshot shares everything that stayed the
same, so making one costs the change, not the cluster, and whoever holds an old one keeps it whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import msgspec
from immutables import Map

from clusterstate.objects import (
    EndpointSlice,
    KubernetesObject,
    Namespace,
    NetworkPolicy,
    Node,
    ObjectRef,
    Pod,
    Service,
    ServiceCIDR,
)

Name: TypeAlias = tuple[str, str]
"""(namespace, name)."""


class Snapshot(msgspec.Struct, frozen=True):
    """The cluster at one moment. Namespaced kinds are keyed by (namespace, name), the others by name."""

    revision: int = 0
    services: Map[Name, Service] = Map()
    slices: Map[Name, Map[ObjectRef, EndpointSlice]] = Map()
    """Keyed by (namespace, *service* name): the slices of one Service lie together. Inner key: the slice's own ref."""
    nodes: Map[str, Node] = Map()
    pods: Map[Name, Pod] = Map()
    namespaces: Map[str, Namespace] = Map()
    policies: Map[Name, NetworkPolicy] = Map()
    service_cidrs: Map[str, ServiceCIDR] = Map()

    def slices_of(self, service: Name) -> tuple[EndpointSlice, ...]:
        """Return a Service's slices sorted by name; those mirrored from Endpoints only where there are no others."""
        group = self.slices.get(service)
        if group is None:
            return ()
        if len(group) == 1:
            return tuple(group.values())
        found = sorted(group.values(), key=lambda s: s.ref)
        return tuple([s for s in found if not s.mirrored] or found)

    def objects(self) -> list[KubernetesObject]:
        """Return every object, sorted by kind, namespace and name."""
        everything: list[KubernetesObject] = [
            *self.services.values(),
            *(one for group in self.slices.values() for one in group.values()),
            *self.nodes.values(),
            *self.pods.values(),
            *self.namespaces.values(),
            *self.policies.values(),
            *self.service_cidrs.values(),
        ]
        return sorted(everything, key=lambda o: o.ref)


class ObjectError(msgspec.Struct, frozen=True):
    """An object, or a whole file, that was left out, and why: ``web.yaml: Service default/web: spec.ports[0].port: ...``."""

    source: str
    """The file (or URL) it came from."""
    ref: ObjectRef | None
    """None where not even kind and name could be read."""
    field: str
    """Path of the field, such as ``spec.ports[0].port``; empty for the whole."""
    reason: str
    """What is wrong, with the value."""
    kept: bool = False
    """The object stands without this one entry (a single external IP, say), as kube-proxy does it. Otherwise it was left out."""

    def __str__(self) -> str:
        """Print on one line."""
        return ": ".join(str(part) for part in (self.source, self.ref, self.field, self.reason) if part)


class Update(msgspec.Struct, frozen=True):
    """A new snapshot, the objects that differ from the one before (None: everything may), and the errors that stand now."""

    snapshot: Snapshot
    changed: frozenset[ObjectRef] | None
    errors: tuple[ObjectError, ...] = ()
    service_changed: frozenset[Name] | None = None
    """Services to compile again: those changed themselves and those whose slices did. None: all."""
    generation: str = ""
    """What a file source's ``.generation`` file says: its writer's own number for this state, echoed once programmed."""

    def after(self, earlier: Update) -> Update:
        """Return this update as seen by somebody who did not see ``earlier``."""
        both = (self.changed, earlier.changed)
        names = (self.service_changed, earlier.service_changed)
        return msgspec.structs.replace(
            self,
            changed=None if both[0] is None or both[1] is None else both[0] | both[1],
            service_changed=None if names[0] is None or names[1] is None else names[0] | names[1],
        )


def edited(base: Snapshot, gone: Iterable[KubernetesObject], come: Iterable[KubernetesObject]) -> Snapshot:
    """Return ``base`` without the objects in ``gone`` and with those in ``come``; costs these, and shares all the rest. The revision stays.

    A new version of an object is in ``come`` alone. A slice that moves to another Service is in both.
    """
    edits: dict[type[KubernetesObject], tuple[list[KubernetesObject], list[KubernetesObject]]] = {}
    for side, objects in enumerate((gone, come)):
        for one in objects:
            edits.setdefault(type(one), ([], []))[side].append(one)
    tables: dict[str, Map[Any, Any]] = {}
    for kind, (old, new) in edits.items():
        table = _TABLES[kind]
        if kind is EndpointSlice:
            tables[table] = _edited_slices(base.slices, old, new)
            continue
        before: Map[Any, KubernetesObject] = getattr(base, table)
        with before.mutate() as entries:
            for one in old:
                entries.pop(_key(one), None)
            for one in new:
                entries[_key(one)] = one
            tables[table] = entries.finish()
    return msgspec.structs.replace(base, **tables)


_TABLES: dict[type[KubernetesObject], str] = {
    Service: "services",
    EndpointSlice: "slices",
    Node: "nodes",
    Pod: "pods",
    Namespace: "namespaces",
    NetworkPolicy: "policies",
    ServiceCIDR: "service_cidrs",
}


def _key(one: KubernetesObject) -> Name | str:
    match one:
        case Node() | Namespace() | ServiceCIDR():
            return one.name
        case _:
            return (one.namespace, one.name)


Slices: TypeAlias = Map[Name, Map[ObjectRef, EndpointSlice]]


def _edited_slices(before: Slices, gone: Iterable[KubernetesObject], come: Iterable[KubernetesObject]) -> Slices:
    """Edit the slices Service by Service; a Service without any has no entry."""
    changes: dict[Name, dict[ObjectRef, EndpointSlice | None]] = {}
    for new, objects in ((False, gone), (True, come)):
        for one in objects:
            if isinstance(one, EndpointSlice):
                changes.setdefault((one.namespace, one.service), {})[one.ref] = one if new else None
    with before.mutate() as groups:
        for service, refs in changes.items():
            with groups.get(service, Map()).mutate() as group:
                for ref, slice_ in refs.items():
                    if slice_ is None:
                        group.pop(ref, None)
                    else:
                        group[ref] = slice_
                merged = group.finish()
            if merged:
                groups[service] = merged
            else:
                groups.pop(service, None)
    return groups.finish()
