"""What went wrong on this node, as Events of its Node: ``kubectl describe node`` shows what its operator would find in the status.

    status: errors, object errors, problems --new lines--> queue --own thread--> POST events.k8s.io/v1

    reason           line of the status
    Starting         (Normal) the agent runs
    FailedToProgram  the kernel refused something
    BadObject        an object is not as the API has it; the last good one counts
    Problem          everything else that somebody should look at

A line is said once, and again after ``AGAIN`` seconds of silence. What is too much is left out: an Event is for people, and the status
has all of it. A server that is away loses Events and nothing else. Source: KEP-383; kube-proxy's ``Starting``; client-go's spam filter.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from clusterstate.sources.reflector import ApiError
from nodeplane.attendant import Attendant, Round

PATH = "/apis/events.k8s.io/v1/namespaces/default/events"
CONTROLLER = "nodeplane"
LONGEST = 1024
"""Bytes of a note, as the API has it."""
AGAIN = 3600.0
"""Seconds after which a line that is still there is said again."""
BURST, REFILL = 25, 300.0
"""Events at once, and seconds until there may be one more."""

log = logging.getLogger("nodeplane.events")


class Posting(Protocol):
    """An API server that objects can be created in."""

    def post(self, path: str, body: bytes) -> bytes:
        """Create an object; return it as it is then. Raises ApiError."""


class EventWriter(Attendant):
    """Turns one agent's status into Events. ``start`` and ``stop`` belong to the agent's thread."""

    def __init__(self, api: Posting, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._node, self._clock = api, node, clock
        self._said: dict[tuple[str, str], float] = {}
        self._tokens, self._counted = float(BURST), clock()
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._number = 0
        self._failed = ""
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Start the thread, in the network namespace of the caller."""
        self._thread.start()
        self._say("Normal", "Starting", "nodeplane runs")

    def stop(self, seconds: float = 0.5) -> None:
        """Let the thread end once it has said what there is to say; one that waits for an answer ends with the process."""
        self._queue.put(None)
        self._thread.join(seconds)

    # -- for the agent -----------------------------------------------------------------------------------------------

    def synced(self, made: Round) -> None:
        """Say what is wrong now and was not before."""
        now = self._clock()
        for reason, line in _lines(made):
            if now - self._said.get((reason, line), -AGAIN) >= AGAIN:
                if not self._may(now):
                    break
                self._said[reason, line] = now
                self._say("Warning", reason, line)
        if len(self._said) > 4 * BURST:
            self._said = {key: at for key, at in self._said.items() if now - at < AGAIN}

    def _may(self, now: float) -> bool:
        """Whether one more is not too many; counts it."""
        self._tokens = min(BURST, self._tokens + (now - self._counted) / REFILL)
        self._counted = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _say(self, kind: str, reason: str, note: str) -> None:
        self._number += 1
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        name = f"{self._node}.{time.time_ns():x}.{self._number}"
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": "default"},
            "eventTime": stamp,
            "reportingController": CONTROLLER,
            "reportingInstance": f"{CONTROLLER}-{self._node}-{os.getpid()}"[:128],
            "action": "Programming",
            "reason": reason,
            # A Node's uid is its name here, as with kubelet and kube-proxy: kubectl describe looks for that.
            "regarding": {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": self._node},
            "note": note.encode()[:LONGEST].decode(errors="ignore"),
            "type": kind,
        }
        self._queue.put(msgspec.json.encode(event))

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (body := self._queue.get()) is not None:
            try:
                self._api.post(PATH, body)
            except ApiError as error:
                if str(error) != self._failed:
                    log.warning("Events cannot be written: %s", error)
                self._failed = str(error)
            else:
                self._failed = ""


def _lines(made: Round) -> Iterator[tuple[str, str]]:
    for reason, lines in (
        ("FailedToProgram", made.errors),
        ("BadObject", made.status.object_errors),
        ("Problem", made.status.problems),
    ):
        for line in lines:
            yield reason, line
