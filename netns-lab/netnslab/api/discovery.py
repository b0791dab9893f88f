"""What the server says of itself: its version, its groups and resources, and which of them check unknown fields.

kubectl asks the OpenAPI documents whether writing a kind knows ``fieldValidation``: if so it leaves the checking of field names to the
server (``strict.py``), and needs no schema. That is all these documents say.
Source: Kubernetes API concepts (discovery); k8s.io/cli-runtime, query_param_verifier_v3.go.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from netnslab.api.kinds import KINDS, Kind
from netnslab.api.selectors import Raw

VERSION = {"major": "1", "minor": "36", "gitVersion": "v1.36.0+nodeplane-lab", "platform": "linux/amd64"}
"""The Kubernetes whose behaviour the agents' source relies on."""
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
EMPTY_OPENAPI_V2 = b"\n\x032.0"
"""An OpenAPI document of version 2 in protobuf that describes nothing: kubectl asks for it about kinds that are not served."""
OPENAPI_V2 = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
EVENTS = ("events.k8s.io", "v1")
"""Events are created there by those who use the newer form."""


def document(path: str) -> Raw | None:
    """Return what a path of discovery answers; None: it is none."""
    return _documents().get(path.rstrip("/") or "/")


@functools.cache
def _documents() -> Mapping[str, Raw]:
    groups = {(kind.group, kind.version): kind.base for kind in KINDS} | {EVENTS: "/apis/events.k8s.io/v1"}
    named = [group for group in groups if group[0]]
    found: dict[str, Raw] = {
        "/": {"paths": ["/api", "/apis", "/healthz", "/livez", "/readyz", "/version", "/openapi/v3", *groups.values()]},
        "/version": VERSION,
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(*group) for group in named]},
        "/openapi/v3": {
            "paths": {base.lstrip("/"): {"serverRelativeURL": f"/openapi/v3{base}"} for base in groups.values()},
        },
    }
    for (group, version), base in groups.items():
        if group:
            found[f"/apis/{group}"] = {"kind": "APIGroup", "apiVersion": "v1", **_group(group, version)}
        kinds = [kind for kind in KINDS if kind.base == base]
        resources = [one for kind in kinds for one in _resources(kind)]
        if (group, version) == EVENTS:
            resources = [{"name": "events", "singularName": "event", "namespaced": True, "kind": "Event", "verbs": ["create"]}]
        said = f"{group}/{version}" if group else version
        found[base] = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": said, "resources": resources}
        found[f"/openapi/v3{base}"] = _openapi(kinds)
    return found


def _group(group: str, version: str) -> Raw:
    one = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [one], "preferredVersion": one}


def _resources(kind: Kind) -> list[Raw]:
    one: Raw = {
        "name": kind.plural,
        "singularName": kind.kind.lower(),
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": VERBS,
        "shortNames": list(kind.short),
        "categories": ["all"] if kind.in_all else [],
    }
    if not kind.has_status:
        return [one]
    part = {"singularName": "", "namespaced": kind.namespaced, "verbs": ["get", "patch", "update"]}
    found = [one, {**part, "name": f"{kind.plural}/status", "kind": kind.kind}]
    if kind.group == "apps":
        found.append({**part, "name": f"{kind.plural}/scale", "kind": "Scale", "group": "autoscaling", "version": "v1"})
    return found


def _openapi(kinds: list[Kind]) -> Raw:
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldValidation")]
    paths: dict[str, Any] = {}
    for kind in kinds:
        space = "/namespaces/{namespace}" if kind.namespaced else ""
        about = {"group": kind.group, "version": kind.version, "kind": kind.kind}
        paths[f"{kind.base}{space}/{kind.plural}/{{name}}"] = {
            verb: {"x-kubernetes-action": verb, "x-kubernetes-group-version-kind": about, "parameters": parameters}
            for verb in ("put", "patch")
        }
    return {"openapi": "3.0.0", "info": {"title": "nodeplane lab", "version": VERSION["gitVersion"]}, "paths": paths}
