"""Deployments and ReplicaSets: which pods there should be, and what is to be done next. Pure: objects in, steps out.

    Deployment hostnames --> ReplicaSet hostnames-6d4cf56db6 (a hash of the template) --> Pods hostnames-6d4cf56db6-x2k9p ...

A rolling update goes as Kubernetes' does, a step at a time: no more than ``maxSurge`` pods too many, no more than ``maxUnavailable``
too few of them ready. What nobody owns any more goes. Pods that are being ended count for nobody.
Source: k8s.io/kubernetes, pkg/controller/deployment (rolling.go, recreate.go), pkg/controller/replicaset.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from netnslab.api.selectors import Raw

HASH, REVISION = "pod-template-hash", "deployment.kubernetes.io/revision"


class Make(NamedTuple):
    """An object to create."""

    raw: Raw


class Set(NamedTuple):
    """An object to replace, its status along with it."""

    raw: Raw


class End(NamedTuple):
    """An object to delete."""

    raw: Raw
    why: str


Step: TypeAlias = Make | Set | End


def steps(
    deployments: Sequence[Raw], replica_sets: Sequence[Raw], pods: Sequence[Raw], suffix: Callable[[], str]
) -> list[Step]:
    """Return what is to be done now; nothing where everything is as it should be. ``suffix``: the end of a pod's name."""
    found: list[Step] = []
    uids = {one["metadata"]["uid"] for one in (*deployments, *replica_sets)}
    for one in (*replica_sets, *pods):
        owner = _owner(one)
        is_lost = owner is not None and owner.get("kind") in {"Deployment", "ReplicaSet"} and owner.get("uid") not in uids
        if is_lost and not one["metadata"].get("deletionTimestamp"):
            found.append(End(one, "its owner is gone"))
    live = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
    for replica_set in replica_sets:
        found += _pods_of(replica_set, [pod for pod in live if _is_owned(pod, replica_set)], suffix)
    for deployment in deployments:
        found += _roll(deployment, [one for one in replica_sets if _is_owned(one, deployment)])
    return found


# -- ReplicaSets -------------------------------------------------------------------------------------------------------


def _pods_of(replica_set: Raw, pods: Sequence[Raw], suffix: Callable[[], str]) -> Iterable[Step]:
    metadata, spec = replica_set["metadata"], replica_set["spec"]
    wanted = spec.get("replicas", 1)
    for _ in range(wanted - len(pods)):
        template = spec["template"]
        labels = (template.get("metadata") or {}).get("labels") or {}
        about = {"name": f"{metadata['name']}-{suffix()}", "namespace": metadata["namespace"], "labels": labels}
        annotations = (template.get("metadata") or {}).get("annotations")
        more = {"annotations": annotations} if annotations else {}
        owned = {**about, **more, "ownerReferences": [_reference(replica_set)]}
        yield Make({"apiVersion": "v1", "kind": "Pod", "metadata": owned, "spec": template["spec"]})
    surplus = sorted(pods, key=lambda pod: (_is_ready(pod), pod["metadata"]["creationTimestamp"]), reverse=False)
    for pod in surplus[: max(0, len(pods) - wanted)]:
        yield End(pod, f"one of {len(pods)}, {wanted} are wanted")
    ready = sum(map(_is_ready, pods))
    status = {
        "replicas": len(pods),
        "fullyLabeledReplicas": len(pods),
        "readyReplicas": ready,
        "availableReplicas": ready,
        "observedGeneration": metadata.get("generation", 1),
    }
    if replica_set.get("status") != status:
        yield Set({**replica_set, "status": status})


def _is_ready(pod: Raw) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


# -- Deployments -------------------------------------------------------------------------------------------------------


def _roll(deployment: Raw, owned: Sequence[Raw]) -> Iterable[Step]:
    spec = deployment["spec"]
    template, wanted = spec["template"], spec.get("replicas", 1)
    number = template_hash(template)
    name = f"{deployment['metadata']['name']}-{number}"
    new = next((one for one in owned if one["metadata"]["name"] == name), None)
    old = [one for one in owned if one is not new]
    revisions = [int((one["metadata"].get("annotations") or {}).get(REVISION, 0)) for one in owned]
    recreate = (spec.get("strategy") or {}).get("type") == "Recreate"
    surge, missing = _leeway(spec, wanted)
    if new is None:
        yield Make(_replica_set(deployment, name, number, max(revisions, default=0) + 1))
        return
    if old and int((new["metadata"].get("annotations") or {}).get(REVISION, 0)) < max(revisions):
        yield Set(_annotated(new, max(revisions) + 1))  # rolled back to an older template
        return
    if spec.get("paused") and old:
        wanted = new["spec"]["replicas"]
    total = sum(one["spec"]["replicas"] for one in owned)
    running = sum(_count(one, "replicas") for one in old)
    if recreate:
        up = wanted if not any(one["spec"]["replicas"] for one in old) and not running else new["spec"]["replicas"]
        down = sum(one["spec"]["replicas"] for one in old)
    else:
        room = max(0, wanted + surge - total)
        up = wanted if not old else min(wanted, new["spec"]["replicas"] + room)
        lacking = new["spec"]["replicas"] - _count(new, "availableReplicas")
        down = max(0, total - (wanted - missing) - max(0, lacking))
    if up != new["spec"]["replicas"]:
        yield Set(_sized(new, up))
        return
    for one in sorted(old, key=lambda one: _count(one, "availableReplicas") == one["spec"]["replicas"]):
        drop = min(down, one["spec"]["replicas"])
        if drop:
            down -= drop
            yield Set(_sized(one, one["spec"]["replicas"] - drop))
    yield from _forgotten(spec, old)
    said = _annotated(deployment, int(new["metadata"]["annotations"][REVISION]))
    wished = {**said, "status": _status(deployment, new, owned, wanted, missing)}
    if wished != deployment:
        yield Set(wished)


