"""What this node tells the others through its own Node object: flannel's annotations, and that its network is there.

    agent's thread: synced() --> what is wanted, what the Node says --+
    own thread:                                                       '--> one patch of nodes/NAME/status --> the watch says it back

    metadata.annotations    flannel.alpha.coreos.com/...: by these flannel's nodes take this one for a peer (overlay/lease.py)
    status.conditions       NetworkUnavailable: False, once after each start: clouds taint a node until somebody says so

Only what differs is sent, and only after the kernel holds the overlay: whoever hears of the node can reach its pods. A server that is
away or forbids it is asked again, ever more seldom, and named in the status; nothing else waits for it.

Source: flannel pkg/subnet/kube/kube.go (AcquireLease, setNodeNetworkUnavailableFalse).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from random import Random
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from clusterstate.snapshot import Update
from clusterstate.sources.reflector import ApiError
from nodeplane.attendant import Attendant, Round
from nodeplane.pipeline import Desired
from overlay.lease import annotations_patch
from overlay.registry.nodes import own_annotations

REASON, MESSAGE = "NodeplaneIsUp", "nodeplane forwards packets of pods on this node"
REST = 1.0
"""Seconds between two patches, for whoever fights over them with us."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds after a failure, doubled with each."""

log = logging.getLogger("nodeplane.announcer")


class Patching(Protocol):
    """An API server that objects can be changed in."""

    def patch(self, path: str, body: bytes) -> bytes:
        """Apply a strategic merge patch; return the object as it is then. Raises ApiError."""


class Announcer(Attendant):
    """Keeps one Node's annotations and condition. ``start`` and ``stop`` belong to the agent's thread."""

    def __init__(self, api: Patching, node: str, random: Random | None = None) -> None:
        self._api, self._node, self._random = api, node, random or Random()
        self._taken: tuple[Update, Desired] | None = None
        self._lock = threading.Condition()
        self._wanted: Mapping[str, str] = {}
        self._found: Mapping[str, str] = {}
        self._sent: Mapping[str, str] | None = None
        """What a patch has said already, until the watch says it back."""
        self._condition_due = True
        self._is_ready = self._stopping = False
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)

    def start(self) -> None:
        """Start the thread, in the network namespace of the caller."""
        self._thread.start()

    def stop(self, seconds: float = 0.5) -> None:
        """Let the thread end; what was said stays. One that waits for an answer ends with the process."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join(seconds)

    # -- for the agent -----------------------------------------------------------------------------------------------

    def taken(self, update: Update, desired: Desired) -> None:
        """Keep what is about to be written."""
        self._taken = update, desired

    def synced(self, made: Round) -> None:
        """Say what the kernel holds now, if the Node says something else."""
        if made.errors or self._taken is None:
            return
        update, desired = self._taken
        node = update.snapshot.nodes.get(self._node)
        if node is None or desired.peers is None or not desired.peers.own:
            return
        wanted = own_annotations(desired.peers, node)
        with self._lock:
            self._wanted, self._found, self._is_ready = wanted, node.annotations, True
            if annotations_patch(wanted, node.annotations) is None:
                self._sent = None  # whoever changes them from now on is answered
            self._lock.notify_all()

    def problems(self) -> Sequence[str]:
        """Return why others cannot be told."""
        error = self._error
        return (f"Node {self._node}: its annotations cannot be written: {error}",) if error else ()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while True:
            with self._lock:
                while not self._stopping and self._patch() is None:
                    self._lock.wait()
                if self._stopping:
                    return
                patch, wanted = self._patch(), self._wanted
            try:
                self._api.patch(f"/api/v1/nodes/{quote(self._node)}/status", msgspec.json.encode(patch))
            except ApiError as error:
                failures += 1
                self._fail(str(error))
                self._pause(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures - 1, 10)) * self._random.uniform(0.5, 1.0))
                continue
            failures = 0
            self._succeed(wanted)
            self._pause(REST)

    def _patch(self) -> dict[str, Any] | None:
        """Return what has to be said, None: nothing."""
        if not self._is_ready:
            return None
        patch: dict[str, Any] = {}
        if self._sent != self._wanted:
            patch |= annotations_patch(self._wanted, self._found) or {}
        if self._condition_due:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            times = {"lastTransitionTime": now, "lastHeartbeatTime": now}
            condition = {"type": "NetworkUnavailable", "status": "False", "reason": REASON, "message": MESSAGE, **times}
            patch["status"] = {"conditions": [condition]}
        return patch or None

    def _fail(self, error: str) -> None:
        if error != self._error:
            log.warning("Node %s: its annotations cannot be written: %s", self._node, error)
        self._error = error

    def _succeed(self, wanted: Mapping[str, str]) -> None:
        with self._lock:
            if self._condition_due or self._error:
                log.info("Node %s: flannel's annotations and condition NetworkUnavailable are written", self._node)
            self._sent, self._condition_due, self._error = wanted, False, ""

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._lock:
            while not self._stopping and (left := until - time.monotonic()) > 0:
                self._lock.wait(left)
