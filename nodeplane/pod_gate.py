"""Lets pods start once their policies are in force: the agent's end of the CNI plugin's question.

    plugin -- namespace, name, container, addresses --> gate --> amend(): the Pod has these addresses --> policies --> kernel
    plugin <-- "in force" ----------------------------- gate <-- settle(): all of it is written
    plugin <-- why not yet ---------------------------- gate <-- settle(), fail()
    plugin -- container ------------------------------> gate --> amend(): what was told of it is no more

A kubelet publishes a pod's addresses only after its start, so until the Pod says them itself they are those that the plugin told. They
are kept in a file, for an agent that starts anew must not forget them. What is told ends when the Pod says the same, or is
gone, or when its container is: a later container of the same pod goes on with what was told of that one. The
socket stays behind an agent that ended: whoever finds it without an answer knows that policies are enforced here, and waits.

Decides which pods are let through; threads only carry questions in and answers out, everything else happens in the agent's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from clusterstate.objects import IPAddress, Pod
from clusterstate.snapshot import Name, Snapshot, Update, edited
from nodeplane.cni.gate import IN_FORCE
from nodeplane.status import RUN_DIR

SOCKET = RUN_DIR / "policy.sock"
TOLD_FILE = RUN_DIR / "told-pods.json"
PATIENCE = 5.0
"""Seconds in which a plugin that has connected must have asked."""
LONGEST = 4096
"""Bytes of a question."""

log = logging.getLogger("nodeplane.gate")

Addresses = tuple[IPAddress, ...]


class _Question(msgspec.Struct):
    """What a plugin asks, and a line of the file; a container alone is one that has gone."""

    namespace: str = ""
    name: str = ""
    addresses: tuple[str, ...] = ()
    container: str = ""


class _Told(NamedTuple):
    container: str
    addresses: Addresses


class _Waiting(msgspec.Struct, eq=False):
    """A plugin that waits."""

    pod: Name
    told: _Told
    connection: socket.socket
    heard: str = ""
    """What it was answered last."""

    def answer(self, words: str) -> None:
        """Say how it stands, if it has not just been said; a plugin that has gone does not hear it."""
        if words != self.heard:
            self.heard = words
            with contextlib.suppress(OSError):
                self.connection.sendall(words.encode()[:LONGEST] + b"\n")


class PodGate:
    """One node's gate; ``open`` before use, ``close`` when done. ``amend`` and ``settle`` are for the agent's thread."""

    def __init__(self, node: str, path: Path = SOCKET, told_file: Path = TOLD_FILE) -> None:
        self._node, self._path, self._told_file = node, path, told_file
        self._told: dict[Name, _Told] = _read_told(told_file)
        self._amended: dict[Name, Pod] = {}
        """Pods as they were amended last."""
        self._raw = self._given = Snapshot()
        """What was amended last, and what became of it."""
        self._waiting: list[_Waiting] = []
        self._asked: list[_Waiting] = []
        """Asked since the agent looked; of both threads."""
        self._lock = threading.Lock()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Begin to listen. Raises OSError."""
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = self._path.with_suffix(f".{os.getpid()}")
        fresh.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(fresh))
        fresh.chmod(0o600)
        self._listener.listen(256)
        fresh.replace(self._path)  # there is no moment without a socket
        threading.Thread(target=self._accept, args=(self._listener,), name="pod gate", daemon=True).start()

    def fileno(self) -> int:
        """Return a descriptor that is readable when somebody has asked."""
        return self._event

    def told(self) -> int:
        """Return of how many pods the addresses are known from what plugins told alone. Safe from any thread."""
        return len(self._told)

    # -- questions -----------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._listen, args=(connection,), name="pod gate: a pod", daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        """Take in one question; whoever asks something else is cut off."""
        try:
            connection.settimeout(PATIENCE)
            data = b""
            while not data.endswith(b"\n") and len(data) < LONGEST and (piece := connection.recv(LONGEST)):
                data += piece
            question = msgspec.json.decode(data, type=_Question)
            connection.setblocking(False)  # the agent never waits for a plugin
            told = _told(question)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            log.warning("a question that is none: %s", error)
            connection.close()
            return
        with self._lock:
            self._asked.append(_Waiting((question.namespace, question.name), told, connection))
        os.eventfd_write(self._event, 1)

    def take(self) -> bool:
        """Take in what was asked since; whether anything was."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        with self._lock:
            asked, self._asked = self._asked, []
        for one in asked:
            container, addresses = one.told
            if not addresses:
                self._told = {n: held for n, held in self._told.items() if held.container != container}
                one.connection.close()
                continue
            # An address that is given anew is no longer that of a pod which never came to say it.
            self._told = {n: held for n, held in self._told.items() if not set(held.addresses) & set(addresses)}
            self._told[one.pod] = one.told
            self._waiting.append(one)
        if asked:
            self._keep()
        return bool(asked)

    # -- the agent's rounds --------------------------------------------------------------------------------------------

    def amend(self, update: Update) -> Update:
        """Return an update in which pods have the addresses they were given, where they do not say them themselves yet."""
        raw = self._raw if update.snapshot is self._given else update.snapshot  # it may come again
        told = len(self._told)
        wanted: dict[Name, Pod] = {}
        for name, (_, addresses) in tuple(self._told.items()):
            pod = raw.pods.get(name)
            if pod is not None and set(pod.ips) != set(addresses) and pod.phase not in {"Succeeded", "Failed"}:
                wanted[name] = replace(pod, ips=addresses)
            elif pod is not None or not self._is_awaited(name):
                del self._told[name]
        if len(self._told) != told:
            self._keep()
        differs = {name for name in {*wanted, *self._amended} if wanted.get(name) != self._amended.get(name)}
        before, self._amended = self._amended, wanted
        self._raw = raw
        self._given = snapshot = edited(raw, (), wanted.values()) if wanted else raw
        refs = frozenset(pod.ref for name in differs if (pod := wanted.get(name) or before.get(name)) is not None)
        return replace(update, snapshot=snapshot, changed=None if update.changed is None else update.changed | refs)

    def _is_awaited(self, name: Name) -> bool:
        """Whether somebody waits for a pod that nobody has heard of yet."""
        return any(one.pod == name for one in self._waiting)

    def settle(self, snapshot: Snapshot) -> None:
        """Let those through whose policies are in force: this snapshot, an amended one, is what the kernel holds."""
        left = []
        for one in self._waiting:
            pod = snapshot.pods.get(one.pod)
            if pod is None:
                one.answer("the agent has not heard of the pod yet")
            elif pod.node != self._node:
                one.answer(f"the pod is one of node {pod.node or 'none yet'}, this is {self._node}")
            elif not set(one.told.addresses) <= set(pod.ips):
                one.answer("the pod has other addresses by now, or its phase is one of the last")
            else:
                one.answer(IN_FORCE)
                one.connection.close()
                continue
            if _has_gone(one.connection):
                one.connection.close()
            else:
                left.append(one)
        self._waiting = left

    def fail(self, error: str) -> None:
        """Say to those who wait that their policies could not be written, and why."""
        for one in self._waiting:
            one.answer(f"the agent cannot write them: {' '.join(error.split())}")

    def _keep(self) -> None:
        """Write down what was told, as a whole."""
        lines = [_Question(*name, tuple(map(str, told.addresses)), told.container) for name, told in self._told.items()]
        fresh = self._told_file.with_suffix(".tmp")
        try:
            fresh.write_bytes(msgspec.json.encode(lines))
            fresh.replace(self._told_file)
        except OSError as error:
            log.warning("%s: %s: an agent that starts anew would not know addresses of pods that just start", fresh, error)

    def close(self) -> None:
        """Stop listening; the socket's file stays, and says that policies are enforced here."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()
        for one in (*self._waiting, *self._asked):
            one.connection.close()


def remove(path: Path = SOCKET, told_file: Path = TOLD_FILE) -> None:
    """Say that policies are not enforced here."""
    path.unlink(missing_ok=True)
    told_file.unlink(missing_ok=True)


def _told(question: _Question) -> _Told:
    """Return what a question tells. Raises ValueError."""
    if not (question.namespace and question.name) if question.addresses else not question.container:
        raise ValueError("neither a pod's addresses nor a container")
    return _Told(question.container, tuple(ip_address(text) for text in question.addresses))


def _has_gone(connection: socket.socket) -> bool:
    """Whether a plugin has given up."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _read_told(path: Path) -> dict[Name, _Told]:
    try:
        lines: list[_Question] = msgspec.json.decode(path.read_bytes(), type=list[_Question])
        return {(line.namespace, line.name): _told(line) for line in lines}
    except (OSError, ValueError, msgspec.DecodeError):
        return {}
