"""How a lab's namespaces and links are called: readable, unique on the host, and short enough for the kernel.

    np-<lab>-<node>             a node                    np-<lab>-router      between the segments
    np-<lab>-<ns>.<pod>         a pod                     np-<lab>-external    a client outside the cluster
    np-<lab>-segment-<name>     a segment and its bridge

A pod's name is told from the others by its dot: a Kubernetes namespace has none, and neither has a node of a lab.
"""

from __future__ import annotations

import hashlib
import re

from netnslab.errors import LabInputError

LAB_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,22}[a-z0-9])?")
NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
"""Short enough for a socket's path below the lab's state directory (108 bytes, unix(7))."""

ROUTER, EXTERNAL = "router", "external"
LONGEST_LINK = 15
"""IFNAMSIZ without the final zero byte (linux/if.h)."""


def check_lab_name(name: str) -> str:
    """Return a lab's name if it can be part of namespace names. Raises LabInputError."""
    if not LAB_NAME.fullmatch(name):
        raise LabInputError(f"--name: must be lower case letters, digits and hyphens, at most 24, is {name!r}")
    return name


def node_netns(lab: str, node: str) -> str:
    """Name the namespace of a node, of the router or of the external client."""
    return f"np-{lab}-{node}"


def pod_netns(lab: str, namespace: str, pod: str) -> str:
    """Name a pod's namespace; a name too long for a file is cut and gets a hash."""
    text = f"{namespace}.{pod}"
    return f"np-{lab}-{text if len(text) <= 200 else text[:180] + '-' + _digest(text)}"


def segment_netns(lab: str, segment: str) -> str:
    """Name the namespace in which a segment's bridge lives."""
    return f"np-{lab}-segment-{segment}"


def port_link(text: str) -> str:
    """Name a bridge's port after what is plugged in."""
    return text if len(text) <= LONGEST_LINK else f"port{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
