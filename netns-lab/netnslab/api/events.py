"""Events, in the form of events.k8s.io/v1 made into that of the core group, in which kubectl asks for them.

Source: k8s.io/kubernetes, pkg/apis/events/v1/conversion.go.
"""

from __future__ import annotations

from netnslab.api.selectors import Raw

RENAMED = {"note": "message", "regarding": "involvedObject", "reportingController": "reportingComponent"}
OLD = {
    "deprecatedCount": "count",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedSource": "source",
}


def core_event(raw: Raw) -> Raw:
    """Return an Event of events.k8s.io as one of the core group."""
    found = {(RENAMED | OLD).get(key, key): value for key, value in raw.items()}
    found.setdefault("source", {"component": found.get("reportingComponent", "")})
    return {**found, "apiVersion": "v1", "kind": "Event"}


def lab_event(about: Raw, reason: str, message: str, stamp: str, number: int, *, warning: bool = False) -> Raw:
    """Return an Event of the lab's own about an object."""
    metadata = about["metadata"]
    namespace = metadata.get("namespace") or "default"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{number:x}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "name": metadata["name"],
            "namespace": namespace,
            "uid": metadata.get("uid", ""),
        },
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": message,
        "source": {"component": "netns-lab"},
        "reportingComponent": "netns-lab",
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
