"""Objects from a Kubernetes API server, as a source like any other: ``load``, ``fileno``, ``poll``, ``close``.

    reflector Services ------.
    reflector EndpointSlices -+--> queue --> poll() --> Holdings --> one new snapshot for all that came
    reflector Pods, ... -----'     eventfd

Decides which objects are asked for, waits for all kinds before the first snapshot, and puts together what the reflectors say in one
thread, the caller's. A server that goes away takes nothing with it: what was known stays, and the errors of each update say which
kinds are not followed at the moment.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence

import msgspec
from msgspec.structs import replace

from clusterstate.objects import ObjectRef
from clusterstate.snapshot import Name, ObjectError, Update
from clusterstate.sources.holdings import NOTHING, Holding, Holdings, held
from clusterstate.sources.reflector import Api, ApiError, Changed, Listed, News, Reached, Reflector, Resource, Trouble
from clusterstate.sources.tree import gc_paused

PROXIED = (("labelSelector", "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"),)
"""Of Services and EndpointSlices, those that a proxy has anything to do with: kube-proxy's selector."""
TOGETHER = 0.02
"""Seconds for which one ``poll`` takes in news that goes on coming."""
STREAMS_SINCE = (1, 32)
"""From this version on servers have streaming lists switched on."""


def resources(node: str, *, services: bool, all_nodes: bool, policies: bool) -> tuple[Resource, ...]:
    """Return what a node needs: its own Node in any case, others for an overlay; what policies speak of only where they are enforced."""
    own = () if all_nodes else (("fieldSelector", f"metadata.name={node}"),)
    found = [Resource("Node", "/api/v1/nodes", own)]
    if services:
        found += [
            Resource("Service", "/api/v1/services", PROXIED),
            Resource("EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices", PROXIED),
            Resource("ServiceCIDR", "/apis/networking.k8s.io/v1/servicecidrs", optional=True),
        ]
    if policies:
        found += [
            Resource("Pod", "/api/v1/pods"),
            Resource("Namespace", "/api/v1/namespaces"),
            Resource("NetworkPolicy", "/apis/networking.k8s.io/v1/networkpolicies"),
            Resource("ClusterNetworkPolicy", "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies", optional=True),
        ]
    return tuple(found)


