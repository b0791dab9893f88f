"""The objects a lab is given: read whole, as dictionaries, so that what they state is kept to the last field.

    files, directories, stdin ---> documents ---> lists taken apart ---> checked by clusterstate ---> {ref: object}

One object that cannot be used refuses all of them: a lab changes as a whole or not at all. Kinds that neither the lab nor an
agent reads (a ConfigMap, a Deployment) are named in ``ignored`` and left out. What a control plane adds is for ``controlplane``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml

from clusterstate.objects import ObjectRef
from clusterstate.parse import KINDS, parse_object
from clusterstate.yamltext import load_documents
from netnslab.errors import LabInputError
from netnslab.topology import PodGroup, Topology

Raw: TypeAlias = dict[str, Any]
"""An object as JSON has it."""
Given: TypeAlias = dict[ObjectRef, Raw]

SUFFIXES = {".json", ".yaml", ".yml"}


class Reading(NamedTuple):
    """What files hold: the objects, in the order they came, and those left out as nobody's."""

    objects: Given
    ignored: list[str]


def read_objects(paths: Sequence[str]) -> Reading:
    """Read files, directories (their files, not hidden ones) and ``-`` for stdin. Raises LabInputError.

    An object that is there twice counts as its last version, as with kubectl.
    """
    reading = Reading({}, [])
    for stated in paths:
        for source, data in _files(stated):
            for raw in _documents(source, data):
                _take(reading, source, raw, "")
    return reading


def _files(stated: str) -> Iterator[tuple[str, bytes]]:
    if stated == "-":
        yield "stdin", sys.stdin.buffer.read()
        return
    path = Path(stated)
    try:
        if not path.is_dir():
            yield stated, path.read_bytes()
            return
        for file in sorted(path.iterdir()):
            if file.suffix in SUFFIXES and not file.name.startswith(".") and file.is_file():
                yield str(file), file.read_bytes()
    except OSError as error:
        raise LabInputError(f"{error.filename or stated}: {error.strerror}") from error


def _documents(source: str, data: bytes) -> Iterator[Any]:
    try:
        yield from (d for d in load_documents(data) if d is not None)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LabInputError(f"{source}: is neither JSON nor YAML: {' '.join(str(error).split())}") from error


def _take(reading: Reading, source: str, raw: Any, member: str) -> None:
    """Take one object in, or each of a list's."""
    if isinstance(raw, dict):
        kind = raw.get("kind", member)
        if isinstance(kind, str) and kind.endswith("List") and isinstance(raw.get("items"), list):
            for item in raw["items"]:
                _take(reading, source, item, kind.removesuffix("List"))
            return
        raw = {**({"kind": member} if member else {}), **raw}
    parsed = parse_object(raw, source) if isinstance(raw, dict) else None
    if parsed is None:
        raise LabInputError(f"{source}: must hold Kubernetes objects, holds {raw!r:.80}")
    if parsed.errors:
        raise LabInputError(str(parsed.errors[0]))
    if not parsed.objects and not _stands_for_nothing(raw):
        metadata = raw.get("metadata")
        reading.ignored.append(f"{raw['kind']} {metadata.get('name', '') if isinstance(metadata, dict) else ''}".strip())
        return
    reading.objects[reference(raw)] = raw


def _stands_for_nothing(raw: Raw) -> bool:
    """Tell an object of a kind we know that yields no value: an Endpoints object without addresses, say."""
    group = str(raw.get("apiVersion", "v1")).rpartition("/")[0]
    return raw["kind"] in KINDS and KINDS[raw["kind"]].group == group


def reference(raw: Raw) -> ObjectRef:
    """Return the reference of a checked object."""
    metadata = raw["metadata"]
    namespace = (metadata.get("namespace") or "default") if KINDS[raw["kind"]].namespaced else ""
    return ObjectRef(raw["kind"], namespace, metadata["name"])


def topology_pods(topology: Topology, source: str) -> Given:
    """Make the Pod objects of a topology's ``[[pods]]``. Raises LabInputError."""
    reading = Reading({}, [])
    for group in topology.pods:
        names = [group.name] if group.replicas is None else [f"{group.name}-{i + 1}" for i in range(group.replicas)]
        for name in names:
            _take(reading, source, _pod(group, name), "")
    return reading.objects


def _pod(group: PodGroup, name: str) -> Raw:
    ports = [
        {"containerPort": p.container_port, "protocol": p.protocol, **({"name": p.name} if p.name else {})} for p in group.ports
    ]
    container: Raw = {"name": group.name, "image": "netns-lab", "ports": ports}
    if group.command:
        container["command"] = group.command
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": group.namespace, "labels": {"app": group.name, **group.labels}},
        "spec": {
            "containers": [container],
            **({"nodeName": group.node} if group.node else {}),
            **({"hostNetwork": True} if group.host_network else {}),
        },
    }
