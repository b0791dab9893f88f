"""An API server in memory for tests of what follows one: versions, watches, pages, and everything that goes wrong with them.

put, delete                what people do
cut, away, compact         connections end; nobody answers; history is forgotten (410)
restore                    a backup: older objects, older versions
say                        a line to every watch of a path, whatever it is
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from clusterstate.sources.reflector import NO_PARAMETERS, ApiError

SERVICES, SLICES = "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices"
KINDS = {
    SERVICES: ("v1", "Service"),
    SLICES: ("discovery.k8s.io/v1", "EndpointSlice"),
    "/api/v1/nodes": ("v1", "Node"),
    "/api/v1/pods": ("v1", "Pod"),
    "/api/v1/namespaces": ("v1", "Namespace"),
    "/apis/networking.k8s.io/v1/networkpolicies": ("networking.k8s.io/v1", "NetworkPolicy"),
    "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies": (
        "policy.networking.k8s.io/v1alpha2",
        "ClusterNetworkPolicy",
    ),
    "/apis/networking.k8s.io/v1/servicecidrs": ("networking.k8s.io/v1", "ServiceCIDR"),
}
SECONDS = 5.0


class FakeApi:
    """Implements ``reflector.Api``. Safe for several threads."""

    def __init__(self, minor: int = 30, absent: tuple[str, ...] = ()) -> None:
        self.minor, self.absent = minor, absent
        self.version = 100
        self.objects: dict[str, dict[str, dict[str, Any]]] = {path: {} for path in KINDS}
        self.asked: list[tuple[str, Mapping[str, str]]] = []
        self._log: list[tuple[int, str, str]] = []
        """(version, path, line); version 0 is a line for whoever watches now."""
        self._oldest = 0
        self._epoch = 0
        self._away = ""
        self._changed = threading.Condition()

    # -- what people do ------------------------------------------------------------------------------------------------

    def put(self, path: str, manifest: dict[str, Any]) -> None:
        with self._changed:
            key = manifest["metadata"].get("namespace", "") + "/" + manifest["metadata"]["name"]
            kind = "MODIFIED" if key in self.objects[path] else "ADDED"
            self.version += 1
            version, name = KINDS[path]
            metadata = {**manifest["metadata"], "resourceVersion": str(self.version)}
            self.objects[path][key] = {"apiVersion": version, "kind": name, **manifest, "metadata": metadata}
            self._note(path, kind, self.objects[path][key])

    def delete(self, path: str, key: str) -> None:
        with self._changed:
            self.version += 1
            gone = self.objects[path].pop(key)
            gone = {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self.version)}}
            self._note(path, "DELETED", gone)

    def patch(self, path: str, body: bytes) -> dict[str, Any]:
        """Apply a strategic merge patch to the status of an object without namespace; lists are appended to."""
        resource, key = path.removesuffix("/status").rsplit("/", 1)
        patch = json.loads(body)
        before = self.objects[resource]["/" + key]
        annotations = before["metadata"].get("annotations", {}) | patch.get("metadata", {}).get("annotations", {})
        conditions = before["status"].get("conditions", []) + patch.get("status", {}).get("conditions", [])
        status = {**before["status"], "conditions": conditions}
        self.put(resource, {**before, "metadata": {**before["metadata"], "annotations": annotations}, "status": status})
        return self.objects[resource]["/" + key]

    def _note(self, path: str, kind: str, manifest: dict[str, Any]) -> None:
        self._log.append((self.version, path, json.dumps({"type": kind, "object": manifest})))
        self._changed.notify_all()

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """End every connection."""
        with self._changed:
            self._epoch += 1
            self._changed.notify_all()

    def away(self, words: str = "connection refused") -> None:
        """Answer nobody until ``back``."""
        self._away = words
        self.cut()

    def back(self) -> None:
        self._away = ""

    def compact(self) -> None:
        """Forget all history; whoever watches from an older version is told 410 when he comes again."""
        with self._changed:
            self._oldest, self._log = self.version, []

    def restore(self, objects: dict[str, dict[str, dict[str, Any]]], version: int) -> None:
        """Be as a backup says."""
        with self._changed:
            self.objects = {path: dict(held) for path, held in objects.items()}
            self.version, self._oldest, self._log = version, version, []
            self._epoch += 1
            self._changed.notify_all()

    def say(self, path: str, line: str) -> None:
        """Send a line to every watch of a path."""
        with self._changed:
            self._log.append((0, path, line))
            self._changed.notify_all()

    def repeat(self, path: str, number: int) -> None:
        """Send an event of the past again to every watch of a path."""
        with self._changed:
            lines = [line for version, where, line in self._log if version and where == path]
            if lines:
                self._log.append((0, path, lines[number % len(lines)]))
                self._changed.notify_all()

    # -- what is answered ----------------------------------------------------------------------------------------------

    def get(self, path: str, parameters: Mapping[str, str] = NO_PARAMETERS) -> bytes:
        self._answerable(path, parameters)
        if path == "/version":
            return json.dumps({"major": "1", "minor": str(self.minor)}).encode()
        with self._changed:
            held = [self.objects[path][key] for key in sorted(self.objects[path])]
            start, limit = int(parameters.get("continue") or 0), int(parameters.get("limit") or len(held) or 1)
            page = [{k: v for k, v in one.items() if k not in {"kind", "apiVersion"}} for one in held[start : start + limit]]
            metadata = {"resourceVersion": str(self.version)}
            if start + limit < len(held):
                metadata["continue"] = str(start + limit)
            version, kind = KINDS[path]
            return json.dumps({"kind": f"{kind}List", "apiVersion": version, "metadata": metadata, "items": page}).encode()

    def lines(self, path: str, parameters: Mapping[str, str]) -> Iterator[bytes]:
        self._answerable(path, parameters)
        initial = parameters.get("sendInitialEvents") == "true"
        if initial and self.minor < 32:
            raise ApiError(422, "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")
        with self._changed:
            epoch, at = self._epoch, len(self._log)
            if initial:
                waiting = [json.dumps({"type": "ADDED", "object": one}) for one in self.objects[path].values()]
                waiting.append(self.bookmark(path, {"k8s.io/initial-events-end": "true"}))
            else:
                start = int(parameters["resourceVersion"])
                if start < self._oldest or start > self.version:
                    status = {"kind": "Status", "code": 410, "message": "too old resource version"}
                    yield json.dumps({"type": "ERROR", "object": status}).encode()
                    return
                waiting = [line for version, where, line in self._log if version > start and where == path]
        while True:
            for line in waiting:
                yield line.encode()
            if not self._news(epoch, at):
                return
            with self._changed:
                at = min(at, len(self._log))
                waiting = [line for _, where, line in self._log[at:] if where == path]
                at = len(self._log)

    def _news(self, epoch: int, at: int) -> bool:
        """Wait until there is something to say, or nothing more (False)."""
        with self._changed:
            self._changed.wait_for(lambda: self._epoch != epoch or len(self._log) != at, SECONDS)
            return self._epoch == epoch

    def bookmark(self, path: str, annotations: dict[str, str]) -> str:
        metadata = {"resourceVersion": str(self.version), "annotations": annotations}
        return json.dumps({"type": "BOOKMARK", "object": {"kind": KINDS[path][1], "metadata": metadata}})

    def _answerable(self, path: str, parameters: Mapping[str, str]) -> None:
        self.asked.append((path, parameters))
        if self._away:
            raise ApiError(0, self._away)
        if path in self.absent:
            raise ApiError(404, "the server could not find the requested resource")


def service(name: str, ip: str, **labels: str) -> dict[str, Any]:
    """Return a Service."""
    spec = {"clusterIP": ip, "ports": [{"port": 80}]}
    return {"metadata": {"namespace": "ns", "name": name, "labels": labels}, "spec": spec}


def node(name: str) -> dict[str, Any]:
    """Return a Node."""
    return {"metadata": {"name": name}, "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.1"}]}}
