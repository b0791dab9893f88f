"""One kind of object at an API server, listed and then watched: what to ask next, and what an answer means.

    list, or a watch that begins with everything  --> Listed      all objects of the kind, as of one resource version
      |                                                  |
      v                                                  v
    watch from there --> ADDED MODIFIED DELETED --> Changed       one object
      |                  BOOKMARK                                 only the version to go on from
      |
      410, or three watches in a row that said nothing but errors --> list again, after a moment of chance

Nothing is ever removed because the server is away, slow, or says something that cannot be read: then the last state stands, an error
says so (``Trouble``), and the next attempt waits longer, up to ``LONGEST_WAIT``. Events that were seen before, or are older than what
is known of their object, are passed over. Runs in a thread of its own; what to do with what it finds is for ``kubeapi.py``, how a
server is reached for ``kubeclient.py``.

Source: Kubernetes API concepts (efficient detection of changes, streaming lists KEP-3157, comparable resource versions KEP-5504).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple, Protocol, TypeAlias

import msgspec

from clusterstate.parse import Parsed, parse_document

PAGE = 500
"""Objects that are asked for at a time."""
SHORTEST_WATCH, LONGEST_WATCH = 240, 480
"""Seconds after which the server ends a watch; by chance in between, so that nodes do not come back all at once."""
INITIAL_END: Final = "k8s.io/initial-events-end"
FIRST_WAIT, LONGEST_WAIT = 0.2, 30.0
"""Seconds between attempts; each failure doubles it."""
ABSENT_WAIT = 300.0
"""Seconds until a kind that the server does not serve is asked for again."""
FRUITLESS = 3
"""After so many watches in a row without an event, the version they began from is doubted."""
NO_PARAMETERS: Mapping[str, str] = {}

log = logging.getLogger("nodeplane.api")


class ApiError(Exception):
    """A request that came to nothing; ``status`` is HTTP's, 0 where there was no (whole) answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}" if status else reason)
        self.status = status


class Api(Protocol):
    """An API server. Everything may raise ApiError."""

    def get(self, path: str, parameters: Mapping[str, str] = NO_PARAMETERS) -> bytes:
        """Return the whole answer."""

    def lines(self, path: str, parameters: Mapping[str, str]) -> Iterator[bytes]:
        """Yield the lines of an answer as they come; ends where the server ends it."""


class Resource(NamedTuple):
    """What is asked for: objects of one kind, all that a selector leaves."""

    kind: str
    path: str
    """``/api/v1/services``."""
    selectors: tuple[tuple[str, str], ...] = ()
    """``labelSelector`` and ``fieldSelector``."""
    optional: bool = False
    """Whether there are servers that do not serve it."""


class Listed(NamedTuple):
    """All objects of a resource, by path, as of a version (-1: it cannot be compared); empty for a kind that is not served."""

    resource: Resource
    objects: Mapping[str, Parsed]
    version: int = -1


class Changed(NamedTuple):
    """What an object is now; None: it is gone."""

    resource: Resource
    path: str
    parsed: Parsed | None
    version: int = -1


class Trouble(NamedTuple):
    """Why a resource cannot be followed at the moment; empty: it is followed."""

    resource: Resource
    words: str


class Reached(NamedTuple):
    """Nothing happened to a resource up to a version but what has been told."""

    resource: Resource
    version: int


News: TypeAlias = Listed | Changed | Trouble | Reached


class _Metadata(msgspec.Struct, rename="camel", gc=False):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")
    annotations: dict[str, str] | None = None


class _Head(msgspec.Struct, gc=False):
    """What is read of an object before its kind's parser reads it, and of a list."""

    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    kind: str = ""
    code: int = 0
    message: str = ""


class _List(_Head, gc=False):
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct, gc=False):
    type: str
    object: msgspec.Raw


_HEAD = msgspec.json.Decoder(_Head)
_LIST = msgspec.json.Decoder(_List)
_EVENT = msgspec.json.Decoder(_Event)


