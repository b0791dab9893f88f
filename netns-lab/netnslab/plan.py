"""What `lab up` is asked for, put together: topology and objects, from files, options and defaults.

--topology  --objects    nodes                                  pods and Services
no          no           three-nodes                            three-nodes' example
yes         no           the file's                             the file's
no          yes          the Node objects', else three-nodes'   the objects'
yes         yes          the file's, as Node objects have them  both; an object beats its namesake in the topology
"""

from __future__ import annotations

import tomllib
from typing import Any, NamedTuple

from netnslab.adopt import adopt_nodes
from netnslab.errors import LabInputError
from netnslab.given import Given, read_objects, topology_pods
from netnslab.topology import DEFAULT, Topology, find_topology, load_topology


class Plan(NamedTuple):
    """A checked topology, the objects to begin with, and those nobody has a use for."""

    topology: Topology
    given: Given
    ignored: list[str]


def read_plan(
    topology: str | None, objects: list[str], services: str | None, overlay: str | None, policy: str | None = None
) -> Plan:
    """Read everything. Raises LabInputError."""
    path = find_topology(topology or DEFAULT)
    load_topology(path)
    raw: dict[str, Any] = tomllib.loads(path.read_text())
    if topology is None and objects:
        raw = {key: value for key, value in raw.items() if key not in {"pods", "objects", "description"}}
        raw["description"] = f"made for {', '.join(objects)}"
    _override(raw, "services", "mode", services)
    _override(raw, "overlay", "backend", overlay)
    if policy is not None:
        raw["policy"] = {"enabled": True, "mode": policy}
    own = read_objects([str(path.parent / o) for o in raw.get("objects", [])])
    added = read_objects(objects)
    given = {**own.objects, **added.objects}
    found = adopt_nodes(raw, given, str(path), only_these=topology is None)
    given = {**topology_pods(found, str(path)), **given}
    return Plan(found, given, [*own.ignored, *added.ignored])


def _override(raw: dict[str, Any], table: str, key: str, value: str | None) -> None:
    """Put an option over what the file states; the options of another backend go with that."""
    if value is None or raw.get(table, {}).get(key) == value:
        return
    if table == "overlay" and value not in {"vxlan", "host-gw", "udp"}:
        raise LabInputError(f"--overlay: must be vxlan, host-gw or udp, is {value!r}")
    raw[table] = {**{k: v for k, v in raw.get(table, {}).items() if k != "options"}, key: value}
