"""One consistent view of the cluster, and what changed since the one before.

A Snapshot is immutable, and so are its mappings (hash array mapped tries): the next snapshot shares everything that stayed the
same, so making one costs the change, not the cluster, and whoever holds an old one keeps it whole.
"""

from __future__ import annotations

from typing import TypeAlias

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
        found = sorted(self.slices.get(service, Map()).values(), key=lambda s: s.ref)
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
