"""The health check ports of Services: which there are, and what is said there now.

Any method and path is answered alike; what: ``proxy/health.py``. Sockets and clients are ``http_ports.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from clusterstate.objects import ObjectRef
from clusterstate.snapshot import Name
from kernelstate.objects.address import Family
from nodeplane.http_ports import HttpPorts, Place
from proxy.health import Answer, HealthEndpoint, Places, answer


class HealthServers:
    """Keeps the health check ports open. ``healthy`` is asked at each request, from the thread that answers."""

    def __init__(self, healthy: Callable[[], bool]) -> None:
        self._healthy = healthy
        self._endpoints: dict[tuple[Name, Family], HealthEndpoint] = {}
        self.ports = HttpPorts(self._answer, name="service-health")

    def set(self, endpoints: Mapping[Name, tuple[HealthEndpoint, ...]], places: Places) -> list[str]:
        """Answer for exactly these Services from now on, at these places. To be called at each round.

        Returns one line for each port that could not be opened, sorted by Service; it is tried again at the next call.
        """
        self._endpoints = {(e.service, e.family): e for group in endpoints.values() for e in group}
        failed = self.ports.set(place for e in self._endpoints.values() for place in _places(e, places))
        return [
            f"{ObjectRef('Service', *place.owner)}: healthCheckNodePort {place.port}: {failed[place]}"
            for place in sorted(failed)
        ]

    def close(self) -> None:
        """Close every port and connection and end the thread."""
        self.ports.close()

    def _answer(self, place: Place, _head: bytes) -> Answer | None:
        endpoint = self._endpoints.get((place.owner, place.family))
        return None if endpoint is None else answer(endpoint, healthy=self._healthy())


def _places(endpoint: HealthEndpoint, places: Places) -> Iterator[Place]:
    for address in places.get(endpoint.family, ()):
        yield Place(endpoint.service, endpoint.family, address, endpoint.port)
