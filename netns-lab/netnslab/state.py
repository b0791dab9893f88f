"""What a lab knows of itself, on disk: enough to take it down after anything, and to go on with it from another process.

    /run/nodeplane/labs/<lab>/
        kubeconfig api/       with `lab up --api`: for people; its certificate, tokens and log
        state.json            below; replaced as a whole, and written *before* what it speaks of is made
        objects/              what the agents follow: one JSON object a file, then .generation
        logs/                 of pods that run a command
        nodes/<node>/
            run/              the node's /run/nodeplane: config.yaml, status.json, objects/ (mounted)
            flannel/ lib/     the node's /run/flannel and /var/lib/nodeplane
            cni/              the node's /var/lib/cni: what the CNI plugins keep
            agent.log         responder.log

The directory itself is the lock: whoever changes a lab holds flock(2) on it. A process that dies lets go of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kernelstate.linux import netns
from netnslab import names
from netnslab.errors import LabError
from netnslab.given import Raw
from netnslab.memory import Memory
from netnslab.mounts import is_mount, release_netns_dir
from netnslab.topology import Topology

LABS = Path("/run/nodeplane/labs")
STATE, GENERATION = "state.json", ".generation"
LOCK_SECONDS = 60.0


class Process(msgspec.Struct, frozen=True):
    """A process we started. Its start time (clock ticks since boot) tells it from a later one with its number."""

    pid: int
    start: int
    what: str


class LabPod(msgspec.Struct, frozen=True):
    """A pod as it is wired: enough to make it, to reach it and to take it away. In the host's network it has its node's netns."""

    namespace: str
    name: str
    node: str
    netns: str
    ips: tuple[str, ...]
    host_network: bool
    command: tuple[str, ...] = ()
    ports: tuple[tuple[str, int], ...] = ()
    """(protocol, number)."""

    @property
    def key(self) -> str:
        """Return ``namespace/name``."""
        return f"{self.namespace}/{self.name}"


class LabState(msgspec.Struct):
    """A lab. ``pods`` holds every pod that exists or is about to; ``given`` the objects people gave it."""

    name: str
    topology: Topology
    given: list[Raw] = []
    memory: Memory = msgspec.field(default_factory=Memory)
    pods: list[LabPod] = []
    unfinished: list[str] = []
    """Pods (``namespace/name``) that are being made or taken away: whoever finds them here begins again with them."""
    processes: list[Process] = []
    modes: dict[str, str] = {}
    """The service mode of nodes that were switched since the lab came up."""
    generation: int = 0
    api_port: int = 0
    """Where the lab's own API server listens, on the host's loopback; 0: there is none, agents follow files."""
    complete: bool = False
    """Whether ``lab up`` came to its end."""

    @property
    def root(self) -> Path:
        """Return its directory."""
        return LABS / self.name

    @property
    def objects(self) -> Path:
        """Return the directory the agents follow."""
        return self.root / "objects"

    def node_dir(self, node: str) -> Path:
        """Return a node's directory."""
        return self.root / "nodes" / node

    def node_netns(self, node: str) -> str:
        """Return a node's namespace."""
        return names.node_netns(self.name, node)

    def fixed_netns(self) -> list[str]:
        """Return the namespaces of everything but pods."""
        return [
            *(names.segment_netns(self.name, s.name) for s in self.topology.segments),
            *(self.node_netns(n) for n in (names.ROUTER, names.EXTERNAL)),
            *(self.node_netns(n.name) for n in self.topology.nodes),
        ]

    def all_netns(self) -> list[str]:
        """Return every namespace that may exist."""
        return [*self.fixed_netns(), *(p.netns for p in self.pods if not p.host_network)]

    def pod(self, key: str) -> LabPod | None:
        """Return a pod by ``namespace/name``, or None."""
        return next((p for p in self.pods if p.key == key), None)

    @property
    def kubeconfig(self) -> Path | None:
        """Return the kubeconfig for people; None where there is no API server."""
        return self.root / "kubeconfig" if self.api_port else None

    def save(self) -> None:
        """Write the state; a reader sees the old one or this."""
        write_file(self.root / STATE, msgspec.json.encode(self))


def write_file(path: Path, data: bytes) -> None:
    """Replace a file as a whole. The fresh one is hidden, which those who follow a directory of objects do not read."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.replace(path)


def load(name: str) -> LabState:
    """Read a lab's state. Raises LabError when there is no such lab."""
    try:
        state = msgspec.json.decode((LABS / name / STATE).read_bytes(), type=LabState)
    except FileNotFoundError:
        there = ", ".join(lab_names()) or "none is up"
        raise LabError(f"there is no lab {name!r} (labs: {there}); `nodeplane lab up --name {name}` makes it") from None
    except msgspec.DecodeError as error:
        raise LabError(f"{LABS / name / STATE}: is not a lab's state: {error}") from error
    if state.api_port:  # counts on between two changes of pods
        state.generation = max(state.generation, int((state.objects / GENERATION).read_text() or 0))
    return state


def lab_names() -> list[str]:
    """Return the names of all labs, also of those half made."""
    try:
        return sorted(p.name for p in LABS.iterdir() if p.is_dir())
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lab while changing it. Raises LabError when there is none, or somebody else holds it for too long."""
    path, end = LABS / name, time.monotonic() + LOCK_SECONDS
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        load(name)
        raise
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > end:
                raise LabError(f"lab {name!r} is being changed by another process")
            time.sleep(0.05)  # flock has no timeout of its own
        if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
            raise LabError(f"lab {name!r} was taken down by another process")
        yield
    finally:
        os.close(descriptor)


# -- the directories that hold labs ----------------------------------------------------------------------------------

_MADE_NETNS_DIR = ".made-netns-dir"
"""Says that /run/netns was no mount before the first lab: so the last one takes the mount away again."""


def refuse_second(name: str) -> None:
    """Raise LabError if a lab of that name exists, whole or half made."""
    if (LABS / name).exists():
        raise LabError(f"lab {name!r} exists already; `nodeplane lab down --name {name}` takes it down")


def make_root(name: str) -> None:
    """Make a lab's directory. Raises LabError if the lab exists."""
    LABS.mkdir(parents=True, exist_ok=True)
    try:
        (LABS / name).mkdir()
    except FileExistsError:  # made in the same moment by somebody else
        refuse_second(name)
        raise
    if not is_mount(netns.RUN_DIR):
        (LABS / _MADE_NETNS_DIR).touch()


def remove_root(name: str) -> None:
    """Remove a lab's directory, and with the last lab what holds labs."""
    shutil.rmtree(LABS / name, ignore_errors=False)
    if lab_names():
        return
    if (LABS / _MADE_NETNS_DIR).exists():
        (LABS / _MADE_NETNS_DIR).unlink()
        release_netns_dir()
    for directory in (LABS, LABS.parent):
        with contextlib.suppress(OSError):  # somebody else's files are in it
            directory.rmdir()