def template_hash(template: Raw) -> str:
    """Return what stands for a pod template in names: ten letters and digits."""
    return hashlib.sha256(msgspec.json.encode(template, order="sorted")).hexdigest()[:10]


def _leeway(spec: Raw, wanted: int) -> tuple[int, int]:
    """Return maxSurge and maxUnavailable as counts; never both 0."""
    rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}

    def count(value: Any, up: bool) -> int:
        if isinstance(value, str) and value.endswith("%"):
            part = wanted * int(value[:-1]) / 100
            return math.ceil(part) if up else math.floor(part)
        return int(value)

    surge, missing = count(rolling.get("maxSurge", "25%"), True), count(rolling.get("maxUnavailable", "25%"), False)
    return surge, missing if surge or missing else 1


def _replica_set(deployment: Raw, name: str, number: str, revision: int) -> Raw:
    metadata, spec = deployment["metadata"], deployment["spec"]
    template = spec["template"]
    about = template.get("metadata") or {}
    labels = {**(about.get("labels") or {}), HASH: number}
    selector = {**((spec.get("selector") or {}).get("matchLabels") or {}), HASH: number}
    return {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": name,
            "namespace": metadata["namespace"],
            "labels": labels,
            "annotations": {REVISION: str(revision)},
            "ownerReferences": [_reference(deployment)],
        },
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": selector},
            "template": {**template, "metadata": {**about, "labels": labels}},
        },
    }


def _annotated(one: Raw, revision: int) -> Raw:
    metadata = one["metadata"]
    annotations = {**(metadata.get("annotations") or {}), REVISION: str(revision)}
    return {**one, "metadata": {**metadata, "annotations": annotations}}


def _sized(replica_set: Raw, count: int) -> Raw:
    return {**replica_set, "spec": {**replica_set["spec"], "replicas": count}}


def _forgotten(spec: Raw, old: Sequence[Raw]) -> Iterable[Step]:
    """Let go of the oldest ReplicaSets that nobody will roll back to."""
    empty = [one for one in old if not one["spec"]["replicas"] and not _count(one, "replicas")]
    empty.sort(key=lambda one: int((one["metadata"].get("annotations") or {}).get(REVISION, 0)))
    for one in empty[: max(0, len(empty) - spec.get("revisionHistoryLimit", 10))]:
        yield End(one, "an old revision")


def _status(deployment: Raw, new: Raw, owned: Sequence[Raw], wanted: int, missing: int) -> Raw:
    available = sum(_count(one, "availableReplicas") for one in owned)
    total, updated = sum(_count(one, "replicas") for one in owned), _count(new, "replicas")
    enough = available >= wanted - missing
    done = updated == wanted == total and available >= wanted
    return {
        "observedGeneration": deployment["metadata"].get("generation", 1),
        "replicas": total,
        "updatedReplicas": updated,
        "readyReplicas": sum(_count(one, "readyReplicas") for one in owned),
        "availableReplicas": available,
        "unavailableReplicas": max(0, wanted - available),
        "conditions": [
            {
                "type": "Available",
                "status": str(enough),
                "reason": "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
            },
            {
                "type": "Progressing",
                "status": "True",
                "reason": "NewReplicaSetAvailable" if done else "ReplicaSetUpdated",
            },
        ],
    }


# -- owners ------------------------------------------------------------------------------------------------------------


def _reference(owner: Raw) -> Raw:
    metadata = owner["metadata"]
    about = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": metadata["name"], "uid": metadata["uid"]}
    return {**about, "controller": True, "blockOwnerDeletion": True}


def _owner(one: Raw) -> Raw | None:
    """Return the reference to whoever controls an object."""
    owners: list[Raw] = one["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), None)


def _is_owned(one: Raw, owner: Raw) -> bool:
    found = _owner(one)
    return found is not None and found.get("uid") == owner["metadata"]["uid"]


def _count(replica_set: Raw, field: str) -> int:
    return int((replica_set.get("status") or {}).get(field, 0))
