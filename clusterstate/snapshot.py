"""One consistent view of the cluster, and what changed since the one before.

A Snapshot is immutable, and so are its mappings (hash array mapped tries): the next snapshot shares everything that stayed the
same, so making one costs the change, not the cluster, and whoever holds an old one keeps it whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar

import msgspec
from immutables import Map

from clusterstate.objects import (
    ClusterNetworkPolicy,
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
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


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
    cluster_policies: Map[str, ClusterNetworkPolicy] = Map()
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
            *self.cluster_policies.values(),
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
    kept: str = ""
    """Where the snapshot comes from while its source has not answered: from when it is, where it was kept, and why. Empty: it has."""

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
    old, new = _by_kind(gone), _by_kind(come)
    tables: dict[str, Map[Any, Any]] = {}
    for kind in {**old, **new}:
        table, key = _TABLES[kind]
        if kind is EndpointSlice:
            tables[table] = _edited_slices(base.slices, old[kind], new[kind])
            continue
        before: Map[Any, KubernetesObject] = getattr(base, table)
        entries = dict(zip(map(key, new[kind]), new[kind], strict=True))
        tables[table] = _merged(before, map(key, old[kind]), entries)
    return msgspec.structs.replace(base, **tables)


def _by_kind(objects: Iterable[KubernetesObject]) -> defaultdict[type[KubernetesObject], list[Any]]:
    found: defaultdict[type[KubernetesObject], list[Any]] = defaultdict(list)
    for one in objects:
        found[type(one)].append(one)
    return found


def _merged(before: Map[_Key, _Value], gone: Iterable[_Key], come: dict[_Key, _Value]) -> Map[_Key, _Value]:
    """Return ``before`` without the keys in ``gone`` and with what is in ``come``. Into nothing, as on the first load, all goes at once."""
    if not before:
        return Map(come)
    with before.mutate() as entries:
        for key in gone:
            entries.pop(key, None)
        entries.update(come)
    return entries.finish()


_ONE_NAME, _TWO_NAMES = attrgetter("name"), attrgetter("namespace", "name")
_TABLES: dict[type[KubernetesObject], tuple[str, Callable[[Any], Any]]] = {
    Service: ("services", _TWO_NAMES),
    EndpointSlice: ("slices", attrgetter("namespace", "service")),
    Node: ("nodes", _ONE_NAME),
    Pod: ("pods", _TWO_NAMES),
    Namespace: ("namespaces", _ONE_NAME),
    NetworkPolicy: ("policies", _TWO_NAMES),
    ClusterNetworkPolicy: ("cluster_policies", _ONE_NAME),
    ServiceCIDR: ("service_cidrs", _ONE_NAME),
}
"""Which table of the snapshot holds a kind, and under which key."""


Slices: TypeAlias = Map[Name, Map[ObjectRef, EndpointSlice]]
_NO_SLICES: Map[ObjectRef, EndpointSlice] = Map()


def _edited_slices(before: Slices, gone: list[EndpointSlice], come: list[EndpointSlice]) -> Slices:
    """Edit the slices Service by Service; a Service without any has no entry."""
    groups: dict[Name, Map[ObjectRef, EndpointSlice]] = {}
    for one in gone:
        service, ref = (one.namespace, one.service), one.ref
        group = groups[service] if service in groups else before.get(service, _NO_SLICES)
        groups[service] = group.delete(ref) if ref in group else group
    for one in come:
        service = (one.namespace, one.service)
        group = groups[service] if service in groups else before.get(service, _NO_SLICES)
        groups[service] = group.set(one.ref, one)
    if not gone:
        return _merged(before, (), groups)
    emptied = [service for service, group in groups.items() if not group]
    return _merged(before, emptied, {service: group for service, group in groups.items() if group})
