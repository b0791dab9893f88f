"""Which endpoints a node uses: readiness, termination, topology and traffic policy decided in one place.

    all endpoints of a ServicePort
      |-- ready and in this node's topology  --> cluster pool      empty? serving and terminating ones, topology ignored
      |-- ready and on this node             --> local pool        empty? serving and terminating ones on this node
      '-- any that could serve, anywhere     --> has_any           decides REJECT or DROP where a pool is empty

Source: KEP-1669 (terminating fallback), KEP-2433 and KEP-4444 (hints), KEP-2086 (internal traffic policy).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from clusterstate.objects import Endpoint
from proxy.table import Backend


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A backend, and the endpoint whose conditions and hints decide whether it is used."""

    backend: Backend
    endpoint: Endpoint


class Eligible(msgspec.Struct, frozen=True, gc=False):
    """The outcome for one ServicePort on one node."""

    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    has_any: bool


def eligible_backends(
    candidates: Sequence[Candidate], *, node: str, zone: str, uses_cluster: bool, uses_local: bool
) -> Eligible:
    """Sort candidates into pools. The order of ``candidates`` is kept."""
    ready = [c for c in candidates if c.endpoint.ready]
    fallback: list[Candidate] = []
    if uses_local or not ready:
        fallback = [c for c in candidates if c.endpoint.terminating and c.endpoint.serving]
    cluster: list[Candidate] = []
    if uses_cluster:
        cluster = _in_topology(ready, node, zone) or fallback
    local: list[Candidate] = []
    if uses_local:
        local = [c for c in ready if c.backend.local] or [c for c in fallback if c.backend.local]
    return Eligible(
        cluster=tuple([c.backend for c in cluster]),
        local=tuple([c.backend for c in local]),
        has_any=bool(ready or fallback),
    )


def _in_topology(ready: list[Candidate], node: str, zone: str) -> list[Candidate]:
    """Keep the endpoints hinted for this node, else for its zone; hints count only if every ready endpoint has them."""
    if not ready:
        return ready
    first = ready[0].endpoint  # in most clusters nobody has hints: it alone decides
    if first.node_hints and all(c.endpoint.node_hints for c in ready):
        same_node = [c for c in ready if node in c.endpoint.node_hints]
        if same_node:
            return same_node
    if zone and first.zone_hints and all(c.endpoint.zone_hints for c in ready):
        same_zone = [c for c in ready if zone in c.endpoint.zone_hints]
        if same_zone:
            return same_zone
    return ready
