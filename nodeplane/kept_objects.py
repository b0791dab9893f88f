"""The last objects of the API server, kept over reboots: one file, and who may take it for his own.

/var/lib/nodeplane/objects.json.gz    {"kind": "List", "metadata": {format, node, server, ...}, "items": [...]}, gzipped

Unpacked it is a list of objects as ``kubectl`` prints them, so ``--objects`` reads it. The file is replaced as a whole and is on the
disk before it takes its place; gzip's own length and checksum tell one that is cut short or changed. What is in it is read by the same
parser, with the same checks, as what a server says. When it is written and when it is used: ``kept_source.py``.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from clusterstate.objects import KubernetesObject
from clusterstate.parse import parse_document
from clusterstate.print import print_object
from clusterstate.snapshot import Snapshot, edited

OBJECTS_FILE = Path("/var/lib/nodeplane/objects.json.gz")
FORMAT = "nodeplane objects 1"
"""What a file says of itself; another number is another program's."""
LARGEST = 1 << 30
"""Bytes that a file may be when unpacked."""
TOGETHER = 200
"""Objects that are printed between two pauses: some milliseconds."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ForeignStateError(Exception):
    """A file that is not ours, not whole, or speaks of another node or cluster."""


class Identity(msgspec.Struct, frozen=True):
    """Whose objects: which node's, from which server, and what was asked for there."""

    node: str
    server: str
    resources: tuple[str, ...]


class Kept(msgspec.Struct, frozen=True):
    """What a file held."""

    snapshot: Snapshot
    written: float
    """Seconds since the epoch."""
    same_boot: bool
    """Whether the machine has not been started since."""


class _Header(msgspec.Struct):
    format: str = ""
    node: str = ""
    server: str = ""
    resources: tuple[str, ...] = ()
    written: float = 0.0
    boot: str = ""


class _File(msgspec.Struct):
    metadata: _Header = msgspec.field(default_factory=_Header)


def boot_id() -> str:
    """Return what is another after each start of the machine; empty where it cannot be told."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def read_objects(wanted: Identity, path: Path = OBJECTS_FILE) -> Kept | None:
    """Return what is kept; None where there is no file. Raises ForeignStateError."""
    try:
        with gzip.open(path) as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error) as error:
        raise ForeignStateError(f"{path}: cannot be read whole: {error}") from error
    if len(data) > LARGEST:
        raise ForeignStateError(f"{path}: holds more than {LARGEST} bytes")
    try:
        header = msgspec.json.decode(data, type=_File).metadata
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ForeignStateError(f"{path}: is not what an agent writes: {error}") from error
    _check(header, wanted, path)
    parsed = parse_document(data, str(path), is_json=True)
    if any(not error.kept for error in parsed.errors):
        raise ForeignStateError(f"{parsed.errors[0]}")
    objects = [one for made in parsed.made.values() for one in made]
    return Kept(edited(Snapshot(), (), objects), header.written, bool(header.boot) and header.boot == boot_id())


def _check(header: _Header, wanted: Identity, path: Path) -> None:
    """Raise ForeignStateError for what another program, node or cluster has written, or what lacks something that is needed now."""
    for name, found, expected in (
        ("format", header.format, FORMAT),
        ("node", header.node, wanted.node),
        ("server", header.server, wanted.server),
    ):
        if found != expected:
            raise ForeignStateError(f"{path}: its {name} is {found!r}, not {expected!r}")
    # A resource that was asked for without a selector holds what any selector leaves, and more than that is told apart later.
    missing = [r for r in wanted.resources if r not in header.resources and r.partition("?")[0] not in header.resources]
    if missing:
        raise ForeignStateError(f"{path}: was written without {', '.join(missing)}")


def write_objects(
    snapshot: Snapshot, identity: Identity, now: float, path: Path = OBJECTS_FILE, *, pause: Iterable[None] = ()
) -> None:
    """Replace the file. ``pause`` is advanced after every ``TOGETHER`` objects, for who wants others to run meanwhile. Raises OSError."""
    header = _Header(FORMAT, identity.node, identity.server, identity.resources, now, boot_id())
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    pauses = iter(pause)
    with fresh.open("wb") as raw:
        fresh.chmod(0o600)
        with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=int(now)) as file:
            file.write(b'{"apiVersion":"v1","kind":"List","metadata":' + msgspec.json.encode(header) + b',"items":[\n')
            for piece in _pieces(snapshot):
                file.write(piece)
                next(pauses, None)
            file.write(b"\n]}\n")
        raw.flush()
        os.fsync(raw.fileno())
    fresh.replace(path)


def _pieces(snapshot: Snapshot) -> Iterator[bytes]:
    first = True
    for group in _groups(_objects(snapshot)):
        lines = b",\n".join(msgspec.json.encode(print_object(one)) for one in group)
        yield lines if first else b",\n" + lines
        first = False


def _objects(snapshot: Snapshot) -> Iterator[KubernetesObject]:
    """Yield every object that can be printed; unsorted, for sorting a large cluster takes longer than printing a piece of it."""
    yield from snapshot.namespaces.values()
    yield from snapshot.nodes.values()
    yield from snapshot.service_cidrs.values()
    yield from snapshot.services.values()
    for slices in snapshot.slices.values():
        yield from (one for one in slices.values() if not one.mirrored)
    yield from snapshot.pods.values()
    yield from snapshot.policies.values()
    yield from snapshot.cluster_policies.values()


def _groups(objects: Iterator[KubernetesObject]) -> Iterator[Sequence[Any]]:
    group: list[Any] = []
    for one in objects:
        group.append(one)
        if len(group) == TOGETHER:
            yield group
            group = []
    if group:
        yield group
