"""Object files for tests: small objects, and the ways in which files are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterstate.objects import ObjectRef
from clusterstate.snapshot import Update
from clusterstate.sources.files import FileSource


def namespace(name: str, **labels: str) -> dict:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def service(name: str, ip: str = "10.96.0.1", port: int = 80) -> dict:
    return {"kind": "Service", "metadata": {"name": name}, "spec": {"clusterIP": ip, "ports": [{"port": port}]}}


def slice_(name: str, owner: str, *addresses: str) -> dict:
    return {
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": owner}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [a]} for a in addresses],
        "ports": [{"port": 80}],
    }


def write(path: Path, *objects: dict) -> None:
    path.write_text(json.dumps(objects[0] if len(objects) == 1 else {"kind": "List", "items": objects}))


def replace(path: Path, *objects: dict) -> None:
    """Write beside and rename over, as careful writers do."""
    write(path.with_name(".new"), *objects)
    path.with_name(".new").rename(path)


def ref(kind: str, name: str) -> ObjectRef:
    return ObjectRef(kind, "" if kind == "Namespace" else "default", name)


def namespaces(update: Update) -> list[str]:
    return sorted(update.snapshot.namespaces)


def told(update: Update) -> list[str]:
    return [str(error) for error in update.errors]


@contextmanager
def following() -> Iterator:
    """Hand out a function that starts a source on paths and loads it; closes all of them at the end."""
    sources: list[FileSource] = []

    def start(*paths: Path) -> tuple[FileSource, Update]:
        source = FileSource(paths)
        sources.append(source)
        return source, source.load()

    try:
        yield start
    finally:
        for source in sources:
            source.close()


class Objects:
    """The objects the agent follows, one a file."""

    def __init__(self, folder):
        self.folder, self.generation = folder, 0
        folder.mkdir()

    def put(self, *objects):
        for one in objects:
            path = self.folder / f"{one['kind']}-{one['metadata']['name']}.json"
            fresh = path.with_name(f".{path.name}")
            fresh.write_text(json.dumps(one))
            fresh.replace(path)
        self.say()

    def remove(self, name):
        for path in self.folder.glob(f"*-{name}.json"):
            path.unlink()
        self.say()

    def say(self):
        self.generation += 1
        fresh = self.folder / "..generation"
        fresh.write_text(f"{self.generation}\n")
        fresh.replace(self.folder / ".generation")
