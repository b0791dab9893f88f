"""What a node says of itself over HTTP, as kube-proxy says it.

    healthzBindAddress  0.0.0.0:10256    /healthz   200 or 503: Services are kept up to date here, and the Node is to have traffic
                                         /livez     the same, whatever the Node object says
    metricsBindAddress  127.0.0.1:10249  /metrics   Prometheus' text
                                         /proxyMode the mode's name
                                         /healthz   ok

Each has a thread of its own (``http_ports.py``), which reads what the agent left for it and never waits for it; a port that is taken
is tried again every ``RETRY`` seconds and is a problem of its own, no failure of Services. The port of a server whose number is 0 stays
closed. They listen before the first snapshot is there: who waits for an API server is alive. Source: kube-proxy pkg/proxy/healthcheck.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import NamedTuple

from nodeplane.attendant import Attendant
from nodeplane.config_node import Bind, ServerOptions
from nodeplane.exposition import CONTENT_TYPE
from nodeplane.http_ports import HttpPorts, Place, path_of
from nodeplane.metrics import NodeMetrics
from proxy.health import Answer

RETRY = 2.0
FRESH = 0.2
"""Seconds for which what was counted is said again: nobody makes the agent count all the time."""
CLIENTS = 64
"""Connections of each server at a time."""


class Health(NamedTuple):
    """How a node is."""

    healthy: bool
    """Whether Services are kept up to date."""
    eligible: bool
    """Whether the Node object says that traffic may come."""
    updated: float
    """When the kernel was last as desired, seconds since the epoch; 0: never."""
    families: tuple[int, ...]


BEFORE = Health(healthy=True, eligible=False, updated=0.0, families=())
"""How a node is that has heard of nothing yet."""


def _places(bind: Bind, owner: str) -> list[Place]:
    return [Place(owner, 6 if ":" in bind.address else 4, bind.address, bind.port)] if bind.port else []


class NodeServers(Attendant):
    """Both servers. ``open`` before use; ``close`` when done."""

    def __init__(self, options: ServerOptions, mode: str, counted: NodeMetrics) -> None:
        self.mode, self._metrics = mode, counted
        self.health: Callable[[], Health] = lambda: BEFORE
        """How the node is; called from the threads that answer."""
        self._servers = (
            ("healthzBindAddress", options.healthz, HttpPorts(self._tell_health, clients=CLIENTS, name="healthz")),
            ("metricsBindAddress", options.metrics, HttpPorts(self._tell_metrics, clients=CLIENTS, name="metrics")),
        )
        self._printed = b""
        self._printed_at = float("-inf")
        self._problems: tuple[str, ...] = ()
        self._again_at = 0.0

    def open(self) -> Sequence[str]:
        """Listen; return one line for each that cannot be listened on. To be called again for those."""
        failed: list[str] = []
        for field, bind, ports in self._servers:
            failed += [f"{field} {bind}: {words}" for words in ports.set(_places(bind, field)).values()]
        self._problems = tuple(failed)
        self._again_at = time.monotonic() + RETRY
        return self._problems

    def turn(self) -> None:
        """Try again what failed."""
        if self._problems and time.monotonic() >= self._again_at:
            self.open()

    def problems(self) -> Sequence[str]:
        """Return which port cannot be had, and why."""
        return self._problems

    def close(self) -> None:
        """Close both."""
        for _, _, ports in self._servers:
            ports.close()

    # -- what is said ------------------------------------------------------------------------------------------------

    def _tell_health(self, _place: Place, head: bytes) -> Answer:
        now, health = time.time(), self.health()
        path = path_of(head)
        if path == "/healthz":
            said = print_health(health, now, eligible=health.eligible)
            self._metrics.healthz.add(str(said.status.value))
        elif path == "/livez":
            said = print_health(health, now, eligible=None)
            self._metrics.livez.add(str(said.status.value))
        else:
            said = _text(HTTPStatus.NOT_FOUND, "404 page not found\n")
        return said

    def _tell_metrics(self, _place: Place, head: bytes) -> Answer:
        match path_of(head):
            case "/metrics":
                if time.monotonic() - self._printed_at > FRESH:
                    self._printed, self._printed_at = self._metrics.print(), time.monotonic()
                return Answer(HTTPStatus.OK, (("Content-Type", CONTENT_TYPE),), self._printed)
            case "/proxyMode":
                return _text(HTTPStatus.OK, self.mode)
            case "/healthz":
                return _text(HTTPStatus.OK, "ok")
            case _:
                return _text(HTTPStatus.NOT_FOUND, "404 page not found\n")


def print_health(health: Health, now: float, *, eligible: bool | None) -> Answer:
    """Return what is said of a node's health; ``eligible`` None: the Node object does not matter."""
    updated = _time(now if health.healthy else health.updated)
    said: dict[str, object] = {"lastUpdated": updated, "currentTime": _time(now)}
    if eligible is not None:
        said["nodeEligible"] = eligible
    one = {"lastUpdated": updated, "healthy": health.healthy}
    said |= {"healthy": health.healthy, "status": {f"IPv{family}": one for family in health.families}}
    good = health.healthy and eligible is not False
    headers = (("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff"))
    return Answer(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, headers, json.dumps(said).encode())


def _time(seconds: float) -> str:
    if not seconds:
        return "0001-01-01T00:00:00Z"  # Go's way to say never
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _text(status: HTTPStatus, words: str) -> Answer:
    return Answer(
        status, (("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")), words.encode()
    )