class Reflector:
    """Follows one resource. ``tell`` is called with each piece of news, in this thread; ``run`` returns after ``stop`` is set."""

    def __init__(
        self, api: Api, resource: Resource, tell: Callable[[News], None], stop: threading.Event, *, streams: bool = False
    ) -> None:
        self._api, self._resource, self._tell, self._stop = api, resource, tell, stop
        self._streams = streams
        """Whether to ask for a watch that begins with everything."""
        self._version = ""
        """Where to go on from; empty: list first."""
        self._floor = -1
        """The version of the list: what is not newer is in it."""
        self._seen: dict[str, int] = {}
        """The newest version of every object of which there was an event since the list."""
        self._failures = self._fruitless = 0
        self._forgotten = 0
        """How often in a row history was forgotten before there was an event."""
        self._is_listed = False

    def run(self) -> None:
        """List and watch until told to stop."""
        while not self._stop.is_set():
            wait = 0.0
            try:
                self.step()
            except ApiError as error:
                wait = self._failed(error)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self._fruitless += 1
                wait = self._failed(ApiError(0, f"answered what cannot be read: {error}"))
            except Exception as error:  # a thread that ended would leave its kind as it is, and nobody would know
                log.exception("list and watch %s", self._resource.kind)
                wait = self._failed(ApiError(0, f"{type(error).__name__}: {error}"))
            if wait:
                self._stop.wait(wait)

    def step(self) -> None:
        """List if need be, then watch until the watch ends. Raises ApiError."""
        if not self._version:
            self._list()
        self._watch()

    def _failed(self, error: ApiError) -> float:
        """Note a failure; return how long to wait."""
        if error.status == 404 and self._resource.optional:
            self._version = ""
            if not self._is_listed:  # one that was served and is no more may be served again in a moment
                self._tell(Listed(self._resource, {}))
                self._tell(Trouble(self._resource, ""))
                return ABSENT_WAIT
        if error.status == 410:
            self._version = ""
            most = min(FIRST_WAIT * 2.0 ** min(self._forgotten, 16), LONGEST_WAIT)
            self._forgotten += 1
            return random.uniform(0, most)
        self._fruitless += error.status > 0
        self._doubt()
        self._failures += 1
        self._tell(Trouble(self._resource, str(error)))
        most = min(FIRST_WAIT * 2.0 ** min(self._failures, 16), LONGEST_WAIT)
        return random.uniform(most / 2, most)

    def _doubt(self) -> None:
        """List again when the server answered several watches in a row, and none with an event; it may have another history now."""
        if self._fruitless >= FRUITLESS:
            self._version, self._fruitless = "", 0

    def _well(self) -> None:
        if self._failures:
            self._failures = 0
            self._tell(Trouble(self._resource, ""))

    # -- everything ----------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        if self._streams:
            try:
                self._stream()
            except ApiError as error:
                if not 400 <= error.status < 500 or error.status in {401, 403, 404, 410, 429}:
                    raise
                self._streams = False  # the server has no such thing
            else:
                return
        objects: dict[str, Parsed] = {}
        parameters = {**dict(self._resource.selectors), "limit": str(PAGE)}
        while True:
            found = _LIST.decode(self._api.get(self._resource.path, parameters))
            for item in found.items or ():
                objects.update([self._object(bytes(item))])
            if not found.metadata.continue_ or self._stop.is_set():
                break
            parameters = {**parameters, "continue": found.metadata.continue_}
        self._start_from(found.metadata.resource_version, objects)

    def _stream(self) -> None:
        """Let a watch begin with everything, and hand it over when the server says that this was all."""
        objects: dict[str, Parsed] = {}
        more = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        for event, head in self._events({**self._watching(), **more}):
            if event.type == "BOOKMARK":
                if (head.metadata.annotations or {}).get(INITIAL_END) == "true":
                    self._start_from(head.metadata.resource_version, objects)
                    return  # the watch proper goes on from here
            elif event.type in {"ADDED", "MODIFIED"}:
                objects.update([self._object(bytes(event.object))])
            else:
                objects.pop(self._path(head.metadata), None)
        raise ApiError(0, "ended before everything was said")

    def _start_from(self, version: str, objects: dict[str, Parsed]) -> None:
        if not version:
            raise ApiError(0, "a list without a resourceVersion")
        self._version, self._floor, self._seen, self._is_listed = version, _number(version), {}, True
        self._tell(Listed(self._resource, objects, self._floor))
        self._well()

    # -- changes -------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        silent = True
        for event, head in self._events({**self._watching(), "resourceVersion": self._version}):
            silent, self._fruitless, self._forgotten = False, 0, 0
            self._well()
            version = head.metadata.resource_version
            if event.type == "BOOKMARK":
                self._version = version or self._version
                self._tell(Reached(self._resource, _number(version)))
                continue
            path, number = self._path(head.metadata), _number(version)
            if 0 <= number <= max(self._floor, self._seen.get(path, -1)):
                continue  # seen before, or overtaken
            self._seen[path] = number
            if number < 0 or number >= _number(self._version):
                self._version = version
            gone = event.type == "DELETED"
            self._tell(Changed(self._resource, path, None if gone else self._object(bytes(event.object))[1], number))
        self._fruitless += silent
        self._doubt()

    def _watching(self) -> dict[str, str]:
        seconds = random.randint(SHORTEST_WATCH, LONGEST_WATCH)
        more = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        return {**dict(self._resource.selectors), **more}

    def _events(self, parameters: Mapping[str, str]) -> Iterator[tuple[_Event, _Head]]:
        """Yield events as they come. Raises ApiError for one that says what is wrong."""
        started = time.monotonic()
        for line in self._api.lines(self._resource.path, parameters):
            if self._stop.is_set():
                return
            event = _EVENT.decode(line)
            head = _HEAD.decode(event.object)
            if event.type == "ERROR":
                raise ApiError(head.code or 500, head.message or "the watch was ended with an error")
            if event.type not in {"ADDED", "MODIFIED", "DELETED", "BOOKMARK"}:
                raise ApiError(0, f"an event of unknown type {event.type!r}")
            yield event, head
        if time.monotonic() - started < FIRST_WAIT:
            self._stop.wait(FIRST_WAIT)  # a server that ends watches at once is not asked in a tight circle

    # -- objects -------------------------------------------------------------------------------------------------------

    def _object(self, raw: bytes) -> tuple[str, Parsed]:
        head = _HEAD.decode(raw)
        path = self._path(head.metadata)
        if not head.kind:  # those in a list have none
            raw = b'{"kind":' + msgspec.json.encode(self._resource.kind) + b"," + raw.lstrip()[1:]
        return path, parse_document(raw, path, is_json=True)

    def _path(self, metadata: _Metadata) -> str:
        base, _, plural = self._resource.path.rpartition("/")
        space = f"/namespaces/{metadata.namespace}" if metadata.namespace else ""
        return f"{base}{space}/{plural}/{metadata.name}"


def _number(version: str) -> int:
    """Return a resource version as a number; -1 for one that is none, which cannot be compared."""
    return int(version) if version.isdecimal() else -1