class KubeSource:
    """Follows the objects at an API server. Use from one thread; ``close`` when done."""

    def __init__(self, api: Api, wanted: Sequence[Resource]) -> None:
        self._api, self._wanted = api, tuple(wanted)
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop, self._telling = threading.Event(), threading.Lock()
        self._holdings = Holdings()
        self._paths: dict[Resource, set[str]] = {resource: set() for resource in wanted}
        self._complete: set[Resource] = set()
        self._pending: dict[str, Holding | None] = {}
        """What came before the first snapshot was complete."""
        self._troubles: dict[Resource, str] = {}
        self._told: tuple[ObjectError, ...] = ()
        self._reached: dict[Resource, int] = {}
        """Up to which version each kind has been told; nothing of one that is not served."""
        self._said = ""
        self._revision = 0
        self._threads: list[threading.Thread] = []

    def fileno(self) -> int:
        """Return a descriptor for select or epoll."""
        return self._event

    def close(self) -> None:
        """Stop following. The threads end with their connections, at the latest with the process."""
        with self._telling:
            self._stop.set()
            os.close(self._event)

    # -- the first snapshot --------------------------------------------------------------------------------------------

    def load(self, timeout: float | None = None) -> Update:
        """Return the first complete snapshot; waits until the server has said all.

        Raises ApiError after ``timeout`` seconds; asked again, it goes on waiting.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (found := self.first()) is None:
            if until is not None and time.monotonic() > until:
                raise ApiError(0, self.missing(f" after {timeout:g} s"))
            with contextlib.suppress(queue.Empty):
                self._take(self._news.get(timeout=0.2), self._pending)  # a signal is handled at least this often
        return found

    def first(self) -> Update | None:
        """Return the first complete snapshot if the server has said all by now. To be asked until it has; then ``poll`` follows."""
        self._start()
        self._drain(self._pending)
        if len(self._complete) < len(self._wanted):
            return None
        with gc_paused():
            self._holdings.replace(self._pending)
        self._pending = {}
        return self._update(None, None)

    def missing(self, when: str = "") -> str:
        """Say what of the first snapshot is missing (and when), and why."""
        kinds = [resource.kind for resource in self._wanted if resource not in self._complete]
        words = "; ".join(sorted({text for text in self._troubles.values() if text})) or "no answer"
        return f"no complete list of {', '.join(kinds)}{when}: {words}"

    def _start(self) -> None:
        """Begin to follow; does not wait for the server."""
        if not self._threads:
            thread = threading.Thread(target=self._follow, name="list and watch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _follow(self) -> None:
        streams = self._has_streams()
        for resource in self._wanted:
            reflector = Reflector(self._api, resource, self._tell, self._stop, streams=streams)
            thread = threading.Thread(target=reflector.run, name=f"list and watch {resource.kind}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _has_streams(self) -> bool:
        """Ask for the server's version; one that does not answer is asked the old way."""
        try:
            return version_of(self._api.get("/version")) >= STREAMS_SINCE
        except ApiError:
            return False

    def _tell(self, news: News) -> None:
        self._news.put(news)
        with self._telling:
            if not self._stop.is_set():
                os.eventfd_write(self._event, 1)

    # -- following -----------------------------------------------------------------------------------------------------

    def poll(self) -> Update | None:
        """Take in what was told since, for a moment. Returns None where nothing differs."""
        files: dict[str, Holding | None] = {}
        self._drain(files)
        difference = self._holdings.replace(files) if files else None
        refs = difference.refs() if difference else frozenset()
        services = difference.services() if difference else frozenset()
        if not refs and self._errors() == self._told and self._generation() == self._said:
            return None
        return self._update(refs, services)

    def _drain(self, files: dict[str, Holding | None]) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        until = time.monotonic() + TOGETHER
        while not self._news.empty():
            self._take(self._news.get(), files)
            if time.monotonic() > until:
                if not self._news.empty():
                    os.eventfd_write(self._event, 1)
                return

    def _take(self, news: News, files: dict[str, Holding | None]) -> None:
        """Take in one piece of news; ``files`` are the objects that may differ, by path."""
        match news:
            case Listed(resource, objects, version):
                self._reached.pop(resource, None)  # a server that was restored begins again where its backup was
                self._reach(resource, version)
                self._complete.add(resource)
                files |= dict.fromkeys(self._paths[resource] - objects.keys())
                self._paths[resource] = set(objects)
                for path, parsed in objects.items():
                    files[path] = held(parsed, self._before(path, files))
            case Changed(resource, path, None, version):
                self._reach(resource, version)
                self._paths[resource].discard(path)
                files[path] = None
            case Changed(resource, path, parsed, version):
                self._reach(resource, version)
                assert parsed is not None
                self._paths[resource].add(path)
                files[path] = held(parsed, self._before(path, files))
            case Reached(resource, version):
                self._reach(resource, version)
            case Trouble(resource, words):
                if words:
                    self._troubles[resource] = words
                else:
                    self._troubles.pop(resource, None)

    def _reach(self, resource: Resource, version: int) -> None:
        if version >= 0:
            self._reached[resource] = max(version, self._reached.get(resource, version))

    def _before(self, path: str, files: Mapping[str, Holding | None]) -> Holding:
        """Return what was known of an object; nothing of one that has gone meanwhile."""
        return (files[path] or NOTHING) if path in files else self._holdings.of(path)

    # -- what is said ----------------------------------------------------------------------------------------------------

    def _errors(self) -> tuple[ObjectError, ...]:
        away = [
            ObjectError(resource.path, None, "", f"{words} (what is known of it stays)")
            for resource, words in sorted(self._troubles.items())
        ]
        return (*away, *self._holdings.errors())

    def _update(self, refs: frozenset[ObjectRef] | None, services: frozenset[Name] | None) -> Update:
        self._revision += 1
        self._told, self._said = self._errors(), self._generation()
        snapshot = self._holdings.snapshot = replace(self._holdings.snapshot, revision=self._revision)
        return Update(snapshot, refs, self._told, services, generation=self._said)

    def _generation(self) -> str:
        """Return the version up to which all kinds have been told: versions count all kinds together (KEP-5504)."""
        return str(min(self._reached.values())) if self._reached else ""


def version_of(answer: bytes) -> tuple[int, int]:
    """Read ``/version``: ``{"major": "1", "minor": "33+"}``; (0, 0) for anything else."""
    try:
        said = msgspec.json.decode(answer, type=dict[str, str])
        return int(said["major"]), int(said["minor"].rstrip("+"))
    except (msgspec.DecodeError, KeyError, ValueError):
        return 0, 0
