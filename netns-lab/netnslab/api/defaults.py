"""What the API server fills in that an object leaves out, as far as people see it; addresses and ports are the control plane's.

Source: k8s.io/kubernetes, pkg/apis/*/v1/defaults.go.
"""

from __future__ import annotations

from typing import Any

from netnslab.api.kinds import Kind
from netnslab.api.selectors import Raw


def completed(kind: Kind, raw: Raw) -> Raw:
    """Return an object with its defaults; nothing handed in is changed."""
    match kind.kind:
        case "Service":
            return {**raw, "spec": _service(raw.get("spec") or {})}
        case "Pod":
            return {**raw, "spec": _pod(raw.get("spec") or {})}
        case "Deployment" | "ReplicaSet":
            spec = {"replicas": 1, **(raw.get("spec") or {})}
            template = spec.get("template") or {}
            return {**raw, "spec": {**spec, "template": {**template, "spec": _pod(template.get("spec") or {})}}}
        case "NetworkPolicy":
            spec = raw.get("spec") or {}
            types = ["Ingress", "Egress"] if spec.get("egress") is not None else ["Ingress"]
            return {**raw, "spec": {"policyTypes": types, **spec}}
        case "Namespace":
            return {**raw, "status": {"phase": "Active", **(raw.get("status") or {})}}
        case _:
            return raw


def _service(spec: Raw) -> Raw:
    kind = spec.get("type") or "ClusterIP"
    if kind == "ExternalName":
        return {"sessionAffinity": "None", **spec}
    more: dict[str, Any] = {"type": kind, "sessionAffinity": "None", "internalTrafficPolicy": "Cluster"}
    if kind in {"NodePort", "LoadBalancer"}:
        more["externalTrafficPolicy"] = "Cluster"
    ports = [
        {"protocol": "TCP", "targetPort": p.get("port"), **p} if isinstance(p, dict) else p for p in spec.get("ports") or []
    ]
    return {**more, **spec, **({"ports": ports} if ports else {})}


def _pod(spec: Raw) -> Raw:
    containers = spec.get("containers")
    if isinstance(containers, list):
        containers = [_container(one) if isinstance(one, dict) else one for one in containers]
    return {
        "restartPolicy": "Always",
        "dnsPolicy": "ClusterFirst",
        **spec,
        **({"containers": containers} if containers else {}),
    }


def _container(one: Raw) -> Raw:
    ports = [{"protocol": "TCP", **p} if isinstance(p, dict) else p for p in one.get("ports") or []]
    return {**one, "ports": ports} if ports else one
